"""Which keys of a band a query sees: positions, and how a program finds its own.

The band is the window (paper §3.3.3) or, with keys that stand ``stride`` tokens apart, what the
compressed branch sees (Eq. 7-8). "Position" means a row of the keys throughout. Query t stands at
``q_start + t``, packed or not, and sees keys ``max(start, position - w + 1) … position``. Where
keys are blocks of l tokens, one every d (:class:`Blocks`), it stands at the last block that ends at
or before it, or at none.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2E = math.log2(math.e)
LOG2_E = tl.constexpr(LOG2E)


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
def locate(tiles, K):
    """Tile, batch row and key head of a program; neighbouring tiles run side by side."""
    pid = tl.program_id(0)
    return pid % tiles, (pid // tiles // K).to(tl.int64), (pid // tiles % K).to(tl.int64)


@triton.jit
def last_seen(
    t,
    start_ptr,
    first_ptr,
    q_start,
    LEAD: tl.constexpr,
    STRIDE: tl.constexpr,
    STRIDED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The last key that query t sees, one before its sequence's first if none; t a row of q that
    exists."""
    position = t + q_start
    if STRIDED:
        position -= LEAD
        if PACKED:
            position -= tl.load(first_ptr + t)
        position = tl.where(position >= 0, position // STRIDE, -1)
        if PACKED:
            position += tl.load(start_ptr + t)
    return position


@triton.jit
def first_seen(t, position, start_ptr, window, PACKED: tl.constexpr):
    """The first key that query t at ``position`` sees; t a row of q that exists."""
    oldest = tl.maximum(position - window + 1, 0)
    if PACKED:
        oldest = tl.maximum(oldest, tl.load(start_ptr + t))
    return oldest


@triton.jit
def steps_of(begin, end, all_from, all_until, SIZE: tl.constexpr):
    """Steps of SIZE from ``begin`` on: how many there are, how many come before those that lie
    within ``all_from … all_until - 1``, and how many lie within."""
    steps = tl.cdiv(tl.maximum(end - begin, 0), SIZE)
    before = tl.minimum(tl.cdiv(tl.maximum(all_from - begin, 0), SIZE), steps)
    within = tl.maximum(all_until - begin - before * SIZE, 0) // SIZE
    return steps, before, tl.minimum(within, steps - before)
