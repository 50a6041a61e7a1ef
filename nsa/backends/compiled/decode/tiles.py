"""How the three launches of a step are tiled, and their compile-time constants.

What is summed in which order for a sequence is the same alone and in a batch, bit for bit: a larger
batch has the same units and groups (:mod:`.parts`), only fewer programs for each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nsa.backends.compiled.tiling import (
    SM_90,
    Capability,
    next_power_of_2,
    padded,
    shared_bytes,
)

MOST_SPLITS = 64
"""Of the compressed keys; longer caches have longer splits."""
FOLD = 4
"""Units of a group."""
ENOUGH_PROGRAMS = 132
"""With fewer groups, every unit is a program of its own."""
MOST_ROWS = 64
"""Query rows of a program: queries times heads of a group. More take several programs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTiles:
    """A launch that reads keys and values."""

    keys: int
    """Keys of a group, which is one program where there are enough of them."""
    block_n: int
    """Keys of a step, a power of two from 16."""
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, slots=True)
class Split:
    """How keys are shared between programs, a part for each."""

    groups: int
    unit: int
    """Keys, or listed blocks, of a unit."""
    fold: int
    """Parts of a group, FOLD or 1."""

    @property
    def part(self) -> int:
        """Keys, or listed blocks, of a part."""
        return self.unit * FOLD // self.fold

    @property
    def parts(self) -> int:
        """Of all keys."""
        return self.groups * self.fold

    @classmethod
    def of(cls, count: int, group: int, programs: int, multiple: int = 1) -> Split:
        """Of ``count`` keys in groups of about so many, for each of ``programs``; units are
        multiples of ``multiple``."""
        unit = multiple * max(1, group // FOLD // multiple)
        groups = max(1, -(-count // (unit * FOLD)))
        return cls(groups, unit, FOLD if groups * programs < ENOUGH_PROGRAMS else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTiles:
    """The launches of a step."""

    compressed: KeyTiles
    window: KeyTiles
    selected: KeyTiles
    select_blocks: int = 128
    """Selection blocks that a program scores at a time, a power of two."""
    select_programs: int = 512
    """Programs that rank blocks, at most so many if there are fewer queries times heads."""
    overlap: bool = False
    """Whether launches start before the one before has ended, where the GPU can do that."""


DEFAULT = DecodeTiles(
    compressed=KeyTiles(keys=512, block_n=64),
    window=KeyTiles(keys=512, block_n=64),
    selected=KeyTiles(keys=512, block_n=64),
)
"""fp16 and bf16."""
_FP32 = KeyTiles(keys=512, block_n=32, num_warps=8, num_stages=2)
FP32 = DecodeTiles(compressed=_FP32, window=_FP32, selected=_FP32)


def tiles_for(
    dtype: torch.dtype,
    D: int,
    V: int,
    *,
    compressed: int,
    ratio: int,
    rows: int,
    capability: Capability = SM_90,
) -> DecodeTiles:
    """An H100's tiles, as far as they fit a GPU: dtype and sizes of heads, compressed keys N, how
    many of them begin in a selection block, query rows of a program."""
    tiles = FP32 if dtype == torch.float32 else DEFAULT
    keys = max(tiles.compressed.keys, next_power_of_2(-(-compressed // MOST_SPLITS)))
    most = shared_bytes(capability)
    row_bytes = (padded(D) + padded(V)) * dtype.itemsize

    def fitted(launch: KeyTiles, least: int = 16) -> KeyTiles:
        n, stages = max(launch.block_n, least), launch.num_stages
        while (n * stages + rows) * row_bytes > most and (n, stages) != (least, 1):
            n, stages = (n, stages - 1) if stages > 1 else (n // 2, 1)
        return replace(launch, block_n=n, num_stages=stages)

    return replace(
        tiles,
        compressed=replace(fitted(tiles.compressed, max(16, next_power_of_2(ratio))), keys=keys),
        window=fitted(tiles.window),
        selected=fitted(tiles.selected),
    )


@dataclass(frozen=True, slots=True)
class Constants:
    """Compile-time constants of all three launches; S queries of a sequence."""

    S: int
    G: int
    D: int
    V: int
    COMPRESS_BLOCK: int
    COMPRESS_STRIDE: int
    SELECT_BLOCK: int
    NUM_SELECTED: int
    NUM_INITIAL: int
    NUM_LOCAL: int
    SCHEDULE: tuple[tuple[int, int], ...]
    """``select_schedule``, the last pair first."""
    ENOUGH: float | None
    """The score at which a list ends; None: nowhere."""
    RATIO: int
    """Compressed blocks that begin in a selection block, R = l'/d."""
    WIDE: int
    """R, padded to a power of two."""
    TILE_BLOCKS: int
    """Selection blocks of a step of the compressed branch, so of TILE_BLOCKS * R keys."""
    SLOTS: int
    """n, padded to a power of two."""
    BLOCK_M: int
    """Query rows of a program of the compressed branch."""
    BLOCK_GROUP: int
    """Query rows of a program of one query: G, padded to what a matrix product takes."""
    BLOCK_D: int
    BLOCK_DV: int
    PRECISION: str
    """Of products of fp32; no effect on 16 bits."""
    OVERLAP: bool
    """Whether launches start before the one before has ended (sm90 and later)."""
    TOKENS: int = 1
    """Of a list, as :mod:`..select.topn` has it."""

    @property
    def ROWS(self) -> int:
        """Query rows of a sequence and key/value head: row s*G + g."""
        return self.S * self.G

    @property
    def SCORES_EARLY(self) -> bool:
        """Whether queries with fewer candidates than forced blocks are scored, too."""
        return self.ENOUGH is not None
