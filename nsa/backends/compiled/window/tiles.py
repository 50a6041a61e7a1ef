"""Tiles of the kernels of window and compressed branch: one row per GPU and head sizes.

The group size G does not matter: rows of a tile are tokens times heads of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from nsa.backends.compiled.tiling import (
    SM_90,
    UNTUNED,
    Capability,
    capability_of,
    head_columns,
    next_power_of_2,
    shared_bytes,
    stage_buffers,
)


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
    measured: str
    """The device, dtype and G that they were timed with, or :data:`UNTUNED`."""


FP32 = WindowTiles(  # no tensor cores: the tiles are what the registers hold
    fwd=Tiles(32, 32, num_warps=4, num_stages=1),
    bwd_dq=Tiles(32, 32, num_warps=8, num_stages=1),
    bwd_dkv=Tiles(32, 32, num_warps=8, num_stages=1),
    measured=UNTUNED,
)
UP_TO_256 = WindowTiles(
    fwd=Tiles(128, 64, num_warps=8, num_stages=2),
    bwd_dq=Tiles(64, 64, num_warps=8, num_stages=2),
    bwd_dkv=Tiles(32, 64, num_warps=8, num_stages=2),  # more rows spill in the loops
    measured=UNTUNED,
)
LARGER = WindowTiles(
    fwd=Tiles(64, 32, num_warps=8, num_stages=1),
    bwd_dq=Tiles(64, 32, num_warps=8, num_stages=1),
    bwd_dkv=Tiles(32, 64, num_warps=8, num_stages=1),
    measured=UNTUNED,
)
PAPER = WindowTiles(
    fwd=Tiles(128, 64, num_warps=8, num_stages=3),
    bwd_dq=Tiles(64, 32, num_warps=4, num_stages=2),
    bwd_dkv=Tiles(32, 128, num_warps=8, num_stages=3),
    measured="H100, bf16, G 16",
)
TILES = {
    (SM_90, 64, 64): WindowTiles(
        fwd=Tiles(128, 64, num_warps=4, num_stages=3),
        bwd_dq=Tiles(64, 32, num_warps=4, num_stages=3),
        bwd_dkv=Tiles(64, 64, num_warps=4, num_stages=3),
        measured="H100, bf16, G 6",
    ),
    # forward and dq: two programs to a multiprocessor, one multiplies while the other exponentiates
    (SM_90, 128, 128): WindowTiles(
        fwd=Tiles(128, 64, num_warps=8, num_stages=2, maxnreg=128),
        bwd_dq=Tiles(128, 32, num_warps=8, num_stages=2, maxnreg=128),
        bwd_dkv=Tiles(64, 128, num_warps=8, num_stages=3),
        measured="H100, bf16, G 16",
    ),
    (SM_90, 192, 128): PAPER,
    (SM_90, 256, 256): UP_TO_256,
}
"""fp16 and bf16, by compute capability, D and V; ``bench --tune`` prints a row to add."""
TILES |= {(SM_90, size, size): TILES[SM_90, 128, 128] for size in (80, 96)}


def tile_row(dtype: torch.dtype, D: int, V: int, capability: Capability = SM_90) -> WindowTiles:
    """The row of this GPU and of head sizes D and V; else, as untuned, an H100's: of these heads,
    or of the next larger square ones."""
    if dtype == torch.float32:
        return FP32
    if (capability, D, V) in TILES:
        return TILES[capability, D, V]
    squares = (size for size in (64, 128, 256) if max(D, V) <= size)
    sizes = ((D, V), *((size, size) for size in squares))
    found = (TILES[SM_90, K, E] for K, E in sizes if (SM_90, K, E) in TILES)
    return replace(next(found, LARGER), measured=UNTUNED)


def fitted(
    row: WindowTiles, dtype: torch.dtype, D: int, V: int, capability: Capability
) -> WindowTiles:
    """The row, with less of everything in each launch until it fits in shared memory: a step's
    loads still overlap the step before as long as there are more than 32 rows of anything."""
    key, value = head_columns(D), head_columns(V)

    def fit(tiles: Tiles, held: str, held_size: int, step: str) -> Tiles:
        """``held`` rows stay there, of so many elements; ``step`` rows of a key and a value, for
        every stage."""
        while True:
            stays = getattr(tiles, held) * held_size
            buffers = stage_buffers(tiles.num_stages, capability)
            steps = getattr(tiles, step) * (key + value) * buffers
            if (stays + steps) * dtype.itemsize <= shared_bytes(capability):
                return tiles
            larger = max(step, held, key=lambda name: getattr(tiles, name))
            rows = getattr(tiles, larger)
            if tiles.num_stages > 2 or (rows <= 32 and tiles.num_stages > 1):
                tiles = replace(tiles, num_stages=tiles.num_stages - 1)
            elif rows > 16:
                tiles = replace(tiles, **{larger: rows // 2})
            else:
                return tiles

    return replace(
        row,
        fwd=fit(row.fwd, "block_m", key, "block_n"),
        bwd_dq=fit(row.bwd_dq, "block_m", key + value, "block_n"),
        bwd_dkv=fit(row.bwd_dkv, "block_n", key + value, "block_m"),
    )


@lru_cache(256)
def tiles_for(dtype: torch.dtype, D: int, V: int, capability: Capability = SM_90) -> WindowTiles:
    """Tiles for a GPU: :func:`tile_row`, :func:`fitted`."""
    return fitted(tile_row(dtype, D, V, capability), dtype, D, V, capability)


def default_tiles(q: Tensor, v: Tensor) -> WindowTiles:
    """:func:`tiles_for` q ``[B, T, H, D]`` and v ``[B, S, K, V]``."""
    return tiles_for(q.dtype, q.shape[3], v.shape[3], capability_of(q.device))


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
