"""The window of a step (paper §3.3.3): partial results of one query over a run of its tokens.

V value size; C is a :class:`~nsa.backends.compiled.decode.tiles.Constants`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.decode.parts import add_keys, empty_part, end_unit, load_rows, weigh


@triton.jit
def attend_window(
    q,
    k_ptr,  # of the sequence and the head, as is the next
    v_ptr,
    k_strides,
    v_strides,
    begin,
    end,
    ring,
    scale_log2,
    KEYS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    C: tl.constexpr,
):
    """m_i, l_i and acc over tokens ``begin … end - 1``, at most KEYS; t is row ``t % ring``."""
    n = tl.arange(0, BLOCK_N)
    m_i, l_i, acc = empty_part(C.BLOCK_GROUP, C.BLOCK_DV)
    l_group, group = l_i, acc
    for first in range(begin, end, BLOCK_N):
        mask = first + n < end
        row = ((first + n) % ring).to(tl.int64)
        k = load_rows(k_ptr, row * k_strides[1], mask, C.D, C.BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=C.PRECISION) * scale_log2
        s = tl.where(mask[None, :], s, float("-inf"))
        v = load_rows(v_ptr, row * v_strides[1], mask, C.V, C.BLOCK_DV)
        m_i, _, p, alpha = weigh(m_i, s)
        if KEYS > UNIT:
            ended = (first - begin) % UNIT == 0
            l_i, acc, l_group, group = end_unit(l_i, acc, l_group, group, ended)
        l_i, acc, l_group, group = add_keys(l_i, acc, l_group, group, p, alpha, v, C)
    if KEYS > UNIT:
        l_i, acc = l_group + l_i, group + acc
    return m_i, l_i, acc


@triton.jit
def oldest_visible(position, window):
    """The first token of a query's window."""
    return tl.maximum(position - window + 1, 0)
