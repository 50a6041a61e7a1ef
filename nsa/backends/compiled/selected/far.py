"""Selected attention (paper Eq. 11-12), forward, of small groups: far blocks, key-stationary.

Tiles on the union of neighbours' lists (:mod:`.fwd`) read most blocks for one token alone where
neighbours share little: bytes grow with the number of key/value heads, and small groups have many.
Here a program holds one block of keys and values and walks over the tokens that selected it
(:mod:`.inverse_index`): every row of every product is useful, and what is read is the queries, once
for each block that they list. A row's results of single blocks, *parts*, go through memory; the
forward kernel merges them in the order of the list, with no sum in any other order.

Only *far* blocks are taken so: neither the first of a sequence, nor a token's own or the one before
it, which neighbours have in common; and none of a token near the start of its sequence, whose list
is most of what it can see. Near blocks go through the union. Which block is far depends on
positions alone, never on the batch. All keys of a far block that exist are seen.

Parts are normalised and in q's dtype (``n*H*(V*itemsize + 4)`` bytes a token with their lse): each
is rounded as an output is, and they are averaged, so that the error is that of one more rounding.
They take 1.25 GiB at most (:data:`.tiles.PARTS_BYTES`): as many heads at a time as have room, or
as many tokens of one head.

B batch, T query tokens, S key tokens, H query heads, K key/value heads, G heads per group, D key
size, V value size, n selected blocks; C is a
:class:`~nsa.backends.compiled.selected.tiles.Constants`.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nsa.backends.compiled.columns import (
    add_products,
    add_rows,
    dot_rows,
    load_rows,
    scale_rows,
    store_rows,
    zeros,
)
from nsa.backends.compiled.common import LOG2_E
from nsa.core.kernel import kernel


@triton.jit
def is_far(j, seq_start, row, SELECT_BLOCK: tl.constexpr, SINCE: tl.constexpr):
    """Whether block j is far from the token whose own key row is ``row``; all are integers.

    SINCE: the position of the first token that has far blocks.
    """
    before = (j.to(tl.int64) + 2) * SELECT_BLOCK <= row - seq_start
    return (j > 0) & before & (row - seq_start >= SINCE)


class Parts(NamedTuple):
    """Results of single blocks, of some batch rows' key/value heads."""

    sums: Tensor
    """``[heads, T, n, G, V]``, in a backward D; only those of far blocks are set, as of the
    next."""
    lse: Tensor | None
    """fp32 ``[heads, T, n, G]``, base 2; None in a backward."""
    block_idx: Tensor
    """int32 ``[B, T, K, n]``, contiguous."""
    start: Tensor | None
    """Packed: int32 ``[T]``, as of :func:`.launch.selected_forward`."""


@triton.jit
def _locate_lists(
    part_ptrs, first_head, b, kv_head, token, head, mask, T, KV_HEADS, C: tl.constexpr
):
    """Of each row of a query tile: its list, its first part, and where its sequence starts."""
    list_ptr = part_ptrs[2] + ((b * T + token) * KV_HEADS + kv_head) * C.WIDTH
    part = ((b * KV_HEADS + kv_head - first_head) * T + token) * (C.WIDTH * C.G) + head % C.G
    seq_start = tl.zeros_like(token)
    if part_ptrs[3] is not None:
        seq_start = tl.load(part_ptrs[3] + token, mask=mask, other=0)
    return list_ptr, part, seq_start


@triton.jit
def _locate_part(entry, lists, mask, row, S, SINCE: tl.constexpr, C: tl.constexpr):
    """A listed block's part of each row, and whether there is one."""
    list_ptr, part, seq_start = lists
    j = tl.load(list_ptr + entry, mask=mask, other=-1)
    far = mask & is_far(j, seq_start, row, C.SELECT_BLOCK, SINCE)
    far = far & (seq_start + j.to(tl.int64) * C.SELECT_BLOCK < S)
    return part + entry * C.G, far


@triton.jit
def merge_parts(
    part_ptrs,  # of :class:`Parts`
    first_head,  # of the parts: b*K + kv_head
    b,
    kv_head,
    token,
    head,
    mask,
    T,
    S,
    q_start,
    KV_HEADS,
    SINCE: tl.constexpr,
    C: tl.constexpr,
):
    """m_i, l_i and acc of the far blocks of a query tile's rows."""
    m_i = tl.full([C.BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.full([C.BLOCK_M], 0.0, tl.float32)
    acc = zeros(C.BLOCK_M, C.BLOCK_DV)
    lists = _locate_lists(part_ptrs, first_head, b, kv_head, token, head, mask, T, KV_HEADS, C)
    for entry in tl.range(0, C.WIDTH):
        part, far = _locate_part(entry, lists, mask, q_start + token, S, SINCE, C)
        lse = tl.load(part_ptrs[1] + part, mask=far, other=float("-inf"))
        out = load_rows(part_ptrs[0] + part * C.V, None, 1, far, C.V, C.BLOCK_DV)
        m_new = tl.maximum(m_i, lse)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - m_safe)
        weight = tl.exp2(lse - m_safe)
        l_i = l_i * alpha + weight
        acc = add_rows(scale_rows(acc, alpha[:, None]), scale_rows(out, weight[:, None]))
        m_i = m_new
    return m_i, l_i, acc


@triton.jit
def add_parts(
    acc,
    part_ptrs,
    first_head,
    b,
    kv_head,
    token,
    head,
    mask,
    T,
    S,
    q_start,
    KV_HEADS,
    SINCE: tl.constexpr,
    C: tl.constexpr,
):
    """acc plus the dq of the far blocks, arguments as of :func:`merge_parts`."""
    lists = _locate_lists(part_ptrs, first_head, b, kv_head, token, head, mask, T, KV_HEADS, C)
    for entry in tl.range(0, C.WIDTH):
        part, far = _locate_part(entry, lists, mask, q_start + token, S, SINCE, C)
        acc = add_rows(acc, load_rows(part_ptrs[0] + part * C.D, None, 1, far, C.D, C.BLOCK_D))
    return acc


@triton.jit
def _locate_chunk(
    index_ptrs, first_head, num_heads, num_blocks, KV_HEADS, BLOCK_PITCH: tl.constexpr
):
    """The pairs of a program's chunk, none past the last; the block's batch row, head and first key
    row."""
    block_ids_ptr, offsets_ptr, head_chunks_ptr, _ = index_ptrs
    chunk = tl.load(head_chunks_ptr + first_head) + tl.program_id(0)
    inside = chunk < tl.load(head_chunks_ptr + first_head + num_heads)
    begin = tl.load(offsets_ptr + chunk, mask=inside, other=0)
    end = tl.load(offsets_ptr + chunk + 1, mask=inside, other=0)
    block_id = tl.load(block_ids_ptr + begin).to(tl.int64)
    b_head = block_id // num_blocks
    first_row = block_id % num_blocks * BLOCK_PITCH
    return begin, end, b_head // KV_HEADS, b_head % KV_HEADS, first_row


@triton.jit
def _load_block(k_ptr, v_ptr, k_strides, v_strides, b, kv_head, first_row, S, C: tl.constexpr):
    """Keys and values of a block, and which of its rows exist."""
    n = tl.arange(0, C.BLOCK_N)
    exists = (n < C.SELECT_BLOCK) & (first_row + n < S)
    k_ptr += b * k_strides[0] + kv_head * k_strides[2] + first_row * k_strides[1]
    v_ptr += b * v_strides[0] + kv_head * v_strides[2] + first_row * v_strides[1]
    k = load_rows(k_ptr + n * k_strides[1], None, 1, exists, C.D, C.BLOCK_D)
    v = load_rows(v_ptr + n * v_strides[1], None, 1, exists, C.V, C.BLOCK_DV)
    return k, v, exists


@kernel(do_not_specialize=["T", "S", "first_head", "num_heads", "num_blocks"])
def nsa_selected_fwd_far(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # of :class:`Parts`; written, as is the next
    lse_ptr,
    index_ptrs,  # block ids, offsets, head chunks and entries of :class:`.InverseIndex`
    q_strides,
    k_strides,
    v_strides,
    T,
    S,
    first_head,
    num_heads,  # of the parts
    KV_HEADS,
    num_blocks,
    scale_log2,
    BLOCK_PITCH: tl.constexpr,
    C: tl.constexpr,
):
    begin, end, b, kv_head, first_row = _locate_chunk(
        index_ptrs, first_head, num_heads, num_blocks, KV_HEADS, BLOCK_PITCH
    )
    if begin < end:
        row = tl.arange(0, C.BLOCK_M)
        slot = row // C.G
        k, v, exists = _load_block(k_ptr, v_ptr, k_strides, v_strides, b, kv_head, first_row, S, C)
        q_rows = q_ptr + b * q_strides[0] + (kv_head * C.G + row % C.G) * q_strides[2]
        first_entry = b * T * C.WIDTH
        part = (b * KV_HEADS + kv_head - first_head) * T * C.WIDTH

        for pair in tl.range(begin, end, C.TOKENS):
            mask = (slot < C.TOKENS) & (pair + slot < end)
            # rows past the end are the last token's again
            entry = tl.load(index_ptrs[3] + tl.minimum(pair + slot, end - 1)) - first_entry
            q_at = q_rows + entry // C.WIDTH * q_strides[1]
            q = load_rows(q_at, None, 1, None, C.D, C.BLOCK_D)
            s = dot_rows(q, k, C)
            s = tl.where(exists[None, :], s * scale_log2, float("-inf"))
            m_i = tl.max(s, 1)
            m_i = tl.where(m_i == float("-inf"), 0.0, m_i)
            p = tl.exp2(s - m_i[:, None])
            l_i = tl.sum(p, 1)
            acc = add_products(zeros(C.BLOCK_M, C.BLOCK_DV), p, v, C)
            acc = scale_rows(acc, (1.0 / tl.where(l_i == 0.0, 1.0, l_i))[:, None])
            at = (part + entry) * C.G + row % C.G
            store_rows(out_ptr + at * C.V, None, acc, mask, C.V, C.BLOCK_DV)
            tl.store(lse_ptr + at, m_i + tl.log2(l_i), mask=mask)


@kernel(do_not_specialize=["T", "S", "first_head", "num_heads", "num_blocks"])
def nsa_selected_bwd_dq_far(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    row_ptrs,  # lse, delta and, with WEIGHTED, the weight of each row: [B, T, H], contiguous
    dq_ptr,  # sums of :class:`Parts`; written
    index_ptrs,  # as of :func:`nsa_selected_fwd_far`
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    T,
    S,
    first_head,
    num_heads,
    KV_HEADS,
    num_blocks,
    scale_log2,
    scale,
    BLOCK_PITCH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    C: tl.constexpr,
):
    begin, end, b, kv_head, first_row = _locate_chunk(
        index_ptrs, first_head, num_heads, num_blocks, KV_HEADS, BLOCK_PITCH
    )
    if begin < end:
        row = tl.arange(0, C.BLOCK_M)
        slot = row // C.G
        k, v, exists = _load_block(k_ptr, v_ptr, k_strides, v_strides, b, kv_head, first_row, S, C)
        head = kv_head * C.G + row % C.G
        q_rows = q_ptr + b * q_strides[0] + head * q_strides[2]
        dout_rows = dout_ptr + b * dout_strides[0] + head * dout_strides[2]
        first_entry = b * T * C.WIDTH
        part = (b * KV_HEADS + kv_head - first_head) * T * C.WIDTH

        for pair in tl.range(begin, end, C.TOKENS, disable_licm=True):
            mask = (slot < C.TOKENS) & (pair + slot < end)
            entry = tl.load(index_ptrs[3] + tl.minimum(pair + slot, end - 1)) - first_entry
            token = entry // C.WIDTH
            q = load_rows(q_rows + token * q_strides[1], None, 1, None, C.D, C.BLOCK_D)
            dout = load_rows(dout_rows + token * dout_strides[1], None, 1, None, C.V, C.BLOCK_DV)
            at = (b * T + token) * (KV_HEADS * C.G) + head
            lse_log2 = tl.load(row_ptrs[0] + at) * LOG2_E
            delta = tl.load(row_ptrs[1] + at)
            s = dot_rows(q, k, C)
            dp = dot_rows(dout, v, C)
            # as in :mod:`.bwd_dq`
            p = tl.exp2(tl.minimum(s * scale_log2 - lse_log2[:, None], 0.0))
            if WEIGHTED:
                p *= tl.load(row_ptrs[2] + at)[:, None]
            ds = p * tl.where(exists[None, :], dp - delta[:, None], 0.0)
            dq = scale_rows(add_products(zeros(C.BLOCK_M, C.BLOCK_D), ds, k, C), scale)
            at = (part + entry) * C.G + row % C.G
            store_rows(dq_ptr + at * C.D, None, dq, mask, C.D, C.BLOCK_D)
