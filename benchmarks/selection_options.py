"""What each option of selection gains on a GPU: the selection's own time, beside the exact one.

    python benchmarks/selection_options.py                     # every option, every length
    python benchmarks/selection_options.py -o exact share4 -t 65536
    python benchmarks/selection_options.py -o fp8 regions4x16 -t 65536 --tiles
    python benchmarks/selection_options.py -o regions4x16 -t 65536 --kernels
    python benchmarks/selection_options.py -o exact share4 --whole

bf16, B 1, Hq 64, Hkv 4, D 128, l 32, d 16, l' 64, n 16, random data; the compressed branch's lse is
computed once and not timed. Medians in milliseconds. "in common" is the share of the exact list's
blocks that the option lists too, over the last queries: of random data, so a floor. With
``--whole``, also the call with all branches, forward / forward and backward, and its peak of memory
over the inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from triton.testing import do_bench

from nsa import KV, NSAConfig, nsa_attention
from nsa.backends import load
from nsa.backends.compiled.select.launch import select_forward
from nsa.backends.compiled.select.tiles import SearchTiles, SelectTiles

EXACT = NSAConfig(num_heads=64, num_kv_heads=4, head_dim=128)
OPTIONS = {
    "exact": EXACT,
    "schedule": replace(EXACT, select_schedule=((8192, 6), (32768, 10))),
    "mass50": replace(EXACT, select_mass=0.5),
    "mass90": replace(EXACT, select_mass=0.9),
    "share2": replace(EXACT, select_share=2),
    "share4": replace(EXACT, select_share=4),
    "share16": replace(EXACT, select_share=16),
    "regions4x16": replace(EXACT, select_regions=(4, 16)),
    "regions8x16": replace(EXACT, select_regions=(8, 16)),
    "regions8x8": replace(EXACT, select_regions=(8, 8)),
    "fp8": replace(EXACT, score_dtype="fp8"),
    "regions4x16 share4": replace(EXACT, select_regions=(4, 16), select_share=4),
    "fp8 share4": replace(EXACT, score_dtype="fp8", select_share=4),
}
LENGTHS = (8192, 16384, 32768, 65536, 131072, 262144)
TILES = [  # of the pass over all blocks, or over all regions
    SelectTiles(128, 64, 8, 3, 128),
    SelectTiles(128, 64, 8, 3),
    SelectTiles(128, 32, 8, 3, 128),
    SelectTiles(128, 128, 8, 3),
    SelectTiles(64, 64, 4, 3, 168),
    SelectTiles(64, 64, 4, 3, 128),
    SelectTiles(64, 32, 4, 3, 128),
]
SEARCH_TILES = [  # of the pass within regions
    SearchTiles(64, 512, 1, 2),
    SearchTiles(32, 512, 1, 2),
    SearchTiles(128, 512, 1, 2),
    SearchTiles(64, 512, 1, 2, 128),
    SearchTiles(64, 512, 2, 2),
    SearchTiles(128, 512, 2, 2),
    SearchTiles(64, 512, 2, 3),
    SearchTiles(64, 512, 4, 2),
    SearchTiles(128, 512, 4, 2),
    SearchTiles(64, 1024, 2, 2),
]
LAST = 4096
"""Queries whose lists are compared."""


def problem(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k_cmp and lse, made on the device."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    q = normal(1, length, EXACT.num_heads, EXACT.head_dim)
    k = normal(1, EXACT.num_compressed(length), EXACT.num_kv_heads, EXACT.head_dim)
    return q, k, load("compiled").compressed_attention(q, k, k, EXACT)[1]


def median(call: Callable[[], object]) -> float:
    return do_bench(call, warmup=50, rep=300, return_mode="median")


def in_common(exact: Tensor, lists: Tensor) -> float:
    a, b = exact[:, -LAST:, :, :, None], lists[:, -LAST:, :, None, :]
    return ((a == b) & (a >= 0)).sum().item() / (a >= 0).sum().item()


def try_tiles(call: Callable[..., Tensor], config: NSAConfig) -> None:
    """A table of times by tiles."""
    rows: list[tuple[str, SelectTiles | SearchTiles]] = [("tiles", tiles) for tiles in TILES]
    if config.select_regions is not None:
        rows += [("search", tiles) for tiles in SEARCH_TILES]
    for name, tiles in rows:
        try:
            ms = f"{median(lambda name=name, tiles=tiles: call(**{name: tiles})):8.3f} ms"
        except (RuntimeError, triton.errors.TritonError) as error:
            ms = f"{type(error).__name__}: {str(error)[:90]}"
        print(f"    {name:6s} {tiles}: {ms}", flush=True)


def print_kernels(call: Callable[..., Tensor]) -> None:
    """The time of each kernel of one call."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.key_averages()
    for event in sorted(events, key=lambda event: -event.device_time_total)[:8]:
        print(f"    {event.device_time_total / 1e3:8.3f} ms {event.count:3d} x {event.key[:80]}")


def print_whole(length: int, config: NSAConfig) -> None:
    """Times and peak of ``nsa_attention``."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        made = torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        return made.requires_grad_()

    q = normal(1, length, config.num_heads, config.head_dim)
    N = config.num_compressed(length)
    shapes = [(1, rows, config.num_kv_heads, config.head_dim) for rows in (N, length, length)]
    branches = [KV(normal(*shape), normal(*shape)) for shape in shapes]
    gates = normal(1, length, config.num_heads, 3).detach().sigmoid().requires_grad_()
    leaves = [q, gates, *(x for kv in branches for x in kv)]
    dout = torch.randn_like(q)

    def forward() -> Tensor:
        return nsa_attention(q, *branches, gates, config, backend="compiled")

    def both() -> None:
        torch.autograd.grad(forward(), leaves, dout)

    for _ in range(3):
        both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    forward_ms, both_ms = median(forward), median(both)
    print(f"    whole call {forward_ms:.2f} / {both_ms:.2f} ms, peak {peak:.2f} GiB", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("-t", "--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--tiles", action="store_true", help="also times tilings of each option")
    parser.add_argument("--kernels", action="store_true", help="also the time of each kernel")
    parser.add_argument("--whole", action="store_true", help="also the call with all branches")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    for length in args.lengths:
        q, k, lse = problem(length)
        exact = select_forward(q, k, lse, EXACT)
        exact_ms = median(lambda: select_forward(q, k, lse, EXACT))
        print(f"T {length}: exact {exact_ms:.3f} ms", flush=True)
        for name in args.options:
            config = OPTIONS[name]

            def call(config: NSAConfig = config, **tiles: Any) -> Tensor:
                return select_forward(q, k, lse, config, **tiles)

            common = in_common(exact, call())
            ms = median(call)
            print(
                f"  {name:20s} {ms:8.3f} ms  {exact_ms / ms:5.2f}x  in common {common:.1%}",
                flush=True,
            )
            if args.whole:
                with torch.enable_grad():
                    print_whole(length, config)
            if args.kernels:
                print_kernels(call)
            if args.tiles:
                try_tiles(call, config)


if __name__ == "__main__":
    main()
