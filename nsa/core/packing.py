"""Packed sequences: where each token, compressed block and selection block belongs.

Everything is computed on the device of ``cu_seqlens`` with shapes known beforehand; nothing is read
back. A sequence of length zero owns nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsa.config import NSAConfig


class Members(NamedTuple):
    """Items (tokens or blocks) of the packed sequences, one sequence after the other."""

    seq: Tensor
    """int64 ``[items]``, the sequence of each item; n_seq for a surplus item."""
    rank: Tensor
    """int64 ``[items]``, its number within that sequence."""
    starts: Tensor
    """int64 ``[n_seq + 1]``, the first item of each sequence."""


def members(starts: Tensor, items: int) -> Members:
    """Distributes ``items`` items over sequences that begin at ``starts`` (int64, ascending)."""
    item = torch.arange(items, device=starts.device)
    # of all starts, not of a slice: Inductor of torch 2.11 cannot search a view
    seq = torch.searchsorted(starts, item, right=True) - 1
    return Members(seq, item - starts[seq], starts)


def token_members(cu_seqlens: Tensor, total: int) -> Members:
    """The sequence and position of each of ``total`` tokens; cu_seqlens int32 ``[n_seq + 1]``."""
    return members(cu_seqlens.long(), total)


def compressed_members(cu_seqlens: Tensor, rows: int, config: NSAConfig) -> Members:
    """The sequence and number of each of ``rows`` compressed blocks (surplus rows included)."""
    length = cu_seqlens.long().diff()
    full = (length - config.compress_block).div(config.compress_stride, rounding_mode="floor") + 1
    return members(_starts(full.clamp_min(0)), rows)


def select_members(cu_seqlens: Tensor, total: int, config: NSAConfig) -> Members:
    """The sequence and number of each selection block; as many items as can ever be needed."""
    length = cu_seqlens.long().diff()
    touched = (length + config.select_block - 1).div(config.select_block, rounding_mode="floor")
    items = total // config.select_block + length.numel()
    return members(_starts(touched), items)


def block_places(
    cu_seqlens: Tensor, total: int, rows: int, config: NSAConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How ``total`` tokens and ``rows`` compressed blocks stand to each other, as kernels want it.

    Returns:
        start, int32 ``[total]``: the first compressed block of each token's sequence; first, int32
        ``[total]``: the first token of it; seen_from and seen_until, int32 ``[rows]``: the first
        token that sees each block, and the one past the last; ``total`` for a surplus one.
    """
    token, row = token_members(cu_seqlens, total), compressed_members(cu_seqlens, rows, config)
    real = row.seq < cu_seqlens.numel() - 1
    first = cu_seqlens.long()[row.seq] + row.rank * config.compress_stride
    seen_from = (first + config.compress_block - 1).where(real, total)
    seen_until = cu_seqlens.long()[(row.seq + 1).clamp_max(cu_seqlens.numel() - 1)]
    return (
        row.starts[token.seq].to(torch.int32),
        token.starts[token.seq].to(torch.int32),
        seen_from.to(torch.int32),
        seen_until.where(real, total).to(torch.int32),
    )


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
