"""Partial results of a softmax over keys that several programs share, and their sum.

A part holds ``m`` (the largest score, base 2), ``l`` (the sum of exponentials) and the unscaled sum
of values of each row: fp32, ``stats [parts, 2, ROWS]`` and ``sums [parts, ROWS, V]``. Parts are
merged in their order, whichever program comes last.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def empty_part(BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """m_i, l_i and acc of no keys."""
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.full([BLOCK_M], 0.0, tl.float32)
    acc = tl.full([BLOCK_M, BLOCK_DV], 0.0, tl.float32)
    return m_i, l_i, acc


@triton.jit
def add_keys(m_i, l_i, acc, s, v, C: tl.constexpr):
    """A step of the online softmax: scores s ``[rows, keys]`` in base 2, −inf where masked."""
    m_new = tl.maximum(m_i, tl.max(s, 1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - m_safe[:, None])
    alpha = tl.exp2(m_i - m_safe)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=C.PRECISION)
    return m_new, l_i, acc


@triton.jit
def load_rows(ptr, at, mask, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """``[rows, BLOCK]``: SIZE elements side by side from each of ``ptr + at`` on, read once."""
    d = tl.arange(0, BLOCK)
    inside = mask[:, None] if SIZE == BLOCK else mask[:, None] & (d < SIZE)[None, :]
    rows = ptr + (at[:, None] + d[None, :])
    return tl.load(rows, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_queries(q_ptr, q_strides, b, s, head, mask, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """q ``[rows, BLOCK]`` of queries s and heads."""
    d = tl.arange(0, BLOCK)
    at = b * q_strides[0] + s * q_strides[1] + head * q_strides[2]
    inside = mask[:, None] & (d < SIZE)[None, :]
    return tl.load(q_ptr + at[:, None] + d[None, :] * q_strides[3], mask=inside, other=0.0)


@triton.jit
def store_part(part_ptrs, part, row, mask, m_i, l_i, acc, ROWS, V: tl.constexpr):
    """Writes rows ``row`` of a part, an int64 scalar."""
    sums_ptr, stats_ptr = part_ptrs
    sums_ptr += part * (ROWS * V)
    stats_ptr += part * (2 * ROWS) + row
    e = tl.arange(0, acc.shape[1])
    tl.store(sums_ptr + row[:, None] * V + e[None, :], acc, mask=mask[:, None] & (e < V)[None, :])
    tl.store(stats_ptr, m_i, mask=mask)
    tl.store(stats_ptr + ROWS, l_i, mask=mask)


@triton.jit
def merge_stats(stats_ptr, first, count, row, mask, ROWS, PARTS: tl.constexpr):
    """The largest score, 0 if there is none, and the sum of exponentials of rows ``row``, over
    parts ``first … first + count - 1``, at most PARTS."""
    part = tl.arange(0, PARTS)
    stats = stats_ptr + first * (2 * ROWS) + (part[:, None] * (2 * ROWS) + row[None, :])
    inside = (part < count)[:, None] & mask[None, :]
    m = tl.load(stats, mask=inside, other=float("-inf"), cache_modifier=".cg")
    weight = tl.load(stats + ROWS, mask=inside, other=0.0, cache_modifier=".cg")
    m_i = tl.max(m, 0)
    m_i = tl.where(m_i == float("-inf"), 0.0, m_i)
    return m_i, tl.sum(tl.exp2(m - m_i[None, :]) * weight, 0)


@triton.jit
def merge_parts(part_ptrs, first, count, row, mask, e, ROWS, V, PARTS: tl.constexpr):
    """Columns e of the output ``[rows, columns]`` of rows ``row`` over parts ``first … first +
    count - 1``, at most PARTS of them; 0 where no key was seen."""
    sums_ptr, stats_ptr = part_ptrs
    m_i, l_i = merge_stats(stats_ptr, first, count, row, mask, ROWS, PARTS)
    acc = tl.full([row.shape[0], e.shape[0]], 0.0, tl.float32)
    sums_ptr += first * (ROWS * V) + (row[:, None] * V + e[None, :])
    stats_ptr += first * (2 * ROWS) + row
    inside = mask[:, None] & (e < V)[None, :]
    for part in tl.range(0, count, num_stages=3):  # in one order, whatever the columns
        m = tl.load(stats_ptr + part * (2 * ROWS), mask=mask, other=0.0, cache_modifier=".cg")
        sums = tl.load(sums_ptr + part * (ROWS * V), mask=inside, other=0.0, cache_modifier=".cg")
        acc += sums * tl.exp2(m - m_i)[:, None]
    return acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]


@triton.jit
def is_last(counter_ptr, programs):
    """Whether all ``programs`` of this counter have come; what they wrote may then be read."""
    tl.debug_barrier()  # all threads of this program have written
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1


@triton.jit
def let_next_start(C: tl.constexpr):
    """The next launch's programs may start where there is room, once all of this one have."""
    if C.OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait_for_last(C: tl.constexpr):
    """Wait until the launch before has ended, whose results are then seen."""
    if C.OVERLAP:
        gdc_wait()
