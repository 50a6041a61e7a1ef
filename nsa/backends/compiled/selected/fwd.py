"""Selected attention (paper Eq. 11-12), forward.

Scores are kept in base 2: ``exp2(s*c - m)`` with ``c = scale * log2(e)`` is one multiply-add and
one hardware instruction.

B batch, T query tokens, S key tokens, H query heads, K key/value heads, G heads per group, D key
size, V value size; C is a :class:`~nsa.backends.compiled.selected.tiles.Constants`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.columns import (
    add_products,
    divide_rows,
    dot_rows,
    scale_rows,
    store_rows,
    zeros,
)
from nsa.backends.compiled.common import LN_2
from nsa.backends.compiled.selected.far import merge_parts
from nsa.backends.compiled.selected.query_tile import (
    block_step,
    load_keys,
    load_queries,
    locate_tile,
    phase_steps,
)
from nsa.core.kernel import kernel


@triton.jit
def _attend(
    m_i,
    l_i,
    acc,
    begin,
    end,
    q,
    k_ptr,  # of the head, as is the next
    v_ptr,
    k_offsets,
    v_offsets,
    k_stride,
    v_stride,
    blocks,
    bit,
    last_row,
    S,
    scale_log2,
    MASKED: tl.constexpr,
    C: tl.constexpr,
):
    """Steps ``begin … end - 1`` of the online softmax."""
    for step in range(begin, end):
        first_row, exists, visible = block_step(step, blocks, bit, last_row, S, MASKED, C)
        k = load_keys(k_ptr, k_offsets, k_stride, first_row, exists, C.D, C.BLOCK_D)
        s = dot_rows(q, k, C)
        s = tl.where(visible, s * scale_log2, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - m_safe[:, None])
        alpha = tl.exp2(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = load_keys(v_ptr, v_offsets, v_stride, first_row, exists, C.V, C.BLOCK_DV)
        acc = add_products(scale_rows(acc, alpha[:, None]), p, v, C)
        m_i = m_new
    return m_i, l_i, acc


@kernel(do_not_specialize=["T", "num_tiles", "S", "q_start", "first_head"])
def nsa_selected_fwd(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [B, T, H, V], contiguous
    lse_ptr,  # [B, T, H], contiguous
    union_ptrs,  # of :func:`.query_tile.locate_tile`
    part_ptrs,  # of :class:`.far.Parts`, with SINCE
    q_strides,
    k_strides,
    v_strides,
    T,
    num_tiles,
    S,
    q_start,
    first_head,  # of this launch: b*K + kv_head
    KV_HEADS,
    scale_log2,
    SINCE: tl.constexpr,
    C: tl.constexpr,
):
    pid = tl.program_id(0) + first_head * num_tiles
    b, kv_head, token, head, bit, mask, blocks = locate_tile(
        pid, T, num_tiles, KV_HEADS, union_ptrs, C
    )
    n = tl.arange(0, C.BLOCK_N)
    last_row = tl.minimum(q_start + token, S - 1)
    q = load_queries(q_ptr, q_strides, b, token, head, mask, C.D, C.BLOCK_D)
    k_ptr += b * k_strides[0] + kv_head.to(tl.int64) * k_strides[2]
    v_ptr += b * v_strides[0] + kv_head.to(tl.int64) * v_strides[2]
    k_offsets = n * k_strides[1]
    v_offsets = n * v_strides[1]

    m_i = tl.full([C.BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.full([C.BLOCK_M], 0.0, tl.float32)
    acc = zeros(C.BLOCK_M, C.BLOCK_DV)
    if SINCE is not None:
        m_i, l_i, acc = merge_parts(
            *(part_ptrs, first_head, b, kv_head, token, head, mask),
            *(T, S, q_start, KV_HEADS, SINCE, C),
        )
    for phase in tl.static_range(0 if C.SHARED else 1, 2):
        begin, end = phase_steps(phase, blocks[2], C)
        m_i, l_i, acc = _attend(
            *(m_i, l_i, acc, begin, end, q, k_ptr, v_ptr, k_offsets, v_offsets),
            *(k_strides[1], v_strides[1], blocks, bit, last_row, S, scale_log2),
            *(phase == 1, C),
        )

    empty = l_i == 0.0
    l_safe = tl.where(empty, 1.0, l_i)
    acc = divide_rows(acc, l_safe[:, None])
    lse = tl.where(empty, float("-inf"), m_i * LN_2 + tl.log(l_safe))
    row = (b * T + token) * (KV_HEADS * C.G) + head
    store_rows(out_ptr + row * C.V, None, acc, mask, C.V, C.BLOCK_DV)
    tl.store(lse_ptr + row, lse, mask=mask)
