"""Which keys a query sees: the sliding window (paper §3.3.3) and the compressed branch (Eq. 7-8).

Both follow one rule. A position is a row of the keys. The query of token t stands at position p and
sees the keys ``max(first key of its sequence, p - window + 1) … p``. Where keys are tokens, p is
``q_start + t``. Where keys are blocks of l tokens, one every d (:class:`Blocks`), p is the last
block that ends at or before that token, or the row before the sequence's first block if none does.

In kernels, ``LEAD`` is l - 1 and ``STRIDE`` is d: 0 and 1 where keys are tokens. ``seq_starts`` are
two pointers to int32 ``[T]``: the first key of each token's sequence, and, for blocks, its first
token. They are read if C.PACKED; C is a :class:`~nsa.backends.compiled.window.tiles.Constants`.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Blocks(NamedTuple):
    """Keys that are blocks of tokens."""

    block: int
    """l, tokens of a block."""
    stride: int
    """d, tokens from one block to the next."""
    first: Tensor | None = None
    """Packed: int32 ``[T]``, the first token of each token's sequence."""
    seen_from: Tensor | None = None
    """Packed: int32 ``[S]``, the first token that sees each key, T for a surplus one; it does not
    decrease."""
    seen_until: Tensor | None = None
    """Packed: int32 ``[S]``, the token past the last that sees each key, T for a surplus one."""


TOKENS = Blocks(1, 1)
"""Keys that are the tokens themselves."""


@triton.jit
def last_visible(t, seq_starts, q_start, LEAD: tl.constexpr, STRIDE: tl.constexpr, C: tl.constexpr):
    """The last key that token t sees, one before its sequence's first if none; t is a row of q."""
    position = t + q_start
    if LEAD > 0:
        position -= LEAD
        if C.PACKED:
            position -= tl.load(seq_starts[1] + t)
        position = tl.where(position >= 0, position // STRIDE, -1)
        if C.PACKED:
            position += tl.load(seq_starts[0] + t)
    return position


@triton.jit
def first_visible(t, position, seq_starts, window, C: tl.constexpr):
    """The first key that token t at ``position`` sees; t is a row of q."""
    oldest = tl.maximum(position - window + 1, 0)
    if C.PACKED:
        oldest = tl.maximum(oldest, tl.load(seq_starts[0] + t))
    return oldest


@triton.jit
def is_visible(s, oldest, position):
    """Mask of the keys s between ``oldest`` and ``position``; the three are broadcast."""
    return (s >= oldest) & (s <= position)


@triton.jit
def steps_of(begin, end, all_from, all_until, SIZE: tl.constexpr):
    """Steps of SIZE over ``begin … end - 1``, in two loops: those that lie within
    ``all_from … all_until - 1`` need no mask, the others, before and after them, do.

    Returns:
        ``(begin, end, steps, before, within)``: the number of steps, how many come before those
        that lie within, and how many lie within.
    """
    steps = tl.cdiv(tl.maximum(end - begin, 0), SIZE)
    before = tl.minimum(tl.cdiv(tl.maximum(all_from - begin, 0), SIZE), steps)
    within = tl.maximum(all_until - begin - before * SIZE, 0) // SIZE
    return begin, end, steps, before, tl.minimum(within, steps - before)


@triton.jit
def loop_of(span, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Where one of the two loops of :func:`steps_of` begins, and its number of steps."""
    begin, end, steps, before, within = span
    return (
        begin if MASKED else begin + before * SIZE,
        steps - within if MASKED else within,
    )


@triton.jit
def step_of(span, begin, step, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Where a step of a loop that begins at ``begin`` begins."""
    at = begin + step * SIZE
    if MASKED:  # the steps within are left out
        at += tl.where(step < span[3], 0, span[4]) * SIZE
    return at


@triton.jit
def visible_keys(
    t,
    first_t,
    last_t,
    seq_starts,
    window,
    q_start,
    LEAD: tl.constexpr,
    STRIDE: tl.constexpr,
    C: tl.constexpr,
):
    """The first and the last key that each of the tokens t sees, and :func:`steps_of` the keys that
    tokens ``first_t … last_t`` see."""
    position = last_visible(t, seq_starts, q_start, LEAD, STRIDE, C)
    oldest = first_visible(t, position, seq_starts, window, C)
    # both ends rise with t
    lowest = last_visible(first_t, seq_starts, q_start, LEAD, STRIDE, C)
    end = last_visible(last_t, seq_starts, q_start, LEAD, STRIDE, C) + 1
    begin = first_visible(first_t, lowest, seq_starts, window, C)
    seen_by_all = first_visible(last_t, end - 1, seq_starts, window, C)
    return oldest, position, steps_of(begin, end, seen_by_all, lowest + 1, C.BLOCK_N)


@triton.jit
def visible_to(
    s0,
    last_s,
    seq_starts,
    seen_ptrs,
    T,
    window,
    q_start,
    LEAD: tl.constexpr,
    STRIDE: tl.constexpr,
    C: tl.constexpr,
):
    """Which tokens see keys ``s0 … last_s``: any of them, then all of them, each from … until.

    ``seen_ptrs``: :class:`Blocks`' seen_from and seen_until, for packed blocks.
    """
    any_from = tl.maximum(s0 * STRIDE + LEAD - q_start, 0)
    any_until = tl.minimum((last_s + window) * STRIDE + LEAD - q_start, T)
    if C.PACKED:
        if LEAD > 0:
            any_from = tl.load(seen_ptrs[0] + s0)
            any_until = tl.load(seen_ptrs[1] + last_s)
        else:
            # starts do not decrease: the last key's sequence ends before the first larger start
            offset = tl.arange(0, 256)
            same = 0
            for t0 in range(last_s, any_until, 256):
                t = t0 + offset
                start = tl.load(seq_starts[0] + t, mask=t < any_until, other=2147483647)
                same += tl.sum((start <= last_s).to(tl.int32), 0)
            any_until = last_s + same
    all_from = last_s * STRIDE + LEAD - q_start
    all_until = (s0 + window) * STRIDE + LEAD - q_start
    if C.PACKED:
        one = last_s
        if LEAD > 0:  # there a window holds all blocks of a sequence
            all_until = any_until
            all_from = tl.load(seen_ptrs[0] + last_s)
            one = tl.minimum(all_from, T - 1)
        # none does where the keys are of several sequences
        same = tl.load(seq_starts[0] + one) <= s0
        all_from = tl.where(same, all_from, T)
    return any_from, any_until, all_from, all_until
