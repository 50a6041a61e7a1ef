"""Query tiles whose tokens read one list (``select_share``): the list itself is their union.

B batch, T query tokens, K key/value heads, n selected blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor


class SharedLists(NamedTuple):
    """What the kernels read in place of :class:`.union.TileUnions`."""

    tiles: int
    """At most so many."""
    block_idx: Tensor
    """int32 ``[B, T, K, n]``, contiguous; the row of a tile's first token is read."""
    first_tokens: Tensor | None
    """Packed: int32 ``[tiles + 1]``, of each tile; then T. Else tiles stand side by side."""
    seq_start: Tensor | None
    """Packed: int32 ``[T]``."""


def shared_lists(
    block_idx: Tensor, *, tokens: int, start: Tensor | None, sequences: int | None
) -> SharedLists:
    """Tiles of ``tokens`` tokens, which divides ``select_share``, from the start of each sequence.

    ``start`` and ``sequences`` as of :func:`.launch.selected_dkv`.
    """
    T = block_idx.shape[1]
    block_idx = block_idx.contiguous()
    if start is None:
        return SharedLists(triton.cdiv(T, tokens), block_idx, None, None)
    tiles = T if sequences is None else T // tokens + sequences
    token = torch.arange(T, device=start.device)
    begins = (token - start) % tokens == 0
    tile = (begins.cumsum(0) - 1).where(begins, tiles)
    first_tokens = start.new_full((tiles + 1,), T)
    first_tokens.scatter_(0, tile, token.where(begins, T).to(torch.int32))
    return SharedLists(tiles, block_idx, first_tokens, start)
