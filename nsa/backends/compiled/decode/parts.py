"""Partial results of a softmax over keys that several programs share, and their sum.

A part holds ``m`` (what exponentials are taken over, base 2), ``l`` (the sum of exponentials) and
the unscaled sum of values of each row: fp32, ``stats [parts, 2, ROWS]`` and ``sums [parts, ROWS,
V]``.

Keys are summed by units, units by groups, and groups by all, each in order. A part is a group, or
where there are few programs a unit: FOLD parts are a group then. Every m is a whole number, so that
scaling is exact, and it makes no difference which program adds what.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FIXED_POINT = tl.constexpr(2.0**40)


@triton.jit
def empty_part(BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """m_i, l_i and acc of no keys."""
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.full([BLOCK_M], 0.0, tl.float32)
    acc = tl.full([BLOCK_M, BLOCK_DV], 0.0, tl.float32)
    return m_i, l_i, acc


@triton.jit
def exp2_over(s, m_safe):
    """``exp2(s - m)`` for whole numbers m; s −inf gives 0.

    Nothing but an exact factor depends on m: equal s are equal over any m.
    """
    whole = tl.where(s == float("-inf"), m_safe, tl.floor(s))
    return tl.exp2(s - whole) * tl.exp2(whole - m_safe)


@triton.jit
def end_unit(l_i, acc, l_group, group, ended):
    """Adds a unit to its group where it has ``ended``, a scalar."""
    done = tl.where(ended, 1.0, 0.0)
    return l_i * (1.0 - done), acc * (1.0 - done), l_group + l_i * done, group + acc * done


@triton.jit
def weigh(m_i, s):
    """The new m_i, the same with 0 for −inf, the exponentials of s and what scales older sums.

    s ``[rows, keys]``: scores in base 2, −inf where masked.
    """
    m_new = tl.maximum(m_i, tl.ceil(tl.max(s, 1)))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, m_safe, exp2_over(s, m_safe[:, None]), tl.exp2(m_i - m_safe)


@triton.jit
def add_keys(l_i, acc, l_group, group, p, alpha, v, C: tl.constexpr):
    """Scales by alpha, and adds keys of weights p ``[rows, keys]`` to the unit."""
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=C.PRECISION)
    return l_i, acc, l_group * alpha, group * alpha[:, None]


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
def merge_stats(stats_ptr, first, count, row, mask, ROWS, GROUPS: tl.constexpr, FOLD: tl.constexpr):
    """m_i, 0 if there is none, and l_i of rows ``row`` over parts ``first … first + count - 1``, of
    at most GROUPS groups."""
    stats_ptr += first * (2 * ROWS)
    part = tl.arange(0, GROUPS) * FOLD
    at = part[:, None] * (2 * ROWS) + row[None, :]
    m_i = tl.full([row.shape[0]], float("-inf"), tl.float32)
    for j in tl.static_range(FOLD):
        inside = (part + j < count)[:, None] & mask[None, :]
        m_ptr = stats_ptr + at + j * (2 * ROWS)
        m = tl.load(m_ptr, mask=inside, other=float("-inf"), cache_modifier=".cg")
        m_i = tl.maximum(m_i, tl.max(m, 0))
    m_i = tl.where(m_i == float("-inf"), 0.0, m_i)
    l_group = tl.full([GROUPS, row.shape[0]], 0.0, tl.float32)
    for j in tl.static_range(FOLD):
        inside = (part + j < count)[:, None] & mask[None, :]
        m_ptr = stats_ptr + at + j * (2 * ROWS)
        m = tl.load(m_ptr, mask=inside, other=float("-inf"), cache_modifier=".cg")
        unit = tl.load(m_ptr + ROWS, mask=inside, other=0.0, cache_modifier=".cg")
        l_group += unit * tl.exp2(m - m_i[None, :])
    # of whole numbers the sum is the same in any order
    l_i = tl.sum((l_group * FIXED_POINT).to(tl.int64), 0)
    return m_i, l_i.to(tl.float32) / FIXED_POINT


@triton.jit
def merge_parts(
    part_ptrs, first, count, row, mask, e, ROWS, V, GROUPS: tl.constexpr, FOLD: tl.constexpr
):
    """Columns e of the output ``[rows, columns]`` of rows ``row`` over parts ``first … first +
    count - 1``, of at most GROUPS groups; 0 where no key was seen."""
    sums_ptr, stats_ptr = part_ptrs
    m_i, l_i = merge_stats(stats_ptr, first, count, row, mask, ROWS, GROUPS, FOLD)
    group = tl.full([row.shape[0], e.shape[0]], 0.0, tl.float32)
    acc = group
    sums_ptr += first * (ROWS * V) + (row[:, None] * V + e[None, :])
    stats_ptr += first * (2 * ROWS) + row
    inside = mask[:, None] & (e < V)[None, :]
    for part in tl.range(0, count, num_stages=3):
        m = tl.load(stats_ptr + part * (2 * ROWS), mask=mask, other=0.0, cache_modifier=".cg")
        sums = tl.load(sums_ptr + part * (ROWS * V), mask=inside, other=0.0, cache_modifier=".cg")
        done = tl.where(part % FOLD == 0, 1.0, 0.0)
        acc += group * done
        group = group * (1.0 - done) + sums * tl.exp2(m - m_i)[:, None]
    return (acc + group) / tl.where(l_i == 0.0, 1.0, l_i)[:, None]


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
