"""Packed sequences: where each token, compressed block and selection block belongs.

Everything is computed on the device of ``cu_seqlens`` with shapes known beforehand; nothing is read
back. A sequence of length zero owns nothing.

These are dozens of small kernels, whose results several steps of a call need: within
:func:`packing_kept` each is computed once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from nsa.config import NSAConfig

_KEPT: ContextVar[dict[Hashable, Any] | None] = ContextVar("nsa_packing_kept", default=None)
_Result = TypeVar("_Result")


def packing_kept(cu_seqlens: Tensor | None) -> AbstractContextManager[None]:
    """Keep results for the calls within, in which nobody writes to ``cu_seqlens``.

    Within another one, that one's are used. Graphs of ``torch.compile`` do without.
    """
    if cu_seqlens is None or torch.compiler.is_compiling() or _KEPT.get() is not None:
        return nullcontext()
    return _keep()


@contextmanager
def _keep() -> Iterator[None]:
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


def _once(function: Callable[..., _Result]) -> Callable[..., _Result]:
    @functools.wraps(function)
    def call(cu_seqlens: Tensor, *args: Hashable) -> _Result:
        kept = None if torch.compiler.is_compiling() else _KEPT.get()
        if kept is None:
            return function(cu_seqlens, *args)
        key = function, id(cu_seqlens), args
        if key not in kept:
            # with cu_seqlens, so that its id stays its own
            kept[key] = cu_seqlens, function(cu_seqlens, *args)
        result: _Result = kept[key][1]
        return result

    return call


class PackedItems(NamedTuple):
    """Tokens or blocks of the packed sequences, one sequence after the other."""

    seq_id: Tensor
    """int64 ``[items]``, the sequence of each item; n_seq for a surplus item."""
    position: Tensor
    """int64 ``[items]``, its number within that sequence."""
    offsets: Tensor
    """int64 ``[n_seq + 1]``, the first item of each sequence."""

    @property
    def seq_start(self) -> Tensor:
        """int64 ``[items]``, the first item of each item's sequence."""
        return self.offsets[self.seq_id]


def packed_items(offsets: Tensor, items: int) -> PackedItems:
    """Distributes ``items`` items over sequences with these offsets (int64, ascending)."""
    item = torch.arange(items, device=offsets.device)
    # of all offsets, not of a slice: Inductor of torch 2.11 cannot search a view
    seq_id = torch.searchsorted(offsets, item, right=True) - 1
    return PackedItems(seq_id, item - offsets[seq_id], offsets)


@_once
def packed_tokens(cu_seqlens: Tensor, total: int) -> PackedItems:
    """The sequence and position of each of ``total`` tokens; cu_seqlens int32 ``[n_seq + 1]``."""
    return packed_items(cu_seqlens.long(), total)


@_once
def sequence_starts(cu_seqlens: Tensor, total: int) -> Tensor:
    """int32 ``[total]``, the first token of each token's sequence."""
    return packed_tokens(cu_seqlens, total).seq_start.to(torch.int32)


@_once
def block_offsets(cu_seqlens: Tensor, config: NSAConfig) -> Tensor:
    """int64 ``[n_seq + 1]``, the first compressed block of each sequence, then their number."""
    length = cu_seqlens.long().diff()
    full = (length - config.compress_block).div(config.compress_stride, rounding_mode="floor") + 1
    return counted_offsets(full.clamp_min(0))


@_once
def packed_blocks(cu_seqlens: Tensor, rows: int, config: NSAConfig) -> PackedItems:
    """The sequence and number of each of ``rows`` compressed blocks (surplus rows included)."""
    return packed_items(block_offsets(cu_seqlens, config), rows)


@_once
def packed_select_blocks(cu_seqlens: Tensor, total: int, size: int) -> PackedItems:
    """The sequence and number of each selection block of ``size`` tokens; as many items as can
    ever be needed."""
    length = cu_seqlens.long().diff()
    touched = (length + size - 1).div(size, rounding_mode="floor")
    items = total // size + length.numel()
    return packed_items(counted_offsets(touched), items)


class BlockBounds(NamedTuple):
    """How packed tokens and compressed blocks stand to each other, as kernels want it (int32)."""

    cmp_seq_start: Tensor
    """``[T]``, the first compressed block of each token's sequence."""
    seq_start: Tensor
    """``[T]``, the first token of each token's sequence."""
    seen_from: Tensor
    """``[N]``, the first token that sees each block; T for a surplus one."""
    seen_until: Tensor
    """``[N]``, the token past the last that sees each block; T for a surplus one."""


@_once
def block_bounds(cu_seqlens: Tensor, total: int, rows: int, config: NSAConfig) -> BlockBounds:
    """The bounds of ``total`` tokens and ``rows`` compressed blocks."""
    token, row = packed_tokens(cu_seqlens, total), packed_blocks(cu_seqlens, rows, config)
    real = row.seq_id < cu_seqlens.numel() - 1
    first = cu_seqlens.long()[row.seq_id] + row.position * config.compress_stride
    seen_from = (first + config.compress_block - 1).where(real, total)
    seen_until = cu_seqlens.long()[(row.seq_id + 1).clamp_max(cu_seqlens.numel() - 1)]
    cmp_seq_start, *seen = (
        x.to(torch.int32)
        for x in (row.offsets[token.seq_id], seen_from, seen_until.where(real, total))
    )
    return BlockBounds(cmp_seq_start, sequence_starts(cu_seqlens, total), *seen)


def counted_offsets(counts: Tensor) -> Tensor:
    """``[n_seq + 1]``, the first item of each sequence, from the number of its items."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
