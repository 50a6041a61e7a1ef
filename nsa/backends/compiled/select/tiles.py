"""How the selection kernel is cut: chosen on an H100."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton import next_power_of_2


@dataclass(frozen=True, slots=True)
class SelectTiles:
    """How one launch of the kernel is cut."""

    rows: int
    """Tokens times heads of a group (a power of two each) in a program."""
    blocks: int
    """Selection blocks of a chunk, a power of two; at least n."""
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    """Registers of a thread; None leaves it to the compiler."""
    halo: str = "shift"
    """How the part of a score that comes from the block before gets in: "shift" moves it over by
    one column; "recompute" multiplies the l/d - 1 last keys of that block once more."""


def select_tiles(
    dtype: torch.dtype, group: int, key_size: int, num_selected: int, num_blocks: int
) -> SelectTiles:
    """Tiles for sm_90: dtype of q, G, D, n, and at least as many blocks as a sequence has."""
    least = max(16, next_power_of_2(num_selected))
    most = max(least, next_power_of_2(max(1, num_blocks)))
    if dtype == torch.float32:  # no tensor cores: the tiles are what the registers hold
        return SelectTiles(32, min(most, max(32, least)), num_warps=4, num_stages=2)
    blocks = min(most, max(64, least))
    if key_size > 128:
        return SelectTiles(128, blocks, num_warps=8, num_stages=2)
    if group < 8:  # many tokens in a tile, each with a list of its own
        return SelectTiles(64, min(most, least), num_warps=4, num_stages=3)
    # two programs to a multiprocessor: one multiplies while the other exponentiates
    return SelectTiles(128, blocks, num_warps=8, num_stages=3, maxnreg=128)
