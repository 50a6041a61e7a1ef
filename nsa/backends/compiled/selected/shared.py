"""What the kernels read where consecutive tokens have one list (``select_share``).

A query tile's union is the list itself, and the inverse index has an entry for all that share.

B batch, T query tokens, K key/value heads, n selected blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from nsa.backends.compiled.selected.inverse_index import InverseIndex, inverse_index


class SharedLists(NamedTuple):
    """In place of :class:`.union.TileUnions`."""

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
    first = _first_tokens(T, tokens, start, sequences)
    return SharedLists(len(first) - 1, block_idx, first, start)


def shared_index(
    block_idx: Tensor,
    *,
    share: int,
    key_rows: int,
    start: Tensor | None,
    select_block: int,
    chunk: int,
    ordered: bool = False,
    sequences: int | None,
) -> InverseIndex:
    """The inverse index of the first of every ``share`` tokens, each entry for all of them.

    Arguments as of :func:`.inverse_index.inverse_index`.
    """
    T = block_idx.shape[1]
    if start is None:
        size = triton.cdiv(T, share) + 1
        first = torch.arange(size, device=block_idx.device, dtype=torch.int32) * share
        first = first.clamp_max(T)
    else:
        first = _first_tokens(T, share, start, sequences)
    row, L = first[:-1].long().clamp_max(T - 1), len(first) - 1
    lists = block_idx[:, row].where((first[:-1] < T)[:, None, None], -1)
    index = inverse_index(
        lists,
        key_rows=key_rows,
        start=None if start is None else start[row],
        select_block=select_block,
        chunk=max(1, chunk // share),
        ordered=ordered,
        q_start=_FAR,
        sequences=sequences,
    )
    b, leader = index.tokens // L, (index.tokens % L).long()
    tokens, ends = b * T + first[leader], None
    if start is not None or T % share:
        ends = b * T + first[leader + 1]
    return index._replace(tokens=tokens, ends=ends, share=share)


_FAR = 2**30
"""A position past all blocks: lists that are shared have no block that is not seen."""


def _first_tokens(T: int, tokens: int, start: Tensor, sequences: int | None) -> Tensor:
    """int32: of every ``tokens`` tokens of each packed sequence, ascending; then T, at least
    once."""
    count = T if sequences is None else T // tokens + sequences
    token = torch.arange(T, device=start.device)
    begins = (token - start) % tokens == 0
    number = (begins.cumsum(0) - 1).where(begins, count)
    first = start.new_full((count + 1,), T)
    return first.scatter_(0, number, token.where(begins, T).to(torch.int32))
