"""The selected branch and the window of a step, and the gated sum (paper Eq. 5, 11-12).

A query and key/value head has SELECTED_PARTS programs that take some listed blocks each, and
WINDOW_PARTS that take a run of the window's tokens; the last of them all sums up. A query never
reads another's list.

B sequences, S queries of each, P pages of L tokens, R rows of a ring, K key/value heads, G heads
per group, D key size, V value size; C is a
:class:`~nsa.backends.compiled.decode.tiles.Constants`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.decode.parts import (
    add_keys,
    empty_part,
    is_last,
    load_queries,
    load_rows,
    merge_parts,
    store_part,
)


@triton.jit
def _element(x, e, index):
    """Element ``index`` of x ``[E]``, of which e is the arange."""
    return tl.sum(tl.where(e == index, x, 0), 0)


@triton.jit
def _attend_blocks(
    q,
    ptrs,  # of k and v of the head
    strides,  # of k and v: of a page, and of a row
    first,
    page,
    page_size,
    count,
    position,
    scale_log2,
    BLOCK_N: tl.constexpr,
    C: tl.constexpr,
):
    """m_i, l_i and acc over ``count`` blocks: tokens ``first`` and on, rows of ``page``."""
    STEPS: tl.constexpr = (C.SELECT_BLOCK + BLOCK_N - 1) // BLOCK_N
    entry = tl.arange(0, first.shape[0])
    n = tl.arange(0, BLOCK_N)
    m_i, l_i, acc = empty_part(C.BLOCK_GROUP, C.BLOCK_DV)
    for step in range(count * STEPS):
        token = _element(first, entry, step // STEPS) + step % STEPS * BLOCK_N
        mask = token + n <= position
        if STEPS * BLOCK_N != C.SELECT_BLOCK:
            mask = mask & (step % STEPS * BLOCK_N + n < C.SELECT_BLOCK)
        at = _element(page, entry, step // STEPS).to(tl.int64)
        row = ((token + n) % page_size).to(tl.int64)
        k = load_rows(ptrs[0], at * strides[0] + row * strides[1], mask, C.D, C.BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=C.PRECISION) * scale_log2
        s = tl.where(mask[None, :], s, float("-inf"))
        v = load_rows(ptrs[1], at * strides[2] + row * strides[3], mask, C.V, C.BLOCK_DV)
        m_i, l_i, acc = add_keys(m_i, l_i, acc, s, v, C)
    return m_i, l_i, acc


@triton.jit(do_not_specialize=["num_listed", "window"])
def nsa_decode_gated(
    q_ptr,
    position_ptr,  # [B]
    block_idx_ptr,  # [B, S, K, num_listed], contiguous
    page_table_ptr,
    selected_ptrs,  # of k and v, as is the next
    window_ptrs,
    gates_ptr,
    out_cmp_ptr,  # fp32 [B, S, H, V], contiguous
    part_ptrs,  # of parts [B, S, K, SELECTED_PARTS + WINDOW_PARTS]
    counters_ptr,  # [B, S, K], zeros
    out_ptr,  # [B, S, H, V], contiguous; written
    q_strides,
    table_stride,
    selected_strides,  # of k and v, as is the next
    window_strides,
    gate_strides,
    num_listed,
    page_size,
    window,
    ring,
    KV_HEADS,
    scale_log2,
    SELECTED_PARTS: tl.constexpr,
    WINDOW_PARTS: tl.constexpr,
    SLOTS: tl.constexpr,  # num_listed, padded to a power of two
    MERGED: tl.constexpr,  # at least as many as the parts of either, a power of two
    ENTRIES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    C: tl.constexpr,
):
    PARTS: tl.constexpr = SELECTED_PARTS + WINDOW_PARTS
    pid = tl.program_id(0)
    kv_head = pid % KV_HEADS
    part = pid // KV_HEADS % PARTS
    query = (pid // KV_HEADS // PARTS).to(tl.int64)
    b = query // C.S
    s = query % C.S
    position = tl.load(position_ptr + b) + s.to(tl.int32)
    g = tl.arange(0, C.BLOCK_GROUP)
    row_mask = g < C.G
    head = kv_head * C.G + g
    q = load_queries(q_ptr, q_strides, b, s, head, row_mask, C.D, C.BLOCK_D)
    list_row = query * KV_HEADS + kv_head
    first_part = list_row * PARTS

    slot = tl.arange(0, SLOTS)
    list_ptr = block_idx_ptr + list_row * num_listed
    listed = tl.load(list_ptr + slot, mask=slot < num_listed, other=-1)
    seen = (listed >= 0) & (listed <= position // C.SELECT_BLOCK)
    num_seen = tl.sum(seen.to(tl.int32), 0)  # lists ascend: they come first
    oldest = tl.maximum(position - window + 1, 0)
    # the window is read like blocks side by side, of the one page that a ring is
    entry = tl.arange(0, ENTRIES)
    zero = list_row * 0  # strides of 1 are constants, and the two kinds have one type here
    if part < SELECTED_PARTS:
        k_ptr, v_ptr = selected_ptrs
        k_strides, v_strides = selected_strides
        count = tl.minimum(num_seen - part * ENTRIES, ENTRIES)
        first = tl.load(list_ptr + part * ENTRIES + entry, mask=entry < count, other=0)
        first *= C.SELECT_BLOCK
        table_ptr = page_table_ptr + b * table_stride
        page = tl.load(table_ptr + first // page_size, mask=entry < count, other=0)
        size = page_size + 0 * part
        strides = (zero + k_strides[0], zero + k_strides[1])
        strides += (zero + v_strides[0], zero + v_strides[1])
        k_ptr += kv_head * (zero + k_strides[2])
        v_ptr += kv_head * (zero + v_strides[2])
    else:
        k_ptr, v_ptr = window_ptrs
        k_strides, v_strides = window_strides
        begin = oldest + (part - SELECTED_PARTS) * (ENTRIES * C.SELECT_BLOCK)
        count = (position - begin + C.SELECT_BLOCK) // C.SELECT_BLOCK
        count = tl.minimum(tl.where(begin <= position, count, 0), ENTRIES)
        first = begin + entry * C.SELECT_BLOCK
        page = entry * 0
        size = ring + 0 * part
        strides = (zero, zero + k_strides[1], zero, zero + v_strides[1])
        k_ptr += b * k_strides[0] + kv_head * (zero + k_strides[2])
        v_ptr += b * v_strides[0] + kv_head * (zero + v_strides[2])
    if count > 0:
        m_i, l_i, acc = _attend_blocks(
            *(q, (k_ptr, v_ptr), strides, first, page, size, count, position, scale_log2),
            *(BLOCK_N, C),
        )
        store_part(part_ptrs, first_part + part, g, row_mask, m_i, l_i, acc, C.G, C.V)

    if is_last(counters_ptr + list_row, PARTS):
        e = tl.arange(0, C.BLOCK_DV)
        row = list_row * C.G + g
        inside = row_mask[:, None] & (e < C.V)[None, :]
        gate_ptr = gates_ptr + b * gate_strides[0] + s * gate_strides[1] + head * gate_strides[2]
        at = row[:, None] * C.V + e[None, :]
        gate = tl.load(gate_ptr, mask=row_mask, other=0.0).to(tl.float32)
        out = gate[:, None] * tl.load(out_cmp_ptr + at, mask=inside, other=0.0)
        count = tl.cdiv(num_seen, ENTRIES)
        gate = tl.load(gate_ptr + gate_strides[3], mask=row_mask, other=0.0).to(tl.float32)
        out += gate[:, None] * merge_parts(
            *(part_ptrs, first_part, count, g, row_mask, e, C.G, C.V, MERGED, STEP)
        )
        count = tl.cdiv(position + 1 - oldest, ENTRIES * C.SELECT_BLOCK)
        gate = tl.load(gate_ptr + 2 * gate_strides[3], mask=row_mask, other=0.0).to(tl.float32)
        first_part += SELECTED_PARTS
        out += gate[:, None] * merge_parts(
            *(part_ptrs, first_part, count, g, row_mask, e, C.G, C.V, MERGED, STEP)
        )
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
