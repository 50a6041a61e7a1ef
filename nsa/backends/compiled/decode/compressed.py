"""The compressed branch of a step (paper Eq. 7): partial results, and the scores of all keys.

A program takes a run of keys of one sequence and key/value head, for all its query rows at once.
The first run's programs also zero the counters of the two launches that follow.

B sequences, S queries of each, N compressed blocks, K key/value heads, G heads per group, D key
size, V value size; C is a :class:`~nsa.backends.compiled.decode.tiles.Constants`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.decode.parts import (
    add_keys,
    empty_part,
    load_queries,
    load_rows,
    store_part,
)


@triton.jit
def last_visible(position, C: tl.constexpr):
    """The last compressed block that a query sees, −1 if none."""
    whole = position - (C.COMPRESS_BLOCK - 1)
    return tl.where(whole >= 0, whole // C.COMPRESS_STRIDE, -1)


@triton.jit(do_not_specialize=["N", "splits"])
def nsa_decode_compressed(
    q_ptr,
    position_ptr,  # [B]
    k_ptr,
    v_ptr,
    scores_ptr,  # [B, K, N, S * G], base 2; None: nobody reads them
    part_ptrs,  # of parts [B, K, splits]
    counters_ptr,  # [2, B, S, K]
    q_strides,
    k_strides,
    v_strides,
    N,
    splits,
    KV_HEADS,
    num_rows,  # B * S * K
    scale_log2,
    KEYS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    C: tl.constexpr,
):
    ROW_TILES: tl.constexpr = (C.ROWS + C.BLOCK_M - 1) // C.BLOCK_M
    QUERIES: tl.constexpr = C.S
    pid = tl.program_id(0)
    kv_head = pid % KV_HEADS
    tile = pid // KV_HEADS % ROW_TILES
    split = pid // KV_HEADS // ROW_TILES % splits
    b = (pid // KV_HEADS // ROW_TILES // splits).to(tl.int64)
    if (split == 0) & (tile == 0):
        for query in tl.static_range(QUERIES):
            at = (b * C.S + query) * KV_HEADS + kv_head
            tl.store(counters_ptr + at, 0)
            tl.store(counters_ptr + num_rows + at, 0)

    position = tl.load(position_ptr + b)
    begin = split * KEYS
    end = tl.minimum(tl.minimum(begin + KEYS, N), last_visible(position + (C.S - 1), C) + 1)
    if begin < end:
        row = tile * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
        row_mask = row < C.ROWS
        s_of_row = tl.minimum(row // C.G, C.S - 1)
        last = last_visible(position + s_of_row, C)
        head = kv_head * C.G + row % C.G
        q = load_queries(q_ptr, q_strides, b, s_of_row, head, row_mask, C.D, C.BLOCK_D)
        k_ptr += b * k_strides[0] + kv_head.to(tl.int64) * k_strides[2]
        v_ptr += b * v_strides[0] + kv_head.to(tl.int64) * v_strides[2]
        head_row = b * KV_HEADS + kv_head
        n = tl.arange(0, BLOCK_N)
        m_i, l_i, acc = empty_part(C.BLOCK_M, C.BLOCK_DV)
        for first in range(begin, end, BLOCK_N):
            i = first + n
            mask = i < end
            k = load_rows(k_ptr, i.to(tl.int64) * k_strides[1], mask, C.D, C.BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=C.PRECISION) * scale_log2
            if scores_ptr is not None:
                at = (head_row * N + i)[None, :] * C.ROWS + row[:, None]
                tl.store(scores_ptr + at, s, mask=mask[None, :] & row_mask[:, None])
            s = tl.where(mask[None, :] & (i[None, :] <= last[:, None]), s, float("-inf"))
            v = load_rows(v_ptr, i.to(tl.int64) * v_strides[1], mask, C.V, C.BLOCK_DV)
            m_i, l_i, acc = add_keys(m_i, l_i, acc, s, v, C)
        part = head_row * splits + split
        store_part(part_ptrs, part, row, row_mask, m_i, l_i, acc, C.ROWS, C.V)
