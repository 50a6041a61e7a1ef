"""Selection in one kernel: scores (paper Eq. 8-10) and the n best blocks of every query, streamed.

B batch, T query tokens, N compressed blocks, J selection blocks, H query heads, K key/value heads,
G heads per group, D key size, n blocks selected; C is a
:class:`~nsa.backends.compiled.select.tiles.Constants`.

A program takes a few tokens of one key/value head, all G heads of them as rows of one tile, and
walks over the selection blocks, BLOCK_N of them at a time. ``R = l'/d`` compressed blocks begin in
a selection block; block ``j`` scores the weighted sum of ``p[j*R + m]`` over m, of which the last
``l/d - 1`` also reach into block ``j + 1``. Each step of the loop is one m: a product of the rows
with the keys ``j*R + m`` of BLOCK_N blocks j, so that the overlap map needs no shuffling of
columns, and every block is summed by the same operations in the same order (equal scores must stay
equal).

The best blocks so far are int64 keys, score bits above, inverted index below: the largest keys are
the best blocks, ties to the lower index. Forced blocks are in the list before the loop starts, and
queries that may select all their candidates skip the scores altogether.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.common import LOG2_E

NO_BLOCK = tl.constexpr(2**31 - 1)
FORCED = tl.constexpr(0x7FFFFFFF << 32)  # above the bits of every float, infinity included
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def _sum_heads(x, C: tl.constexpr):
    """``[TOKENS * BLOCK_GROUP, BLOCK_N]`` -> ``[TOKENS, BLOCK_N]``."""
    return tl.sum(tl.reshape(x, (C.TOKENS, C.BLOCK_GROUP, C.BLOCK_N)), axis=1)


@triton.jit
def _merge(topn, keys, SLOTS: tl.constexpr):
    """The largest keys of both, ascending; topn is ascending, both ``[TOKENS, ...]``."""
    # an ascending list against a descending one: the pairwise maxima are the largest of both, and
    # they rise and fall once, which is what the last step of a bitonic sort puts in order
    return tl.bitonic_merge(tl.maximum(topn, tl.topk(keys, SLOTS)))


@triton.jit
def _add_scored(
    topn,
    q,
    lse,
    in_sequence,
    position,
    q_block,
    selects_all,
    k_ptr,
    cmp_seq_start,
    k_strides,
    N,
    scale,
    C: tl.constexpr,
):
    """Merges the scored blocks of one sequence into ``topn`` int64 ``[TOKENS, SLOTS]``.

    q ``[BLOCK_M, BLOCK_D]``; lse fp32 ``[BLOCK_M]``; in_sequence, position, q_block, selects_all
    ``[TOKENS]``: whether the token belongs to this sequence, its position, its block, whether it
    selects all its candidates.
    """
    BLOCK_M: tl.constexpr = C.TOKENS * C.BLOCK_GROUP
    RATIO: tl.constexpr = C.SELECT_BLOCK // C.COMPRESS_STRIDE
    SPAN: tl.constexpr = C.COMPRESS_BLOCK // C.COMPRESS_STRIDE
    # rows of other sequences compute for nothing: a token's scores do not mix with another's
    per_row = tl.broadcast_to(position[:, None], (C.TOKENS, C.BLOCK_GROUP))
    row_position = tl.reshape(per_row, (BLOCK_M,))
    lse_log2 = lse * LOG2_E
    ranks = in_sequence & (selects_all == 0)
    last_block = tl.max(tl.where(ranks, q_block - C.NUM_LOCAL, -1), 0)
    seen_by_all = tl.min(tl.where(in_sequence, position, 2147483647), 0)

    column = tl.arange(0, C.BLOCK_N)
    d = tl.arange(0, C.BLOCK_D)
    own_part = tl.full((BLOCK_M, C.BLOCK_N), 0.0, tl.float32)
    next_part = tl.full((C.TOKENS, C.BLOCK_N), 0.0, tl.float32)
    carry = tl.full((C.TOKENS,), 0.0, tl.float32)
    least = (tl.min(topn, 1) >> 32).to(tl.int32)
    # one loop over blocks and steps, so that loads are fetched ahead across blocks
    for step in range((last_block + C.BLOCK_N) // C.BLOCK_N * RATIO):
        j0 = step // RATIO * C.BLOCK_N
        m = step % RATIO
        i = (j0 + column) * RATIO + m
        k = tl.load(
            k_ptr
            + (cmp_seq_start + i)[:, None].to(tl.int64) * k_strides[1]
            + d[None, :] * k_strides[3],
            mask=(cmp_seq_start + i < N)[:, None] & (d < C.D)[None, :],
            other=0.0,
        )
        if C.IEEE:
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        else:
            s = tl.dot(q, tl.trans(k))
        newest = (j0 + C.BLOCK_N - 1) * RATIO + m
        if newest * C.COMPRESS_STRIDE + C.COMPRESS_BLOCK - 1 > seen_by_all:
            last_token = i * C.COMPRESS_STRIDE + C.COMPRESS_BLOCK - 1
            s = tl.where(last_token[None, :] <= row_position[:, None], s, float("-inf"))
        p = tl.exp(s - lse[:, None]) if C.IEEE else tl.exp2(s * scale - lse_log2[:, None])
        # compressed block j*R + m begins m strides into selection block j and is SPAN strides long
        own_part += p * (tl.minimum(m + SPAN, RATIO) - m)
        if SPAN > 1:
            beyond = m + SPAN - RATIO
            if beyond > 0:
                part = _sum_heads(p, C)
                next_part += part * beyond
        if m == RATIO - 1:
            score = _sum_heads(own_part, C)
            own_part = tl.full((BLOCK_M, C.BLOCK_N), 0.0, tl.float32)
            if SPAN > 1:
                left = tl.broadcast_to(tl.maximum(column - 1, 0)[None, :], (C.TOKENS, C.BLOCK_N))
                from_left = tl.gather(next_part, left, 1)
                score += tl.where(column[None, :] == 0, carry[:, None], from_left)
                carry = tl.sum(tl.where(column[None, :] == C.BLOCK_N - 1, next_part, 0.0), 1)
                next_part = tl.full((C.TOKENS, C.BLOCK_N), 0.0, tl.float32)
            j = j0 + column
            # not a number would sort as an enormous score or as no block at all
            bits = tl.minimum(tl.maximum(score.to(tl.int32, bitcast=True), 0), INFINITY_BITS)
            before_local = j[None, :] <= (q_block - C.NUM_LOCAL)[:, None]
            ranked = before_local & (j >= C.NUM_INITIAL)[None, :]
            bits = tl.where(ranked & ranks[:, None], bits, -1)
            # an equal score gets in by its lower index alone, and these are higher than all before
            better = (bits > least[:, None]).to(tl.int32)
            if tl.max(tl.max(better, 1), 0) > 0:
                inverted = tl.broadcast_to((j ^ NO_BLOCK)[None, :], (C.TOKENS, C.BLOCK_N))
                keys = tl.where(bits < 0, -1, (bits.to(tl.int64) << 32) | inverted.to(tl.int64))
                topn = _merge(topn, keys, C.SLOTS)
                least = (tl.min(topn, 1) >> 32).to(tl.int32)
    return topn


@triton.jit(do_not_specialize=["T", "N", "num_tiles", "q_start"])
def nsa_select_topn(
    q_ptr,
    k_ptr,
    lse_ptr,
    block_idx_ptr,  # [B, T, K, n], contiguous; written
    seq_start_ptr,  # [T], with PACKED, as is the next
    cmp_seq_start_ptr,
    q_strides,
    k_strides,
    lse_strides,
    T,
    N,
    KV_HEADS,
    num_tiles,
    q_start,
    scale,  # without C.IEEE: times log2(e)
    C: tl.constexpr,
):
    # the last tiles have the most to do and go first
    pid = tl.program_id(0)
    heads = tl.num_programs(0) // num_tiles
    tile = num_tiles - 1 - pid // heads
    b = (pid % heads // KV_HEADS).to(tl.int64)
    kv_head = (pid % heads % KV_HEADS).to(tl.int64)

    row = tl.arange(0, C.TOKENS * C.BLOCK_GROUP)
    d = tl.arange(0, C.BLOCK_D)
    row_t = tile * C.TOKENS + row // C.BLOCK_GROUP
    row_h = row % C.BLOCK_GROUP
    row_mask = (row_t < T) & (row_h < C.G)
    head = kv_head * C.G + row_h
    q = tl.load(
        q_ptr
        + b * q_strides[0]
        + row_t[:, None].to(tl.int64) * q_strides[1]
        + head[:, None] * q_strides[2]
        + d[None, :] * q_strides[3],
        mask=row_mask[:, None] & (d < C.D)[None, :],
        other=0.0,
    )
    lse_row = b * lse_strides[0] + row_t.to(tl.int64) * lse_strides[1] + head * lse_strides[2]
    lse = tl.load(lse_ptr + lse_row, mask=row_mask, other=float("inf"))
    # exp(-inf): nothing for the rows that fill up a group, nor for a query that sees no block
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    k_ptr += b * k_strides[0] + kv_head * k_strides[2]

    t = tile * C.TOKENS + tl.arange(0, C.TOKENS)
    mask = t < T
    if C.PACKED:
        seq_start = tl.load(seq_start_ptr + t, mask=mask, other=0)
        position = t - seq_start
    else:
        position = t + q_start
    q_block = position // C.SELECT_BLOCK
    selects_all = q_block < C.NUM_SELECTED

    slot = tl.arange(0, C.SLOTS)
    local = q_block[:, None] - (C.NUM_LOCAL - 1) + (slot - C.NUM_INITIAL)[None, :]
    forced = tl.where((slot < C.NUM_INITIAL)[None, :], slot[None, :], local)
    block = tl.where(selects_all[:, None], slot[None, :], forced)
    known = tl.where(selects_all, q_block + 1, C.NUM_INITIAL + C.NUM_LOCAL)
    # SLOTS - n slots are occupied by a "block" that outranks all others and is written as -1
    block = tl.where((slot < C.NUM_SELECTED)[None, :], block, NO_BLOCK)
    occupied = (slot[None, :] < known[:, None]) | (slot >= C.NUM_SELECTED)[None, :]
    topn = (block ^ NO_BLOCK).to(tl.int64) | FORCED
    topn = tl.sort(tl.where(occupied, topn, -1))

    if C.PACKED:
        first = tile * C.TOKENS
        end = tl.minimum(first + C.TOKENS, T)
        while first < end:
            in_sequence = mask & (seq_start == tl.load(seq_start_ptr + first))
            cmp_seq_start = tl.load(cmp_seq_start_ptr + first)
            topn = _add_scored(
                *(topn, q, lse, in_sequence, position, q_block, selects_all),
                *(k_ptr, cmp_seq_start, k_strides, N, scale),
                C,
            )
            first += tl.sum(in_sequence.to(tl.int32), 0)
    else:
        topn = _add_scored(
            *(topn, q, lse, mask, position, q_block, selects_all),
            *(k_ptr, 0, k_strides, N, scale),
            C,
        )

    index = (topn & 0xFFFFFFFF).to(tl.int32) ^ NO_BLOCK
    index = tl.sort(tl.where(topn < 0, NO_BLOCK, index))
    row_ptr = block_idx_ptr + ((b * T + t.to(tl.int64)) * KV_HEADS + kv_head) * C.NUM_SELECTED
    index = tl.where(index == NO_BLOCK, -1, index)
    out_mask = mask[:, None] & (slot < C.NUM_SELECTED)[None, :]
    tl.store(row_ptr[:, None] + slot[None, :], index, mask=out_mask)
