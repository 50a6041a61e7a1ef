"""How the window's kernels are cut: chosen on an H100, for G = 16 and D = 128, G = 6 and D = 64."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class WindowTiles:
    """How one launch is cut; powers of two."""

    rows: int
    """Tokens times heads of a group."""
    keys: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    """Registers of a thread; None leaves it to the compiler."""


def forward_tiles(dtype: torch.dtype, size: int) -> WindowTiles:
    """Tiles of the forward kernel on sm_90; size is the larger of D and V."""
    if dtype == torch.float32:  # no tensor cores: the tiles are what the registers hold
        return WindowTiles(32, 32, num_warps=4, num_stages=1)
    if size > 256:
        return WindowTiles(64, 32, num_warps=8, num_stages=1)
    if size > 128:
        return WindowTiles(128, 64, num_warps=8, num_stages=2)
    if size <= 64:
        return WindowTiles(128, 64, num_warps=4, num_stages=3)
    # two programs to a multiprocessor: one multiplies while the other exponentiates
    return WindowTiles(128, 64, num_warps=8, num_stages=2, maxnreg=128)


def query_gradient_tiles(dtype: torch.dtype, size: int) -> WindowTiles:
    """Tiles of the kernel for dq."""
    if dtype == torch.float32:
        return WindowTiles(32, 32, num_warps=8, num_stages=1)
    if size > 256:
        return WindowTiles(64, 32, num_warps=8, num_stages=1)
    if size > 128:
        return WindowTiles(64, 64, num_warps=8, num_stages=2)
    if size <= 64:
        return WindowTiles(64, 32, num_warps=4, num_stages=3)
    return WindowTiles(128, 32, num_warps=8, num_stages=2, maxnreg=128)


def key_gradient_tiles(dtype: torch.dtype, size: int) -> WindowTiles:
    """Tiles of the kernel for dk and dv."""
    if dtype == torch.float32:
        return WindowTiles(32, 32, num_warps=8, num_stages=1)
    if size > 256:
        return WindowTiles(32, 64, num_warps=8, num_stages=1)
    if size > 128:
        return WindowTiles(64, 64, num_warps=8, num_stages=2)
    if size <= 64:
        return WindowTiles(64, 64, num_warps=4, num_stages=3)
    return WindowTiles(64, 128, num_warps=8, num_stages=3)
