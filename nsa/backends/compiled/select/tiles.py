"""Tiles of the selection kernel: one row per GPU and shape, in :data:`ROWS`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nsa.backends.compiled.tiling import (
    SM_90,
    UNTUNED,
    Capability,
    head_columns,
    next_power_of_2,
    shared_bytes,
    stage_buffers,
)


@dataclass(frozen=True, slots=True)
class SelectTiles:
    """How one launch of the kernel is tiled."""

    rows: int
    """Tokens times heads of a group (a power of two each) in a program."""
    blocks: int
    """Selection blocks of a step, a power of two; at least n."""
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    """Registers of a thread; None leaves it to the compiler."""


@dataclass(frozen=True, slots=True)
class SearchTiles:
    """How one launch of :mod:`.regions` is tiled."""

    keys: int
    """Compressed keys of a step, a power of two."""
    chunk: int
    """Those whose probabilities are held at a time, a power of two; more if one block needs more.
    Regions in excess of it take another pass."""
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    """Registers of a thread; None leaves it to the compiler."""


@dataclass(frozen=True, slots=True)
class Row:
    """Tiles of one shape, before they are fitted to n and the length of the sequences."""

    D: int
    G: int
    fp32: bool
    tiles: SelectTiles
    measured: str
    """The device and dtype that it was timed with, or :data:`UNTUNED`."""
    capability: Capability = SM_90


# Two programs to a multiprocessor: one multiplies while the other exponentiates.
LARGE_GROUP = Row(128, 16, False, SelectTiles(128, 64, 8, 3, maxnreg=128), "H100, bf16")
# Many tokens in a tile, each with a list of its own: few blocks a step.
SMALL_GROUP = Row(64, 6, False, SelectTiles(64, 16, 4, 3), "H100, bf16")
LARGE_HEAD = Row(192, 16, False, SelectTiles(128, 64, 8, 2), UNTUNED)
# No tensor cores: the tiles are what the registers hold.
FP32 = Row(128, 16, True, SelectTiles(32, 32, 4, 2), UNTUNED)
ROWS = (LARGE_GROUP, SMALL_GROUP, LARGE_HEAD, FP32)
"""A shape without a row of its own gets one by :func:`tile_row`'s rule; ``bench --tune`` prints a
row to add."""


# Untuned from here on. The scales of e4m3 keys take registers: three smaller programs, no spills.
FP8_LARGE_GROUP = SelectTiles(64, 64, 4, 3, maxnreg=168)
# One warp: nothing waits for another. The chunk holds all keys of the usual regions.
SEARCH = SearchTiles(64, 512, 1, 2)
SEARCH_FP32 = SearchTiles(16, 512, 4, 2)


def tile_row(dtype: torch.dtype, D: int, G: int, capability: Capability = SM_90) -> Row:
    """The row of this GPU and shape; else, as untuned, an H100's: of the shape, or the nearest by
    dtype, head size and group."""
    fp32 = dtype == torch.float32
    for of in dict.fromkeys((capability, SM_90)):
        for row in ROWS:
            if (row.D, row.G, row.fp32, row.capability) == (D, G, fp32, of):
                return row if of == capability else replace(row, measured=UNTUNED)
    small = SMALL_GROUP if G < 8 else LARGE_GROUP
    nearest = FP32 if fp32 else LARGE_HEAD if D > 128 else small
    return replace(nearest, D=D, G=G, measured=UNTUNED)


def select_tiles(
    dtype: torch.dtype,
    group: int,
    key_size: int,
    num_selected: int,
    num_blocks: int,
    *,
    fp8: bool = False,
    capability: Capability = SM_90,
    row: Row | None = None,
) -> SelectTiles:
    """Tiles for a GPU: dtype of q, G, D, n, at least as many blocks as a sequence has, and whether
    scores are of e4m3. ``row``: in place of :func:`tile_row`'s."""
    tiles = (row or tile_row(dtype, key_size, group, capability)).tiles
    if fp8 and tiles == LARGE_GROUP.tiles:
        tiles = FP8_LARGE_GROUP
    least = max(16, next_power_of_2(num_selected))
    most = max(least, next_power_of_2(num_blocks))
    tiles = replace(tiles, blocks=min(most, max(tiles.blocks, least)))
    row_bytes = head_columns(key_size) * dtype.itemsize
    while True:
        keys = tiles.blocks * stage_buffers(tiles.num_stages, capability)
        if (tiles.rows + keys) * row_bytes <= shared_bytes(capability):
            return tiles
        if tiles.num_stages > 1:
            tiles = replace(tiles, num_stages=tiles.num_stages - 1)
        elif tiles.rows > 16:
            tiles = replace(tiles, rows=tiles.rows // 2)
        else:
            return tiles


def search_tiles(dtype: torch.dtype) -> SearchTiles:
    """Tiles of :mod:`.regions`, chosen on an H100: dtype of q."""
    return SEARCH_FP32 if dtype == torch.float32 else SEARCH


@dataclass(frozen=True, slots=True)
class Constants:
    """Compile-time constants of a launch, one argument of the kernel."""

    G: int
    D: int
    COMPRESS_BLOCK: int
    COMPRESS_STRIDE: int
    SELECT_BLOCK: int
    NUM_SELECTED: int
    NUM_INITIAL: int
    NUM_LOCAL: int
    PACKED: bool
    IEEE: bool
    """Whether scores are fp32 products."""
    TOKENS: int
    """Tokens of a tile; its rows are these times BLOCK_GROUP."""
    BLOCK_GROUP: int
    """G, padded to a power of two."""
    BLOCK_N: int
    """Selection blocks of a step, and so the keys of one product; in a search: its keys."""
    BLOCK_D: int
    """D, padded, as of :func:`.tiling.head_columns`."""
    SLOTS: int
    """n, padded to a power of two."""
    SHARE: int = 1
    """Tokens that read one list, m."""
    SCHEDULE: tuple[tuple[int, int], ...] = ()
    """``select_schedule``, the last pair first."""
    ENOUGH: float | None = None
    """The score at which a list ends; None: nowhere."""
    FP8: bool = False
    """Whether k is e4m3 with a scale for each row, and q to be rounded likewise."""
    REGION: int = 0
    """Blocks of a region, r; 0: no regions."""
    NUM_REGIONS: int = 0
    """Regions that are chosen, k."""
    CHUNK: int = 0
    """Of :class:`SearchTiles`."""

    def keys_of(self, blocks: int) -> int:
        """Compressed blocks that overlap so many consecutive ones."""
        return (blocks * self.SELECT_BLOCK + self.COMPRESS_BLOCK) // self.COMPRESS_STRIDE - 1

    @property
    def PIECE(self) -> int:
        """Blocks that a search reads as one: the largest divisor of r whose keys fit a chunk."""
        sizes = (x for x in range(self.REGION, 1, -1) if self.REGION % x == 0)
        return next((x for x in sizes if self.keys_of(x) <= self.CHUNK), 1)

    @property
    def PIECE_KEYS(self) -> int:
        """Keys of a piece."""
        return self.keys_of(self.PIECE)

    @property
    def PIECES(self) -> int:
        """Pieces of a chunk."""
        return self.CHUNK // self.PIECE_KEYS

    @property
    def CHUNK_BLOCKS(self) -> int:
        """Blocks of a chunk or of a list, whichever are more, padded to a power of two."""
        return max(self.SLOTS, next_power_of_2(self.PIECES * self.PIECE))

    @property
    def PRECISION(self) -> str:
        """Of products of fp32; no effect on 16 bits."""
        return "ieee" if self.IEEE else "tf32"

    @property
    def SCORES_EARLY(self) -> bool:
        """Whether queries with fewer candidates than forced blocks are scored, too."""
        return self.ENOUGH is not None or self.REGION > 0
