"""The window kernels on a GPU: checked against the oracle's rule, then variants of their tiles.

    python benchmarks/kernels_window.py              # checks, then every shape
    python benchmarks/kernels_window.py checks       # checks alone
    python benchmarks/kernels_window.py paper-65536  # one shape alone
    python benchmarks/kernels_window.py 192/128 96 80 256  # heads whose tiles are untuned

bf16, random data, window 512; medians in milliseconds. FlexAttention takes 4.4 forward and 11.7
backward at paper-65536 on an H100, FlashAttention-2 6.2 and 14.8.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
from side_by_side import side_by_side
from torch import Tensor
from triton.testing import do_bench

from nsa import NSAConfig
from nsa.backends.compiled.window import launch as window
from nsa.backends.compiled.window.launch import window_backward, window_forward
from nsa.backends.compiled.window.tiles import Tiles
from nsa.core.packing import packed_tokens
from nsa.testing import Inputs, expected, make_inputs, random_blocks

PAPER = NSAConfig(num_heads=64, num_kv_heads=4, head_dim=128)
SMALL = NSAConfig.preset("small")
CONFIGS = {
    "paper": PAPER,
    "small": SMALL,
    "192/128": NSAConfig.preset("paper", num_heads=16, num_kv_heads=1),
    "G 1, w 100": replace(PAPER, num_heads=2, num_kv_heads=2, window=100),
    "G 40, D 72": NSAConfig(num_heads=40, num_kv_heads=1, head_dim=72, value_dim=40),
    "D 256": NSAConfig(num_heads=8, num_kv_heads=1, head_dim=256),
    "w 1": replace(SMALL, window=1),
    "scale -0.1": replace(SMALL, scale=-0.1),
}
SHAPES = {
    "paper-8192": (PAPER, 1, 8192),
    "paper-65536": (PAPER, 1, 65536),
    "small-2048": (SMALL, 32, 2048),
    "192/128": (NSAConfig.preset("paper"), 1, 32768),
    "96": (replace(PAPER, head_dim=96), 1, 32768),
    "80": (replace(PAPER, head_dim=80), 1, 32768),
    "256": (replace(PAPER, head_dim=256), 1, 32768),
}
FWD = {
    "128x64, 8 w, 2 st., 128 regs": Tiles(128, 64, 8, 2, 128),
    "128x64, 8 w, 2 st.": Tiles(128, 64, 8, 2),
    "128x64, 8 w, 3 st.": Tiles(128, 64, 8, 3),
    "128x64, 4 w, 2 st.": Tiles(128, 64, 4, 2),
    "128x128, 8 w, 2 st.": Tiles(128, 128, 8, 2),
    "128x32, 8 w, 2 st., 128 regs": Tiles(128, 32, 8, 2, 128),
    "128x32, 8 w, 3 st., 128 regs": Tiles(128, 32, 8, 3, 128),
    "64x32, 4 w, 2 st.": Tiles(64, 32, 4, 2),
    "64x64, 4 w, 2 st.": Tiles(64, 64, 4, 2),
    "64x64, 4 w, 3 st.": Tiles(64, 64, 4, 3),
    "64x128, 4 w, 2 st.": Tiles(64, 128, 4, 2),
    "256x64, 8 w, 2 st.": Tiles(256, 64, 8, 2),
}
BWD_DQ = {
    "128x64, 8 w, 2 st.": Tiles(128, 64, 8, 2),
    "128x64, 8 w, 2 st., 128 regs": Tiles(128, 64, 8, 2, 128),
    "128x64, 8 w, 3 st.": Tiles(128, 64, 8, 3),
    "128x32, 8 w, 2 st.": Tiles(128, 32, 8, 2),
    "128x32, 8 w, 2 st., 128 regs": Tiles(128, 32, 8, 2, 128),
    "64x64, 4 w, 2 st.": Tiles(64, 64, 4, 2),
    "64x64, 8 w, 2 st.": Tiles(64, 64, 8, 2),
    "64x32, 8 w, 2 st.": Tiles(64, 32, 8, 2),
    "64x32, 4 w, 2 st.": Tiles(64, 32, 4, 2),
    "64x128, 8 w, 2 st.": Tiles(64, 128, 8, 2),
}
BWD_DKV = {
    "128x64, 8 w, 2 st.": Tiles(128, 64, 8, 2),
    "128x64, 8 w, 1 st.": Tiles(128, 64, 8, 1),
    "64x128, 8 w, 2 st.": Tiles(64, 128, 8, 2),
    "64x128, 8 w, 3 st.": Tiles(64, 128, 8, 3),
    "32x128, 8 w, 2 st.": Tiles(32, 128, 8, 2),
    "32x128, 8 w, 3 st.": Tiles(32, 128, 8, 3),
    "64x64, 8 w, 2 st.": Tiles(64, 64, 8, 2),
    "64x64, 8 w, 2 st., 128 regs": Tiles(64, 64, 8, 2, 128),
    "64x64, 4 w, 2 st.": Tiles(64, 64, 4, 2),
    "32x64, 4 w, 3 st.": Tiles(32, 64, 4, 3),
    "32x64, 4 w, 2 st.": Tiles(32, 64, 4, 2),
    "32x64, 8 w, 2 st.": Tiles(32, 64, 8, 2),
}


def arguments(x: Inputs) -> dict[str, Any]:
    """The keyword arguments that forward and backward share."""
    start = None
    if x.cu_seqlens is not None:
        tokens = packed_tokens(x.cu_seqlens, x.q.shape[1])
        start = tokens.seq_start.int()
    return {"window": x.config.window, "start": start, "scale": x.config.softmax_scale}


def run(x: Inputs) -> dict[str, Tensor]:
    q, k, v = (y.detach() for y in (x.q, *x.window))
    out, lse = window_forward(q, k, v, **arguments(x))
    dq, dk, dv = window_backward(x.dout, q, k, v, out, lse, **arguments(x))
    return {"out": out, "lse.window": lse, "dq": dq, "dwindow.k": dk, "dwindow.v": dv}


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    dtype: torch.dtype
    packed: bool


CHECKS = [
    *(Check(name, torch.bfloat16, packed) for name in CONFIGS for packed in (False, True)),
    *(Check(name, torch.float32, False) for name in ("paper", "small", "192/128", "G 40, D 72")),
    *(Check("paper", dtype, True) for dtype in (torch.float16, torch.float32)),
    Check("paper", torch.float16, False),
]


def check(case: Check) -> str:
    """The largest error over its bound, at most 1 by the accuracy rule, and whether it repeats."""
    cut: dict[str, Any] = {"length": 700}
    if case.packed:
        cut = {"lengths": (0, 300, 31, 1, 0, 370, 64, 5)}
    x = make_inputs(CONFIGS[case.name], **cut, dtype=case.dtype, device="cuda")
    gates = torch.zeros_like(x.gates)
    gates[..., 2] = 1.0
    x = replace(x, gates=gates, block_idx=random_blocks(x, 1))
    want, found, again = expected(x), run(x), run(x)
    ratios = {name: want[name].error(y) / want[name].bound for name, y in found.items()}
    worst = max(ratios, key=lambda name: ratios[name])
    same = all(torch.equal(found[name], again[name]) for name in found)
    return (
        f"{case.name:12s} {str(case.dtype)[6:]:9s} {'packed' if case.packed else 'regular':8s} "
        f"{'ok' if ratios[worst] <= 1 else 'WRONG'}, worst {worst} {ratios[worst]:.2f}, "
        f"twice {'ok' if same else 'WRONG'}"
    )


class Problem:
    """Random tensors of one shape, and the calls to time."""

    def __init__(self, config: NSAConfig, batch: int, length: int) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(heads: int, size: int) -> Tensor:
            shape = (batch, length, heads, size)
            return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

        H, K, D, V = config.num_heads, config.num_kv_heads, config.head_dim, config.dv
        self.q, self.dout = normal(H, D), normal(H, V)
        self.k, self.v = normal(K, D), normal(K, V)
        scale = config.softmax_scale
        self.common: dict[str, Any] = {"window": config.window, "start": None, "scale": scale}
        self.out, self.lse = self.fwd(None)

    def fwd(self, tiles: Tiles | None) -> tuple[Tensor, Tensor]:
        return window_forward(self.q, self.k, self.v, **self.common, tiles=tiles)

    def backward(self, **tiles: Tiles) -> object:
        results = self.out, self.lse
        return window_backward(self.dout, self.q, self.k, self.v, *results, **self.common, **tiles)

    def bwd_dq(self, tiles: Tiles) -> object:
        """dq alone: the other kernel is left out."""
        with without("nsa_window_bwd_dkv"):
            return self.backward(q_tiles=tiles)

    def bwd_dkv(self, tiles: Tiles) -> object:
        """dk and dv alone."""
        with without("nsa_window_bwd_dq"):
            return self.backward(k_tiles=tiles)


class _Nothing:
    """Stands in for a kernel that is not to run."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextmanager
def without(name: str) -> Iterator[None]:
    kernel = getattr(window, name)
    setattr(window, name, _Nothing())
    try:
        yield
    finally:
        setattr(window, name, kernel)


TABLES: dict[str, tuple[dict[str, Tiles], int, int]] = {
    "fwd": (FWD, 1, 1),
    "bwd_dq": (BWD_DQ, 2, 1),
    "bwd_dkv": (BWD_DKV, 2, 2),
}
"""Tiles to try for each kernel, and its matrix products: over D, and over V."""


def attempt(title: str, call: Callable[[], object]) -> str:
    """Why a variant does not compile or run, or nothing."""
    try:
        call()
    except (RuntimeError, triton.errors.TritonError) as error:
        return f"  {title:30s} {type(error).__name__}: {str(error)[:90]}"
    return ""


@torch.no_grad()
def prepare(job: tuple[NSAConfig, str, str]) -> str:
    """Compiles a variant, on a shape with the alignments of the real one."""
    config, kernel, name = job
    problem, tiles = Problem(config, 1, 64), TABLES[kernel][0][name]
    return attempt(f"{kernel} {name}", lambda: getattr(problem, kernel)(tiles))


@torch.no_grad()
def variants(config: NSAConfig, batch: int, length: int) -> None:
    """A table of times for each kernel, and of the whole backward with the default tiles."""
    jobs = [(config, kernel, name) for kernel, (table, *_) in TABLES.items() for name in table]
    side_by_side(prepare, jobs)
    problem = Problem(config, batch, length)
    column = 2.0 * batch * length * config.num_heads * config.window
    for kernel, (table, of_D, of_V) in TABLES.items():
        columns = of_D * config.head_dim + of_V * config.dv
        print(f" {kernel}")
        for name, tiles in table.items():
            call = partial(getattr(problem, kernel), tiles)
            if failure := attempt(name, call):
                print(failure, flush=True)
                continue
            ms = do_bench(call, warmup=50, rep=300, return_mode="median")
            rate = columns * column / ms / 1e9
            print(f"  {name:30s} {ms:8.3f} ms  {rate:5.0f} TFLOP/s", flush=True)
    for name, call in (("forward", partial(problem.fwd, None)), ("backward", problem.backward)):
        ms = do_bench(call, warmup=50, rep=300, return_mode="median")
        print(f" {name}, default tiles: {ms:.3f} ms", flush=True)


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    names = sys.argv[1:] or ["checks", *SHAPES]
    for name in names:
        if name == "checks":
            side_by_side(check, CHECKS)
            continue
        config, batch, length = SHAPES[name]
        heads = f"Hq {config.num_heads}, Hkv {config.num_kv_heads}"
        sizes = f"D {config.head_dim}, V {config.dv}"
        print(f"{name}: B {batch}, {heads}, {sizes}, w {config.window}", flush=True)
        variants(config, batch, length)


if __name__ == "__main__":
    main()
