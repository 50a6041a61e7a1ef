"""One step of decode on a GPU: the kernels of nsa/backends/compiled/decode beside dense attention.

    python benchmarks/decode.py --check      # parity, no sync, CUDA graphs; nothing is timed
    python benchmarks/decode.py              # the same, then medians of captured graphs
    python benchmarks/decode.py --tiles      # the same, then other tilings

A graph holds steps over several caches, one after the other, so that nothing a step reads is in L2.
Dense attention reads every token of the same memory. GB/s counts the keys and values that a step
must read, and nothing that it writes for itself.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa import NSAConfig, reference
from nsa.backends.compiled.decode.launch import decode_attention
from nsa.backends.compiled.decode.tiles import (
    DEFAULT,
    ENOUGH_PROGRAMS,
    DecodeTiles,
    KeyTiles,
    tiles_for,
)
from nsa.config import KV
from nsa.core.inputs import DecodeInputs

PEAK = 3.0e12
"""Bytes a second that an H100 reads."""
L2 = 50e6
SHAPES = ((32, 65536), (256, 8192), (1, 65536), (32, 262144))
"""B, T."""
PAGE = 64


def make(
    config: NSAConfig,
    B: int,
    T: int,
    S: int = 1,
    *,
    dtype: torch.dtype = torch.bfloat16,
    lengths: Tensor | None = None,
    seed: int = 0,
    page: int = PAGE,
) -> DecodeInputs:
    """Random keys and values of T tokens, pages in no order; every sequence is full, or has
    ``lengths`` tokens before the step."""
    generator = torch.Generator("cuda").manual_seed(seed)
    K, D, V, H = config.num_kv_heads, config.head_dim, config.dv, config.num_heads

    def normal(*shape: int) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device="cuda")
        return x.normal_(generator=generator)

    def keys(*shape: int) -> KV:
        return KV(normal(*shape, K, D), normal(*shape, K, V))

    pages = -(-T // page)
    table = torch.randperm(B * pages, generator=generator, device="cuda").int().view(B, pages)
    position = torch.full((B,), T - S, dtype=torch.int32, device="cuda")
    return DecodeInputs(
        q=normal(B, S, H, D),
        position=position if lengths is None else lengths.to("cuda", torch.int32),
        gates=torch.rand(B, S, H, 3, generator=generator, device="cuda").to(dtype),
        compressed=keys(B, config.num_compressed(T)),
        selected=keys(B * pages, page),
        page_table=table,
        window=keys(B, config.window + S - 1),
    )


def check(
    config: NSAConfig, dtype: torch.dtype, S: int, page: int, tiles: DecodeTiles | None = None
) -> None:
    """A few sequences against the oracle; alone, with more programs for each, and in the batch; in
    a graph; without a sync."""
    lengths = torch.tensor([2500 - S, 0, 31, 1029, 700, 65, 2047])
    compared = len(lengths)
    lengths = lengths.repeat(1 + ENOUGH_PROGRAMS // (compared * config.num_kv_heads))
    B = len(lengths)
    x = make(config, B, 2560, S, dtype=dtype, lengths=lengths, seed=S, page=page)
    decode_attention(x, config, tiles=tiles)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    out, lists = decode_attention(x, config, tiles=tiles)
    torch.cuda.set_sync_debug_mode("default")
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    same = worst = 0.0
    for b, length in enumerate(lengths.tolist()[:compared]):
        T = length + S
        found, want_lists = oracle(x, b, T, lists, config)
        agree = (want_lists == lists[b]).all(-1).float().mean().item()
        same += agree / compared
        error = ((out[b].float() - found).norm() / found.norm()).item()
        worst = max(worst, error)
        if not error < limit:
            raise SystemExit(f"{dtype}, S {S}, sequence {b}: off by {error:.1e}")
        alone = decode_attention(of_sequence(x, b), config, tiles=tiles)
        if not (torch.equal(alone[0][0], out[b]) and torch.equal(alone[1][0], lists[b])):
            raise SystemExit(f"{dtype}, S {S}, sequence {b}: alone it is another")
    if same < 0.95:
        raise SystemExit(f"{dtype}, S {S}: {same:.3f} of the lists are the oracle's")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = decode_attention(x, config, tiles=tiles)
    for change in range(3):
        x.position.copy_((lengths // (change + 1)).int())
        x.q.copy_(torch.randn_like(x.q))
        order = torch.randperm(x.page_table.numel(), device="cuda").int()
        x.page_table.copy_(order.view_as(x.page_table))
        graph.replay()
        eager = decode_attention(x, config, tiles=tiles)
        if not all(torch.equal(a, b) for a, b in zip(held, eager, strict=True)):
            raise SystemExit(f"{dtype}, S {S}: a graph gives something else")
    print(
        f"checked: {dtype}, S {S}, pages of {page}: off by {worst:.1e}, {same:.3f} of lists",
        flush=True,
    )


def oracle(
    x: DecodeInputs, b: int, T: int, lists: Tensor, config: NSAConfig
) -> tuple[Tensor, Tensor]:
    """The output of one sequence under ``lists``, and the oracle's lists, in fp32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    S = x.q.shape[1]
    q, gates, start = x.q[b : b + 1].float(), x.gates[b].float(), T - S
    token = torch.arange(T, device="cuda")
    page = x.selected.k.shape[1]
    at = x.page_table[b, token // page].long(), token % page
    selected = [y[at][None].float() for y in x.selected]
    R = x.window.k.shape[1]
    late = token[-R:]
    window = [torch.zeros(1, T, *y.shape[2:], device="cuda") for y in x.window]
    for to, y in zip(window, x.window, strict=True):
        to[0, late] = y[b, late % R].float()
    compressed = [y[b : b + 1, : config.num_compressed(T)].float() for y in x.compressed]
    branches = (
        reference.compressed_attention(q, *compressed, config, q_start=start)[0],
        reference.selected_attention(q, *selected, lists[b : b + 1], config, q_start=start)[0],
        reference.window_attention(q, *window, config, q_start=start)[0],
    )
    out = sum(gates[..., c, None] * branches[c][0] for c in range(3))
    want = reference.select_blocks(q, compressed[0], config, q_start=start)
    torch.backends.cuda.matmul.allow_tf32 = before
    return out, want[0]


def of_sequence(x: DecodeInputs, b: int) -> DecodeInputs:
    """The same step of one sequence."""
    part = slice(b, b + 1)
    return x._replace(
        q=x.q[part],
        position=x.position[part],
        gates=x.gates[part],
        compressed=KV(*(y[part] for y in x.compressed)),
        page_table=x.page_table[part],
        window=KV(*(y[part] for y in x.window)),
    )


def graph_ms(steps: list[Callable[[], object]], runs: int = 15) -> float:
    """Median milliseconds of one of the steps, captured one after the other."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for step in steps:
            step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    times = []
    for run in range(runs + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if run >= 3:
            times.append(begin.elapsed_time(end) / len(steps))
    return statistics.median(times)


@dataclass
class Problem:
    """One shape, its caches, and what a step must read."""

    config: NSAConfig
    B: int
    T: int

    def __post_init__(self) -> None:
        copies = min(24, max(2, int(4 * L2 / self.read) + 1)) if self.B * self.T < 2**22 else 1
        self.caches = [make(self.config, self.B, self.T, seed=c) for c in range(copies)]

    @property
    def token(self) -> int:
        """Bytes of a key and a value of all heads, in bf16."""
        return 2 * self.config.num_kv_heads * (self.config.head_dim + self.config.dv)

    @property
    def read(self) -> int:
        """Bytes that a step must read."""
        c = self.config
        listed = min(self.T, c.num_selected * c.select_block)
        tokens = c.num_compressed(self.T) + listed + min(self.T, c.window)
        return self.B * self.token * tokens

    def ms(self, tiles: DecodeTiles | None = None) -> float:
        """Of a step."""
        return graph_ms(
            [lambda x=x: decode_attention(x, self.config, tiles=tiles) for x in self.caches]
        )

    def dense_ms(self, backend: SDPBackend) -> float | None:
        """Of dense attention over the pages as they lie in memory; None where it cannot run."""
        config, B, T = self.config, self.B, self.T
        K, G = config.num_kv_heads, config.group
        attend = F.scaled_dot_product_attention

        def as_gqa(x: DecodeInputs) -> Callable[[], Tensor]:
            k, v = (y.view(B, T, *y.shape[2:]).transpose(1, 2) for y in x.selected)
            q = x.q.transpose(1, 2)
            return lambda: attend(q, k, v, enable_gqa=True)

        def as_rows(x: DecodeInputs) -> Callable[[], Tensor]:
            """The heads of a group as so many queries, which one token's are."""
            k, v = (y.view(B, T, *y.shape[2:]).transpose(1, 2) for y in x.selected)
            q = x.q.view(B, K, G, -1)
            return lambda: attend(q, k, v)

        assert config.head_dim == config.dv
        times = []
        for form in (as_gqa, as_rows):
            ms = self._dense_form_ms(backend, form)
            times += [] if ms is None else [ms]
        return min(times, default=None)

    def _dense_form_ms(
        self, backend: SDPBackend, form: Callable[[DecodeInputs], Callable[[], Tensor]]
    ) -> float | None:
        try:
            with sdpa_kernel(backend):
                return graph_ms([form(x) for x in self.caches], runs=5)
        except RuntimeError as error:
            print(f"    {backend.name}, {form.__name__}: {str(error).splitlines()[0][:80]}")
            return None


def report(problem: Problem) -> None:
    ms, read = problem.ms(), problem.read
    rate = read / ms * 1e3
    print(
        f"B {problem.B:3d}  T {problem.T:6d}  {ms * 1e3:8.1f} us  {read / 1e6:7.1f} MB  "
        f"{rate / 1e9:5.0f} GB/s ({rate / PEAK:.0%} of 3.0 TB/s; all of it: "
        f"{read / PEAK * 1e6:.1f} us)",
        flush=True,
    )
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        dense = problem.dense_ms(backend)
        if dense is not None:
            rate = problem.B * problem.T * problem.token / dense * 1e3
            name = f"dense, {backend.name}"
            print(
                f"    {name:25s} {dense * 1e3:8.1f} us  {rate / 1e9:5.0f} GB/s: "
                f"{dense / ms:.2f} times as long",
                flush=True,
            )


def variants(default: DecodeTiles) -> Iterator[tuple[str, DecodeTiles]]:
    """One launch or another changed."""
    yield "overlap", replace(default, overlap=not default.overlap)
    for keys, n, warps, stages in (
        (256, 64, 4, 3),
        (1024, 64, 4, 3),
        (512, 32, 4, 4),
        (512, 64, 4, 2),
        (512, 64, 4, 4),
        (512, 64, 8, 3),
        (512, 128, 4, 2),
        (512, 128, 8, 3),
    ):
        tiles = KeyTiles(keys=keys, block_n=n, num_warps=warps, num_stages=stages)
        yield f"compressed {tiles}", replace(default, compressed=tiles)
    for keys, n, warps, stages in (
        (256, 64, 4, 3),
        (512, 32, 4, 4),
        (512, 64, 4, 2),
        (512, 64, 4, 4),
        (512, 64, 8, 3),
    ):
        tiles = KeyTiles(keys=keys, block_n=n, num_warps=warps, num_stages=stages)
        yield f"window     {tiles}", replace(default, window=tiles)
    for keys, n, warps, stages in (
        (256, 64, 4, 3),
        (1024, 64, 4, 3),
        (128, 64, 4, 2),
        (512, 32, 4, 4),
        (512, 64, 4, 2),
        (512, 64, 4, 4),
        (512, 64, 8, 3),
        (256, 64, 4, 2),
    ):
        tiles = KeyTiles(keys=keys, block_n=n, num_warps=warps, num_stages=stages)
        yield f"selected   {tiles}", replace(default, selected=tiles)
    for blocks, programs in ((64, 512), (256, 512), (128, 128), (128, 256), (256, 128)):
        label = f"select     {blocks} blocks, {programs} programs"
        yield label, replace(default, select_blocks=blocks, select_programs=programs)


def compare_tiles(problem: Problem) -> None:
    config, N = problem.config, problem.config.num_compressed(problem.T)
    sizes = {"compressed": N, "ratio": 4, "rows": 16}
    sizes["capability"] = torch.cuda.get_device_capability()
    default = tiles_for(torch.bfloat16, config.head_dim, config.dv, **sizes)
    for label, tiles in (("the default", default), *variants(default)):
        ms = attempt(problem, tiles)
        print("    does not fit" if ms is None else f"    {ms * 1e3:8.1f} us ", label, flush=True)


def attempt(problem: Problem, tiles: DecodeTiles) -> float | None:
    """Milliseconds of a step, or None for a tiling that does not fit on this device."""
    from triton.runtime.errors import OutOfResources

    try:
        return problem.ms(tiles)
    except OutOfResources:
        return None


def profile(problem: Problem) -> None:
    """Prints how long each kernel of a step runs, by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(10):
            for x in problem.caches:
                decode_attention(x, problem.config)
        torch.cuda.synchronize()
    for row in found.key_averages():
        if row.key.startswith("nsa_"):
            print(f"    {row.key:25s} {row.device_time_total / row.count:8.1f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="time nothing")
    parser.add_argument("--tiles", action="store_true", help="time other tilings, too")
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("B", "T"))
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    config = NSAConfig(rope_theta=None)
    other = replace(DEFAULT, overlap=not DEFAULT.overlap)
    check(config, torch.bfloat16, 1, PAGE)
    check(config, torch.bfloat16, 1, PAGE, other)
    check(config, torch.bfloat16, 8, PAGE)
    check(config, torch.float16, 3, 4 * PAGE)
    check(config, torch.float32, 1, 4 * PAGE)
    check(NSAConfig.preset("paper"), torch.bfloat16, 1, PAGE)
    check(NSAConfig.preset("small"), torch.bfloat16, 2, PAGE)
    if args.check:
        return
    for B, T in args.shape or SHAPES:
        try:
            problem = Problem(config, B, T)
        except torch.OutOfMemoryError:
            print(f"B {B}  T {T}: does not fit in memory")
            continue
        report(problem)
        profile(problem)
        if args.tiles and T <= 65536:
            compare_tiles(problem)
        del problem
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
