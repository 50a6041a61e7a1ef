"""The Triton kernels of the selected branch on a GPU: every part, several tilings, in one run.

    python benchmarks/kernels_selected.py --length 65536 --share 0.2
    python benchmarks/kernels_selected.py --length 32768 --heads 32 --kv-heads 8 --only dkv
    python benchmarks/kernels_selected.py --select-share 4    # one list for four tokens
    python benchmarks/kernels_selected.py --length 32768 --head-dim 192    # the paper's heads

Each tiling is first held to a dense fp32 computation on 1000 tokens (the compiled kernel is the
same), then timed: medians in milliseconds, by CUDA events. TFLOP/s counts the products of queries
with the keys they list, nothing that a tile computes in vain. Far blocks are left to
``selected_groups.py``: tilings of the forward have none here.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nsa import NSAConfig, reference
from nsa.backends.compiled.selected.inverse_index import inverse_index
from nsa.backends.compiled.selected.launch import (
    selected_backward,
    selected_dkv,
    selected_dq,
    selected_forward,
)
from nsa.backends.compiled.selected.shared import shared_index
from nsa.backends.compiled.selected.tiles import (
    KeyTiles,
    QueryTiles,
    SelectedTiles,
    tile_row,
    tiles_for,
    tokens_per_tile,
)
from nsa.backends.compiled.selected.union import tile_unions

CHECKED_TOKENS = 1000
PARTS = ("index", "forward", "dq", "dkv")


def block_lists(T: int, args: argparse.Namespace) -> Tensor:
    """int32 ``[1, T, K, n]``: block 0, the last two, and random earlier ones.

    A random block stays in the list of the next token with probability ``--share``; one that is
    listed twice counts once, so that some lists are shorter than n.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    free = max(args.num_selected - 3, 0)
    shape = (T, args.kv_heads, free)
    t = torch.arange(T, device="cuda")[:, None, None].expand(shape)
    drawn = torch.rand(shape, generator=generator, device="cuda")
    renewed = torch.rand(shape, generator=generator, device="cuda") >= args.share
    born = torch.where(renewed, t, 0).cummax(0).values
    random = (drawn.gather(0, born) * (born // args.select_block + 1)).long()
    own = torch.arange(T, device="cuda")[:, None, None] // args.select_block
    own = own.expand(T, args.kv_heads, 1)
    forced = [torch.zeros_like(own), own, (own - 1).clamp_min(0)][: args.num_selected]
    blocks = torch.cat([*forced, random], -1).sort(-1).values
    again = torch.zeros_like(blocks, dtype=torch.bool)
    again[..., 1:] = blocks[..., 1:] == blocks[..., :-1]
    nowhere = torch.iinfo(torch.int32).max
    blocks = blocks.masked_fill(again, nowhere).sort(-1).values
    row = torch.arange(T, device="cuda")
    first = row - row % args.select_share
    return blocks.masked_fill(blocks == nowhere, -1).int()[None, first]


class Problem:
    """The tensors of T tokens (packed: of ``lengths``), and the calls to check and to time."""

    def __init__(self, T: int, args: argparse.Namespace, lengths: tuple[int, ...] = ()) -> None:
        generator = torch.Generator("cuda").manual_seed(1)
        dtype = getattr(torch, args.dtype)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)

        self.q = normal(1, T, args.heads, args.head_dim)
        self.k = normal(1, T, args.kv_heads, args.head_dim)
        self.v = normal(1, T, args.kv_heads, args.value_dim)
        self.dout = normal(1, T, args.heads, args.value_dim)
        self.cu_seqlens = None
        start = None
        if lengths:
            parts = [block_lists(length, args) for length in lengths]
            self.block_idx = torch.cat(parts, 1)
            ends = torch.tensor((0, *lengths), device="cuda").cumsum(0)
            self.cu_seqlens = ends.int()
            length = torch.tensor(lengths, device="cuda")
            start = torch.repeat_interleave(ends[:-1], length).int()
        else:
            self.block_idx = block_lists(T, args)
        self.config = NSAConfig(
            num_heads=args.heads,
            num_kv_heads=args.kv_heads,
            head_dim=args.head_dim,
            value_dim=args.value_dim,
            compress_block=1,
            compress_stride=1,
            select_block=args.select_block,
            rope_theta=None,
        )
        self.where = {"start": start, "select_block": args.select_block}
        self.common = {**self.where, "scale": self.config.softmax_scale}
        self.common["share"] = args.select_share
        self.out, self.lse = self.forward(None)
        self.delta = (self.dout.float() * self.out.float()).sum(-1)

    def forward(self, tiles: QueryTiles | None, **kwargs: object) -> tuple[Tensor, Tensor]:
        tensors = (self.q, self.k, self.v, self.block_idx)
        return selected_forward(*tensors, **self.common, tiles=tiles, **kwargs)

    def dq(self, tiles: QueryTiles | None, **kwargs: object) -> tuple[Tensor, Tensor]:
        tensors = (self.dout, self.q, self.k, self.v, self.lse, self.block_idx)
        return selected_dq(*tensors, **self.common, out=self.out, tiles=tiles, **kwargs)

    def dkv(self, tiles: KeyTiles | None, **kwargs: object) -> tuple[Tensor, Tensor]:
        tensors = (self.dout, self.q, self.k, self.v, self.lse, self.delta, self.block_idx)
        return selected_dkv(*tensors, **self.common, tiles=tiles, **kwargs)

    def backward(self) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (self.dout, self.q, self.k, self.v, self.out, self.lse, self.block_idx)
        sequences = None if self.cu_seqlens is None else self.cu_seqlens.numel() - 1
        return selected_backward(*tensors, **self.common, sequences=sequences)

    def unions(self, tokens: int) -> Callable[[], object]:
        return partial(
            tile_unions, self.block_idx, tokens=tokens, key_rows=self.k.shape[1], **self.where
        )

    def index(self, chunk: int) -> Callable[[], object]:
        call = {"key_rows": self.k.shape[1], "chunk": chunk, "sequences": None, **self.where}
        if self.common["share"] > 1:
            return partial(shared_index, self.block_idx, share=self.common["share"], **call)
        return partial(inverse_index, self.block_idx, **call)

    def truth(self) -> dict[str, Tensor]:
        """Dense, in fp32 (IEEE): whatever the user turned on, this function turns off."""
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        leaves = [x.float().requires_grad_() for x in (self.q, self.k, self.v)]
        out, lse = reference.selected_attention(
            *leaves, self.block_idx, self.config, self.cu_seqlens
        )
        grads = torch.autograd.grad(out, leaves, self.dout.float())
        torch.backends.cuda.matmul.allow_tf32 = before
        names = ("out", "lse", "dq", "dk", "dv")
        return dict(zip(names, (out.detach(), lse, *grads), strict=True))


def hold(
    found: dict[str, Tensor], truth: dict[str, Tensor], label: str, dtype: torch.dtype
) -> None:
    """Stops the program where a tensor is away from the truth by more than its dtype explains."""
    for name, x in found.items():
        want = truth[name]
        error = ((x.float() - want).norm() / want.norm()).item()
        limit = 1e-5 if dtype == torch.float32 else 1e-2  # sums of bf16 products may be fp32
        if not error < limit:
            raise SystemExit(f"{label}: {name} is off by {error:.1e}, expected below {limit:.0e}")


def median_ms(call: Callable[[], object], runs: int = 9) -> float:
    """Median of single runs, after two to warm up."""
    for _ in range(2):
        call()
    times = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def query_variants(G: int, n: int, default: QueryTiles, share: int) -> Iterator[QueryTiles]:
    """The default first; then one thing or another changed."""
    yield default
    seen = {default}
    least = min(default.block_n, 32)
    for rows, block_n, warps, stages in (
        (16, default.block_n, 1, 2),
        (16, default.block_n, 2, 3),
        (16, default.block_n, 4, 3),
        (32, default.block_n, 2, 2),
        (32, default.block_n, 4, 3),
        (64, default.block_n, 4, 2),
        (64, default.block_n, 4, 3),
        (64, default.block_n, 4, 4),
        (64, least, 4, 2),
        (64, least, 4, 4),
        (128, default.block_n, 8, 2),
        (128, default.block_n, 8, 3),
    ):
        tokens = tokens_per_tile(G, rows, n if share == 1 else None)
        if share > 1 and share % tokens:
            continue
        tiles = QueryTiles(tokens=tokens, block_n=block_n, num_warps=warps, num_stages=stages)
        if tiles not in seen:
            seen.add(tiles)
            yield tiles


def key_variants(G: int, default: KeyTiles) -> Iterator[KeyTiles]:
    """The default first; then one thing or another changed."""
    yield default
    seen = {default}
    for rows, warps, stages, chunk in (
        (32, 4, 2, 256),
        (32, 4, 3, 256),
        (64, 4, 1, 256),
        (64, 4, 2, 256),
        (64, 4, 3, 128),
        (64, 4, 3, 1024),
        (64, 8, 3, 256),
        (128, 8, 1, 256),
        (128, 8, 2, 256),
    ):
        tiles = KeyTiles(
            tokens=tokens_per_tile(G, rows),
            block_n=default.block_n,
            num_warps=warps,
            num_stages=stages,
            chunk=chunk,
        )
        if tiles not in seen:
            seen.add(tiles)
            yield tiles


def attempt(check: Callable[[], object], time: Callable[[], float]) -> float | None:
    """Milliseconds, or None for a tiling that does not fit on this device."""
    from triton.runtime.errors import OutOfResources

    try:
        check()
        return time()
    except OutOfResources:
        return None


def report(part: str, tiles: object, ms: float | None, tflop: float) -> None:
    label = str(tiles).split("(", 1)[1].rstrip(")") if tiles is not None else ""
    cost = "     does not fit" if ms is None else f"{ms:8.3f} ms {tflop / ms * 1e3:6.0f}"
    print(f"{part:12s} {cost}  {label}", flush=True)


def check_everything(args: argparse.Namespace, default: SelectedTiles) -> None:
    """Regular and packed against the oracle; no host sync; captured in a CUDA graph."""
    for lengths in ((), (300, 0, 1, 577, 122)):
        small = Problem(CHECKED_TOKENS, args, lengths)
        truth = small.truth()
        found = dict(zip(("dq", "dk", "dv"), small.backward(), strict=True))
        hold(
            {"out": small.out, "lse": small.lse, **found},
            truth,
            f"lengths {lengths}",
            small.q.dtype,
        )
        torch.cuda.set_sync_debug_mode("error")
        try:
            small.forward(None)
            small.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = small.forward(None)
            grads = small.backward()
        for x in (out, lse, *grads):
            x.fill_(float("nan"))
        graph.replay()
        found = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))
        hold(found, truth, f"graph, lengths {lengths}", small.q.dtype)
    print("checked: regular, packed, no sync, CUDA graph", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--value-dim", type=int, default=128)
    parser.add_argument("--select-block", type=int, default=64)
    parser.add_argument("--num-selected", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--share", type=float, default=0.0)
    parser.add_argument("--select-share", type=int, default=1, help="tokens that have one list")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--default-tiles", action="store_true", help="time no other tilings")
    args = parser.parse_args()
    T, G, n = args.length, args.heads // args.kv_heads, args.num_selected
    default = tiles_for(
        args.head_dim,
        args.value_dim,
        G,
        width=n,
        select_block=args.select_block,
        dtype=getattr(torch, args.dtype),
        length=T,
        share=args.select_share,
        capability=torch.cuda.get_device_capability(),
    )
    shape = args.head_dim, args.value_dim, G, getattr(torch, args.dtype)
    row = tile_row(*shape, torch.cuda.get_device_capability())
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {vars(args)}")
    print(f"tiles of this shape: {row.measured}")
    check_everything(args, default)
    small, big = Problem(CHECKED_TOKENS, args), Problem(T, args)
    truth = small.truth()
    listed = (big.block_idx >= 0).sum().item()
    keys = listed * args.select_block - T * args.kv_heads * (args.select_block - 1) / 2
    unit = 2e-12 * keys * G  # TFLOP of one product per element of D
    D, V = args.head_dim, args.value_dim
    tokens = default.forward.tokens
    union = big.unions(tokens)().counts.sum().item()
    print(f"{listed / T / args.kv_heads:.2f} blocks a token and key head;", end=" ")
    print(f"unions of {tokens} tokens hold {union / listed:.3f} of what the tokens list")
    print("part         milliseconds, TFLOP/s, tiling", flush=True)

    def variants(every: Iterator[object]) -> Iterator[object]:
        yield next(every)
        if not args.default_tiles:
            yield from every

    if "index" in args.only:
        for m in {1, default.forward.tokens, tokens_per_tile(G, 128, n)}:
            print(f"{'tile unions':12s} {median_ms(big.unions(m)):8.3f} ms         of {m} tokens")
        for chunk in sorted({tiles.chunk for tiles in variants(key_variants(G, default.dkv))}):
            ms = median_ms(big.index(chunk))
            print(f"{'inverse':12s} {ms:8.3f} ms         in chunks of {chunk}")
    if "forward" in args.only:
        base = replace(default.forward, far=None)
        for tiles in variants(query_variants(G, n, base, args.select_share)):
            unions = None if args.select_share > 1 else big.unions(tiles.tokens)()
            ms = attempt(
                lambda: hold(
                    dict(zip(("out", "lse"), small.forward(tiles), strict=True)),
                    truth,
                    str(tiles),
                    small.q.dtype,
                ),
                lambda: median_ms(partial(big.forward, tiles, unions=unions)),
            )
            report("forward", tiles, ms, unit * (D + V))
    if "dq" in args.only:
        for tiles in variants(
            query_variants(G, n, replace(default.dq, far=None), args.select_share)
        ):
            unions = None if args.select_share > 1 else big.unions(tiles.tokens)()
            ms = attempt(
                lambda: hold({"dq": small.dq(tiles)[0]}, truth, str(tiles), small.q.dtype),
                lambda: median_ms(partial(big.dq, tiles, unions=unions)),
            )
            report("dq", tiles, ms, unit * (2 * D + V))
    if "dkv" in args.only:
        for tiles in variants(key_variants(G, default.dkv)):
            index = big.index(tiles.chunk)()
            ms = attempt(
                lambda: hold(
                    dict(zip(("dk", "dv"), small.dkv(tiles), strict=True)),
                    truth,
                    str(tiles),
                    small.q.dtype,
                ),
                lambda: median_ms(partial(big.dkv, tiles, index=index)),
            )
            report("dkv", tiles, ms, unit * (2 * D + 2 * V))
    print(f"all, unions and index included, by default: {default}")
    report("forward", None, median_ms(partial(big.forward, None)), unit * (D + V))
    report("backward", None, median_ms(big.backward), unit * (4 * D + 3 * V))


if __name__ == "__main__":
    main()
