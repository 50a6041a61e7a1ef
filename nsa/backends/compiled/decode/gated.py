"""The selected branch of a step (paper Eq. 11-12), and the gated sum of all three (Eq. 5).

A query and key/value head has PARTS programs that take some listed blocks each; the last of them
sums up. A query never reads another's list.

B sequences, S queries of each, P pages of L tokens, K key/value heads, G heads per group, D key
size, V value size; C is a :class:`~nsa.backends.compiled.decode.tiles.Constants`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.decode.parts import (
    add_keys,
    empty_part,
    end_unit,
    is_last,
    load_queries,
    load_rows,
    merge_parts,
    store_part,
    wait_for_last,
    weigh,
)
from nsa.backends.compiled.decode.window import oldest_visible
from nsa.core.kernel import kernel


@triton.jit
def _element(x, e, index):
    """Element ``index`` of x ``[E]``, of which e is the arange."""
    return tl.sum(tl.where(e == index, x, 0), 0)


@triton.jit
def attend_blocks(
    q,
    k_ptr,  # of the head, as is the next
    v_ptr,
    list_ptr,  # of the first entry
    table_ptr,  # of the sequence
    k_strides,
    v_strides,
    count,
    position,
    page_size,
    scale_log2,
    ENTRIES: tl.constexpr,
    UNIT: tl.constexpr,  # entries of one, ENTRIES or a part of them
    BLOCK_N: tl.constexpr,
    C: tl.constexpr,
):
    """m_i, l_i and acc over ``count`` listed blocks, at most ENTRIES."""
    STEPS: tl.constexpr = (C.SELECT_BLOCK + BLOCK_N - 1) // BLOCK_N
    entry = tl.arange(0, ENTRIES)
    block = tl.load(list_ptr + entry, mask=entry < count, other=0)
    page = tl.load(table_ptr + block * C.SELECT_BLOCK // page_size, mask=entry < count, other=0)
    n = tl.arange(0, BLOCK_N)
    m_i, l_i, acc = empty_part(C.BLOCK_GROUP, C.BLOCK_DV)
    l_group, group = l_i, acc
    for step in range(count * STEPS):
        token = _element(block, entry, step // STEPS) * C.SELECT_BLOCK + step % STEPS * BLOCK_N
        at = _element(page, entry, step // STEPS).to(tl.int64)
        mask = token + n <= position
        if STEPS * BLOCK_N != C.SELECT_BLOCK:
            mask = mask & (step % STEPS * BLOCK_N + n < C.SELECT_BLOCK)
        row = (token % page_size).to(tl.int64)
        tile_ptr = k_ptr + at * k_strides[0] + row * k_strides[1]
        k = load_rows(tile_ptr, n * k_strides[1], mask, C.D, C.BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=C.PRECISION) * scale_log2
        s = tl.where(mask[None, :], s, float("-inf"))
        tile_ptr = v_ptr + at * v_strides[0] + row * v_strides[1]
        v = load_rows(tile_ptr, n * v_strides[1], mask, C.V, C.BLOCK_DV)
        m_i, _, p, alpha = weigh(m_i, s)
        if ENTRIES > UNIT:
            ended = step % (UNIT * STEPS) == 0
            l_i, acc, l_group, group = end_unit(l_i, acc, l_group, group, ended)
        l_i, acc, l_group, group = add_keys(l_i, acc, l_group, group, p, alpha, v, C)
    if ENTRIES > UNIT:
        l_i, acc = l_group + l_i, group + acc
    return m_i, l_i, acc


@kernel(
    do_not_specialize=["num_listed", "window", "table_stride"],
    do_not_specialize_on_alignment=["position_ptr", "page_table_ptr"],
)
def nsa_decode_gated(
    q_ptr,
    position_ptr,  # [B]
    block_idx_ptr,  # [B, S, K, num_listed], contiguous
    page_table_ptr,
    k_ptr,
    v_ptr,
    gates_ptr,
    out_cmp_ptr,  # fp32 [B, S, H, V], contiguous
    window_part_ptrs,  # of parts [B, S, K, WINDOW_PARTS]
    part_ptrs,  # of parts [B, S, K, PARTS]
    counters_ptr,  # [B, S, K], zeros
    out_ptr,  # [B, S, H, V], contiguous; written
    q_strides,
    table_stride,
    k_strides,
    v_strides,
    gate_strides,
    num_listed,
    page_size,
    window,
    KV_HEADS,
    scale_log2,
    SLOTS: tl.constexpr,  # num_listed, padded to a power of two
    ENTRIES: tl.constexpr,
    UNIT: tl.constexpr,  # entries of one, ENTRIES or a part of them
    PARTS: tl.constexpr,
    WINDOW_PARTS: tl.constexpr,
    WINDOW_KEYS: tl.constexpr,
    GROUPS: tl.constexpr,  # a power of two, of each of the two at least as many
    FOLD: tl.constexpr,  # parts of a group
    WINDOW_FOLD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    C: tl.constexpr,
):
    wait_for_last(C)
    pid = tl.program_id(0)
    kv_head = (pid % KV_HEADS).to(tl.int64)
    part = pid // KV_HEADS % PARTS
    query = (pid // KV_HEADS // PARTS).to(tl.int64)
    b = query // C.S
    s = query % C.S
    position = tl.load(position_ptr + b) + s.to(tl.int32)
    g = tl.arange(0, C.BLOCK_GROUP)
    row_mask = g < C.G
    head = kv_head * C.G + g
    list_row = query * KV_HEADS + kv_head

    slot = tl.arange(0, SLOTS)
    list_ptr = block_idx_ptr + list_row * num_listed
    listed = tl.load(list_ptr + slot, mask=slot < num_listed, other=-1)
    seen = (listed >= 0) & (listed <= position // C.SELECT_BLOCK)
    num_seen = tl.sum(seen.to(tl.int32), 0)  # lists ascend: they come first
    count = tl.minimum(num_seen - part * ENTRIES, ENTRIES)
    if count > 0:
        q = load_queries(q_ptr, q_strides, b, s, head, row_mask, C.D, C.BLOCK_D)
        m_i, l_i, acc = attend_blocks(
            *(q, k_ptr + kv_head * k_strides[2], v_ptr + kv_head * v_strides[2]),
            *(list_ptr + part * ENTRIES, page_table_ptr + b * table_stride),
            *(k_strides, v_strides, count, position, page_size, scale_log2, ENTRIES, UNIT),
            *(BLOCK_N, C),
        )
        store_part(part_ptrs, list_row * PARTS + part, g, row_mask, m_i, l_i, acc, C.G, C.V)

    if is_last(counters_ptr + list_row, PARTS):
        e = tl.arange(0, C.BLOCK_DV)
        row = list_row * C.G + g
        inside = row_mask[:, None] & (e < C.V)[None, :]
        gate_ptr = gates_ptr + b * gate_strides[0] + s * gate_strides[1] + head * gate_strides[2]
        at = row[:, None] * C.V + e[None, :]
        gate = tl.load(gate_ptr, mask=row_mask, other=0.0).to(tl.float32)
        out = gate[:, None] * tl.load(out_cmp_ptr + at, mask=inside, other=0.0)
        gate = tl.load(gate_ptr + gate_strides[3], mask=row_mask, other=0.0).to(tl.float32)
        first, count = list_row * PARTS, tl.cdiv(num_seen, ENTRIES)
        out += gate[:, None] * merge_parts(
            part_ptrs, first, count, g, row_mask, e, C.G, C.V, GROUPS, FOLD
        )
        gate = tl.load(gate_ptr + 2 * gate_strides[3], mask=row_mask, other=0.0).to(tl.float32)
        tokens = position + 1 - oldest_visible(position, window)
        first, count = list_row * WINDOW_PARTS, tl.cdiv(tokens, WINDOW_KEYS)
        out += gate[:, None] * merge_parts(
            window_part_ptrs, first, count, g, row_mask, e, C.G, C.V, GROUPS, WINDOW_FOLD
        )
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
