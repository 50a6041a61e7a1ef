"""The compressed branch of a step (paper Eq. 7): partial results, and scores by selection block.

A program takes a run of keys of one sequence and key/value head, for all its query rows at once.
The first run's programs also zero the counters of the two launches that follow.

Exponentials are taken over a whole power of two, so that equal scores are equal in all runs.

B sequences, S queries of each, N compressed blocks, J selection blocks, K key/value heads, G heads
per group, D key size, V value size; C is a
:class:`~nsa.backends.compiled.decode.tiles.Constants`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.decode.parts import (
    add_keys,
    empty_part,
    end_unit,
    let_next_start,
    load_queries,
    load_rows,
    store_part,
    weigh,
)
from nsa.core.kernel import kernel


@triton.jit
def last_visible(position, C: tl.constexpr):
    """The last compressed block that a query sees, −1 if none."""
    whole = position - (C.COMPRESS_BLOCK - 1)
    return tl.where(whole >= 0, whole // C.COMPRESS_STRIDE, -1)


@triton.jit
def _store_scores(sums_ptr, p, first_block, row, row_mask, C: tl.constexpr):
    """Of each selection block: what its keys weigh for itself and for the block after it.

    p ``[BLOCK_M, TILE_BLOCKS * WIDE]``; ``sums_ptr [J, 2, S * G]``.
    """
    SPAN: tl.constexpr = C.COMPRESS_BLOCK // C.COMPRESS_STRIDE
    p = tl.reshape(p, (C.BLOCK_M, C.TILE_BLOCKS, C.WIDE))
    m = tl.arange(0, C.WIDE)
    block = first_block + tl.arange(0, C.TILE_BLOCKS)
    at = block[None, :] * (2 * C.ROWS) + row[:, None]
    # compressed block j*R + m begins m strides into selection block j and is SPAN strides long
    own = (tl.minimum(m + SPAN, C.RATIO) - m).to(tl.float32)
    tl.store(sums_ptr + at, tl.sum(p * own[None, None, :], 2), mask=row_mask[:, None])
    if SPAN > 1:
        beyond = tl.maximum(m + SPAN - C.RATIO, 0).to(tl.float32)
        after = tl.sum(p * beyond[None, None, :], 2)
        tl.store(sums_ptr + at + C.ROWS, after, mask=row_mask[:, None])


@kernel(
    do_not_specialize=["N", "splits", "num_tiles", "num_rows"],
    do_not_specialize_on_alignment=["position_ptr"],
)
def nsa_decode_compressed(
    q_ptr,
    position_ptr,  # [B]
    k_ptr,
    v_ptr,
    score_ptrs,  # sums [B, K, J, 2, S * G] over the largest scores [B, K, num_tiles, S * G]
    part_ptrs,  # of parts [B, K, splits]
    counters_ptr,  # [2, B, S, K]
    q_strides,
    k_strides,
    v_strides,
    N,
    splits,
    num_tiles,
    KV_HEADS,
    num_rows,  # B * S * K
    scale_log2,
    KEYS: tl.constexpr,
    UNIT: tl.constexpr,  # keys of one, KEYS or a part of them
    SCORES: tl.constexpr,
    C: tl.constexpr,
):
    ROW_TILES: tl.constexpr = (C.ROWS + C.BLOCK_M - 1) // C.BLOCK_M
    QUERIES: tl.constexpr = C.S
    let_next_start(C)
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
        n = tl.arange(0, C.TILE_BLOCKS * C.WIDE)
        x = n
        if C.WIDE != C.RATIO:
            x = n // C.WIDE * C.RATIO + n % C.WIDE
        m_i, l_i, acc = empty_part(C.BLOCK_M, C.BLOCK_DV)
        l_group, group = l_i, acc
        for first in range(begin, end, C.TILE_BLOCKS * C.RATIO):
            i = first + x
            mask = i < end
            if C.WIDE != C.RATIO:
                mask = mask & (n % C.WIDE < C.RATIO)
            tile_ptr = k_ptr + tl.cast(first, tl.int64) * k_strides[1]
            k = load_rows(tile_ptr, x * k_strides[1], mask, C.D, C.BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=C.PRECISION) * scale_log2
            s = tl.where(mask[None, :] & (i[None, :] <= last[:, None]), s, float("-inf"))
            m_i, m_safe, p, alpha = weigh(m_i, s)
            if SCORES:
                at = head_row * num_tiles + first // (C.TILE_BLOCKS * C.RATIO)
                tl.store(score_ptrs[1] + at * C.ROWS + row, m_safe, mask=row_mask)
                sums_ptr = score_ptrs[0] + head_row * num_tiles * (C.TILE_BLOCKS * 2 * C.ROWS)
                _store_scores(sums_ptr, p, first // C.RATIO, row, row_mask, C)
            tile_ptr = v_ptr + tl.cast(first, tl.int64) * v_strides[1]
            v = load_rows(tile_ptr, x * v_strides[1], mask, C.V, C.BLOCK_DV)
            if KEYS > UNIT:
                ended = first % UNIT == 0
                l_i, acc, l_group, group = end_unit(l_i, acc, l_group, group, ended)
            l_i, acc, l_group, group = add_keys(l_i, acc, l_group, group, p, alpha, v, C)
        if KEYS > UNIT:
            l_i, acc = l_group + l_i, group + acc
        part = head_row * splits + split
        store_part(part_ptrs, part, row, row_mask, m_i, l_i, acc, C.ROWS, C.V)
