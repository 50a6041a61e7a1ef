"""One list for m consecutive queries: that of the first of them (``select_share``)."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.core.packing import counted_offsets, packed_items, packed_tokens


def first_sharers(
    T: int, config: NSAConfig, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """int64 ``[T]``, the row of the query whose list each query reads.

    The first row stands at a multiple of m in its sequence.
    """
    row = torch.arange(T, device=device)
    position = row if cu_seqlens is None else packed_tokens(cu_seqlens, T).position
    return row - position % config.select_share


def leading_tokens(T: int, config: NSAConfig, cu_seqlens: Tensor) -> Tensor:
    """int64 ``[T//m + n_seq + 1]``: the first of every m tokens of each packed sequence, ascending,
    then T, at least once."""
    m, n_seq = config.select_share, cu_seqlens.numel() - 1
    counts = (cu_seqlens.long().diff() + m - 1).div(m, rounding_mode="floor")
    leader = packed_items(counted_offsets(counts), T // m + n_seq + 1)
    token = cu_seqlens.long()[leader.seq_id] + leader.position * m
    return token.where(leader.seq_id < n_seq, T)
