"""Tiles of the kernels of window and compressed branch: a table by head sizes and dtype.

The group size G does not matter: rows of a tile are tokens times heads of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from nsa.backends.compiled.tiling import head_columns, next_power_of_2


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of one launch; powers of two."""

    block_m: int
    """Query rows: tokens times heads of a group."""
    block_n: int
    """Keys."""
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    """Registers of a thread; None leaves it to the compiler."""


@dataclass(frozen=True, slots=True)
class WindowTiles:
    """Tiles of the three kernels."""

    fwd: Tiles
    bwd_dq: Tiles
    bwd_dkv: Tiles
    tuned: str
    """What they were measured on, or "untuned"."""


FP32 = WindowTiles(  # no tensor cores: the tiles are what the registers hold
    fwd=Tiles(32, 32, num_warps=4, num_stages=1),
    bwd_dq=Tiles(32, 32, num_warps=8, num_stages=1),
    bwd_dkv=Tiles(32, 32, num_warps=8, num_stages=1),
    tuned="untuned",
)
UP_TO_256 = WindowTiles(
    fwd=Tiles(128, 64, num_warps=8, num_stages=2),
    bwd_dq=Tiles(64, 64, num_warps=8, num_stages=2),
    bwd_dkv=Tiles(32, 64, num_warps=8, num_stages=2),  # more rows spill in the loops
    tuned="untuned",
)
LARGER = WindowTiles(
    fwd=Tiles(64, 32, num_warps=8, num_stages=1),
    bwd_dq=Tiles(64, 32, num_warps=8, num_stages=1),
    bwd_dkv=Tiles(32, 64, num_warps=8, num_stages=1),
    tuned="untuned",
)
PAPER = WindowTiles(
    fwd=Tiles(128, 64, num_warps=8, num_stages=3),
    bwd_dq=Tiles(64, 32, num_warps=4, num_stages=2),
    bwd_dkv=Tiles(32, 128, num_warps=8, num_stages=3),
    tuned="H100, bf16, G 16",
)
TILES = {
    (64, 64): WindowTiles(
        fwd=Tiles(128, 64, num_warps=4, num_stages=3),
        bwd_dq=Tiles(64, 32, num_warps=4, num_stages=3),
        bwd_dkv=Tiles(64, 64, num_warps=4, num_stages=3),
        tuned="H100, bf16, G 6",
    ),
    # forward and dq: two programs to a multiprocessor, one multiplies while the other exponentiates
    (128, 128): WindowTiles(
        fwd=Tiles(128, 64, num_warps=8, num_stages=2, maxnreg=128),
        bwd_dq=Tiles(128, 32, num_warps=8, num_stages=2, maxnreg=128),
        bwd_dkv=Tiles(64, 128, num_warps=8, num_stages=3),
        tuned="H100, bf16, G 16",
    ),
    (192, 128): PAPER,
    (256, 256): UP_TO_256,
}
"""fp16 and bf16, by D and V."""
TILES |= {(size, size): TILES[128, 128] for size in (80, 96)}


@lru_cache(256)
def tiles_for(dtype: torch.dtype, D: int, V: int) -> WindowTiles:
    """The row of head sizes D and V; without one, that of the next larger square heads."""
    if dtype == torch.float32:
        return FP32
    larger = (TILES[size, size] for size in (64, 128, 256) if max(D, V) <= size)
    return TILES.get((D, V)) or next(larger, LARGER)


@dataclass(frozen=True, slots=True)
class Constants:
    """Compile-time constants of a launch, one argument of every kernel."""

    G: int
    """Heads per group."""
    D: int
    V: int
    TOKENS: int
    """Tokens of a tile of queries."""
    BLOCK_M: int
    """Query rows of a tile, at least TOKENS * G."""
    BLOCK_N: int
    """Keys of a tile."""
    BLOCK_D: int
    """D, padded, as of :func:`.tiling.head_columns`."""
    BLOCK_DV: int
    PACKED: bool
    PRECISION: str
    """Of products of fp32; no effect on 16 bits."""


def constants(q: Tensor, v: Tensor, tiles: Tiles, *, packed: bool) -> Constants:
    """Those of q ``[B, T, H, D]`` and v ``[B, S, K, V]``."""
    G, D, V = q.shape[2] // v.shape[2], q.shape[3], v.shape[3]
    block_m = max(tiles.block_m, next_power_of_2(G))
    return Constants(
        G=G,
        D=D,
        V=V,
        TOKENS=block_m // G,
        BLOCK_M=block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_D=head_columns(D),
        BLOCK_DV=head_columns(V),
        PACKED=packed,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )
