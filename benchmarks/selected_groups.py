"""Selected attention of small groups on a GPU: far blocks by key tiles against unions, in one run.

    python benchmarks/selected_groups.py                    # 32 heads in groups of 16, 8, 4, 2, 1
    python benchmarks/selected_groups.py --large-blocks     # 64/4: l' 128 with n 8 and n 16

All kernels are built first, by several processes; a tiling that cannot be is named and left out.
Each is held to the results of query tiles alone, in bf16, then timed by ``bench``'s clock: whole
calls, inverse index and unions included, queued one behind the other, so that no launch is waited
for; with ``--waited`` each call is waited for, and the host's part of it counts. Medians in
milliseconds of ``--rounds``, in which shapes take turns. Equal heads have equal FLOPs: ``of first``
is the time over that of the first shape's choice. Tilings are tried on random lists; the choice and
query tiles alone also on lists of which neighbours share 65% and 86%.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from statistics import median

import torch
from kernels_selected import block_lists, median_ms
from torch import Tensor
from triton.errors import TritonError

from nsa.backends.compiled.selected.launch import selected_backward, selected_forward
from nsa.backends.compiled.selected.tiles import (
    FAR_SINCE,
    QueryTiles,
    SelectedTiles,
    tiles_for,
)
from nsa.core.build import build_once
from nsa.errors import NSAError
from nsa.tools.bench.timing import Clock, cuda_clock, measure

STAYS = {"random": 0.0, "65%": 0.5, "86%": 0.8}
"""Of lists by what neighbours share: how likely a random block stays for the next token."""
LIMIT = 1e-2
"""Of the difference of two results in bf16, relative."""
FAILURES = (RuntimeError, ValueError, IndexError, TritonError, NSAError)
"""Of a compiler, and of what does not fit in shared memory."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of one problem."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    select_block: int
    num_selected: int
    length: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def tiles(self, *, deterministic: bool = False, length: int | None = None) -> SelectedTiles:
        return tiles_for(
            *(self.head_dim, self.value_dim, self.group),
            width=self.num_selected,
            select_block=self.select_block,
            dtype=torch.bfloat16,
            length=self.length if length is None else length,
            deterministic=deterministic,
        )


class Problem:
    """Tensors on a GPU, or what stands for them while kernels are built."""

    def __init__(self, shape: Shape, stays: float | None) -> None:
        self.call = {"start": None, "select_block": shape.select_block}
        self.call["scale"] = shape.head_dim**-0.5
        torch.manual_seed(1)

        def normal(heads: int, size: int) -> Tensor:
            sizes = 1, shape.length, heads, size
            if stays is None:
                return torch.empty(sizes, dtype=torch.bfloat16, device="meta")
            return torch.randn(sizes, device="cuda", dtype=torch.bfloat16)

        self.q = normal(shape.heads, shape.head_dim)
        self.k = normal(shape.kv_heads, shape.head_dim)
        self.v = normal(shape.kv_heads, shape.value_dim)
        self.dout = normal(shape.heads, shape.value_dim)
        if stays is None:
            lists = (1, shape.length, shape.kv_heads, shape.num_selected)
            self.block_idx = torch.empty(lists, dtype=torch.int32, device="meta")
        else:
            options = {"share": stays, "select_share": 1, **asdict(shape)}
            self.block_idx = block_lists(shape.length, argparse.Namespace(**options))

    def forward(self, tiles: SelectedTiles) -> tuple[Tensor, ...]:
        tensors = (self.q, self.k, self.v, self.block_idx)
        return selected_forward(*tensors, **self.call, tiles=tiles.forward)

    def attend(self, tiles: SelectedTiles) -> None:
        """The backward reads its results."""
        self.out, self.lse = self.forward(tiles)

    def backward(self, tiles: SelectedTiles) -> tuple[Tensor, ...]:
        tensors = (self.dout, self.q, self.k, self.v, self.out, self.lse, self.block_idx)
        return selected_backward(*tensors, **self.call, tiles=tiles)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One tiling of one pass."""

    shape: Shape
    backward: bool
    name: str
    tiles: SelectedTiles
    chosen: bool = False
    """Timed on all lists."""

    def run(self, problem: Problem) -> tuple[Tensor, ...]:
        return (problem.backward if self.backward else problem.forward)(self.tiles)

    def rehearse(self) -> None:
        problem = Problem(self.shape, None)
        if self.backward:
            problem.attend(self.tiles)
        self.run(problem)


def union_form(shape: Shape) -> SelectedTiles:
    """No far blocks, and dq by a kernel of its own: as of large groups."""
    tiles = shape.tiles()
    if tiles.forward.far is None:
        return tiles
    return replace(
        tiles,
        # as where no block is far yet
        forward=replace(shape.tiles(length=FAR_SINCE - 1).forward, far=None),
        dq=replace(tiles.dq, far=None, block_n=64),
        dkv=replace(tiles.dkv, with_dq=False, num_stages=3, chunk=256),
    )


def far_variants(tiles: QueryTiles) -> Iterator[QueryTiles]:
    far = tiles.far
    if far is None:
        return
    for warps, stages in ((4, 1), (4, 2), (4, 3), (4, 4), (8, 2), (8, 3)):
        yield replace(tiles, far=replace(far, num_warps=warps, num_stages=stages))
    wide = replace(far, tokens=2 * far.tokens, num_warps=8)
    yield from (replace(tiles, far=replace(wide, num_stages=x)) for x in (2, 3))
    for share in (2, 4):
        yield replace(tiles, far=replace(far, chunk=far.chunk // share))
        yield replace(tiles, far=replace(far, chunk=far.chunk * share))
    for since in (2048, 8192):
        yield replace(tiles, far=replace(far, since=since))
    for room in (5 * 2**27, 5 * 2**29):
        yield replace(tiles, far=replace(far, room=room))
    for warps, stages in ((4, 1), (4, 2), (8, 2)):
        yield replace(tiles, num_warps=warps, num_stages=stages)


def backward_variants(tiles: SelectedTiles) -> Iterator[SelectedTiles]:
    dkv = tiles.dkv
    sums = (True,) if dkv.with_dq else (False,)
    for warps, stages, with_dq in itertools.product((4, 8), (1, 2, 3), sums):
        if (warps, with_dq, stages) == (4, True, 3):
            continue  # spills most
        found = replace(dkv, num_warps=warps, num_stages=stages, with_dq=with_dq)
        yield replace(tiles, dkv=found)
    for chunk in (256, 1024, 4096):
        yield replace(tiles, dkv=replace(dkv, chunk=chunk))
    yield replace(tiles, dkv=replace(dkv, tokens=2 * dkv.tokens, num_warps=8, num_stages=1))
    yield replace(tiles, dkv=replace(dkv, with_dq=False, num_warps=4, num_stages=3))


def large_block_variants(tiles: SelectedTiles) -> Iterator[SelectedTiles]:
    """Steps of 64 keys and of 128."""
    for n, warps, stages in ((64, 4, 2), (64, 4, 3), (128, 4, 2), (128, 8, 2), (128, 8, 3)):
        new = {"block_n": n, "num_warps": warps, "num_stages": stages}
        yield replace(tiles, forward=replace(tiles.forward, **new))
        yield replace(tiles, dq=replace(tiles.dq, **new))
        yield replace(tiles, dkv=replace(tiles.dkv, **new))
    yield replace(tiles, dkv=replace(tiles.dkv, block_n=128, num_warps=8, num_stages=1))


def variants(shape: Shape, *, tune: bool, large_blocks: bool) -> Iterator[Variant]:
    """The union form first, to which the others are held."""
    tiles = shape.tiles()
    for backward in (False, True):
        make = partial(Variant, shape=shape, backward=backward)
        base = union_form(shape)
        yield make(name="unions", tiles=base, chosen=True)
        seen = {base}
        if tiles not in seen:
            yield make(name="chosen", tiles=tiles, chosen=True)
            seen.add(tiles)
        if backward:
            ordered = shape.tiles(deterministic=True)
            yield make(name="deterministic", tiles=ordered, chosen=True)
        if not tune:
            continue
        others = backward_variants(tiles) if backward else iter(())
        if not backward:
            others = (replace(tiles, forward=x) for x in far_variants(tiles.forward))
        for other in large_block_variants(tiles) if large_blocks else others:
            name = difference(other, tiles)
            if other in seen or (("dq" in name or "dkv" in name) != backward):
                continue
            seen.add(other)
            yield make(name=name, tiles=other)


def difference(x: SelectedTiles, of: SelectedTiles) -> str:
    """What two tilings have apart."""
    found = []
    for part in ("forward", "dq", "dkv"):
        a, b = asdict(getattr(x, part)), asdict(getattr(of, part))
        far_a, far_b = a.pop("far", None) or {}, b.pop("far", None) or {}
        found += [f"{part} {name} {a[name]}" for name in a if a[name] != b[name]]
        found += [f"far {name} {far_a[name]}" for name in far_a if far_a[name] != far_b.get(name)]
    return ", ".join(found)


def build_one(variant: Variant) -> str | None:
    """Why the kernels of a tiling could not be made, or None; they are on the disk then."""
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        build_once(variant, device, variant.rehearse)
    except FAILURES as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:200]}"
    return None


def build(every: list[Variant], processes: int) -> list[Variant]:
    """Those whose kernels could be made; the chosen ones first, whose kernels others share."""
    begin, made = time.perf_counter(), []
    order = sorted(every, key=lambda variant: not variant.chosen)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for variant, failure in zip(order, pool.map(build_one, order), strict=True):
            if failure is None:
                made.append(variant)
            else:
                print(f"not built: {label(variant)}: {failure}", flush=True)
    print(f"{len(made)} tilings built in {time.perf_counter() - begin:.0f} s", flush=True)
    return [variant for variant in every if variant in made]


def label(variant: Variant) -> str:
    shape = variant.shape
    heads = f"{shape.heads}/{shape.kv_heads}:{shape.head_dim}"
    blocks = f"l' {shape.select_block} n {shape.num_selected:2d}"
    return f"{heads:9s} {blocks} {'backward' if variant.backward else 'forward ':8s} {variant.name}"


def worst(found: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """The largest relative difference, in parts of :data:`LIMIT`; more than 1 is wrong."""
    errors = [
        ((x.float() - y.float()).norm() / y.float().norm()).item() / LIMIT
        for x, y in zip(found, want, strict=True)
    ]
    return max(errors) if all(e == e for e in errors) else float("inf")


def kernels(call: Callable[[], object], most: int = 7) -> str:
    """Milliseconds of each kernel of a call, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    times = {x.key: x.self_device_time_total / 1e3 for x in profiler.key_averages()}
    longest = sorted(times.items(), key=lambda item: -item[1])[:most]
    return ", ".join(f"{name[:32]} {ms:.2f}" for name, ms in longest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, nargs="+", default=[16, 8, 4, 2, 1])
    parser.add_argument("--tune", type=int, nargs="*", default=[8, 4, 1], help="groups")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--value-dim", type=int, default=128)
    parser.add_argument("--lists", nargs="+", choices=list(STAYS), default=list(STAYS))
    parser.add_argument("--rounds", type=int, default=3, help="in which shapes take turns")
    parser.add_argument("--waited", action="store_true", help="wait for each call")
    parser.add_argument("--large-blocks", action="store_true", help="64/4, l' 64 and 128")
    parser.add_argument("--processes", type=int, default=16, help="that build kernels")
    parser.add_argument(
        "--kernels", action="store_true", help="time each kernel of the chosen, too"
    )
    args = parser.parse_args()
    sizes = {"head_dim": args.head_dim, "value_dim": args.value_dim, "length": args.length}
    common = partial(Shape, **sizes)
    if args.large_blocks:
        heads = {"heads": 64, "kv_heads": 4}
        blocks = ((64, 16), (128, 8), (128, 16))
        shapes = [common(**heads, select_block=x, num_selected=n) for x, n in blocks]
    else:
        of = {"select_block": 64, "num_selected": 16, "heads": args.heads}
        shapes = [common(kv_heads=args.heads // G, **of) for G in args.groups]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {vars(args)}", flush=True)
    every = [
        variant
        for shape in shapes
        for variant in variants(
            shape,
            tune=shape.select_block > 64 if args.large_blocks else shape.group in args.tune,
            large_blocks=args.large_blocks,
        )
    ]
    made = build(every, args.processes)
    clock = cuda_clock(torch.device("cuda", torch.cuda.current_device()))
    for lists in args.lists:
        here = [x for x in made if x.chosen or lists == args.lists[0]]
        problems = {shape: Problem(shape, STAYS[lists]) for shape in shapes}
        for shape, problem in problems.items():
            problem.attend(union_form(shape))
        wrong = {variant: check(variant, problems, here) for variant in here}
        times: dict[Variant, list[float]] = {variant: [] for variant in here}
        for number in range(args.rounds):
            for variant in here:
                call = partial(variant.run, problems[variant.shape])
                if not wrong[variant]:
                    ms = median_ms(call, 7) if args.waited else queued_ms(call, clock)
                    times[variant].append(ms)
            print(f"{lists}: {number + 1} of {args.rounds} rounds", end="\r", flush=True)
        print_times(lists, here, times, wrong)
        for variant in here if args.kernels else ():
            if variant.name in ("chosen", "unions"):
                print(label(variant), kernels(partial(variant.run, problems[variant.shape])))
        del problems
        torch.cuda.empty_cache()


def check(variant: Variant, problems: dict[Shape, Problem], every: list[Variant]) -> str:
    """What is wrong with a tiling's results, beside those of the shape's first one."""
    problem = problems[variant.shape]
    alike = (x for x in every if (x.shape, x.backward) == (variant.shape, variant.backward))
    try:
        error = worst(variant.run(problem), next(alike).run(problem))
    except FAILURES as failure:  # the others go on
        return f"{type(failure).__name__}: {failure}"
    return "" if error < 1 else f"WRONG: off by {error:.1f} times the limit"


def queued_ms(call: Callable[[], object], clock: Clock) -> float:
    return measure(call, clock, seconds=0.1, runs=7).median * 1e3


def print_times(
    lists: str,
    every: list[Variant],
    times: dict[Variant, list[float]],
    wrong: dict[Variant, str],
) -> None:
    """A line for each tiling, over the first shape's choice."""
    first: dict[bool, float] = {}
    for variant in every:
        if wrong[variant]:
            print(f"{lists:6s} {label(variant)}: {wrong[variant]}", flush=True)
            continue
        ms = median(times[variant])
        base = first.setdefault(variant.backward, ms)
        spread = f"{min(times[variant]):.2f} to {max(times[variant]):.2f}"
        text = f"{lists:6s} {ms:7.2f} ms ({spread}) {ms / base:5.2f} of first"
        print(f"{text}  {label(variant)}", flush=True)
    print(flush=True)


if __name__ == "__main__":
    main()
