"""Selection in one kernel: scores (paper Eq. 8-10) and the n best blocks of every query, streamed.

B batch, T query tokens, L leading ones, N compressed blocks, J selection blocks, H query heads,
K key/value heads, G heads per group, D key size, n blocks selected; C is a
:class:`~nsa.backends.compiled.select.tiles.Constants`.

A program takes a few tokens of one key/value head, all G heads of them as rows of one tile, and
walks over the selection blocks, BLOCK_N of them at a time. ``R = l'/d`` compressed blocks begin in
a selection block; block ``j`` scores the weighted sum of ``p[j*R + m]`` over m, of which the last
``l/d - 1`` also reach into block ``j + 1``. Each step of the loop is one m: a product of the rows
with the keys ``j*R + m`` of BLOCK_N blocks j, so that the overlap map needs no shuffling of
columns, and every block is summed by the same operations in the same order (equal scores must stay
equal).

Forced blocks are in the list (:mod:`.topn`) before the loop starts, and queries that may select all
their candidates skip the scores altogether, unless the score itself says how many they are.

With C.REGION the "blocks" are regions (:mod:`.regions`), each with one key; none is forced, and
those that are searched in any case are not ranked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.select.scores import (
    leading_tokens,
    lists_after,
    load_keys,
    load_queries,
    probabilities,
    products,
    round_queries,
    sum_heads,
)
from nsa.backends.compiled.select.topn import (
    add_scores,
    forced_blocks,
    least_bits,
    limit_mass,
    make_list,
    most_blocks,
    store_lists,
)
from nsa.core.kernel import kernel


@triton.jit
def last_region(
    position,
    SELECT_BLOCK: tl.constexpr,
    LATE: tl.constexpr,
    REGION: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
):
    """The last region that is ranked, −1 if none is: no local block, all its keys are seen.

    LATE is l - d: so many tokens after a region its last compressed block ends.
    """
    before_local = tl.maximum(position // SELECT_BLOCK - (NUM_LOCAL - 1), 0) // REGION
    whole = tl.maximum(position + 1 - LATE, 0) // (REGION * SELECT_BLOCK)
    return tl.minimum(before_local, whole) - 1


@triton.jit
def _add_scored(
    topn,
    forced_mass,
    q,
    lse,
    scores,
    position,
    q_block,
    last_ranked,
    in_sequence,
    k_ptr,
    k_scale_ptr,
    cmp_seq_start,
    k_strides,
    N,
    KV_HEADS,
    scale,
    C: tl.constexpr,
):
    """Merges the scored blocks of one sequence into ``topn`` int64 ``[TOKENS, SLOTS]``, and with
    C.ENOUGH adds the forced ones' scores to ``forced_mass`` fp32 ``[TOKENS]``.

    q ``[BLOCK_M, BLOCK_D]``; lse fp32 ``[BLOCK_M]``; scores, position, q_block, last_ranked,
    in_sequence ``[TOKENS]``: whether the token needs scores, its position, its block, the last
    block that is ranked, whether the token belongs to this sequence.
    """
    BLOCK_M: tl.constexpr = C.TOKENS * C.BLOCK_GROUP
    RATIO: tl.constexpr = C.SELECT_BLOCK // C.COMPRESS_STRIDE
    SPAN: tl.constexpr = C.COMPRESS_BLOCK // C.COMPRESS_STRIDE
    # rows of other sequences compute for nothing: a token's scores do not mix with another's
    per_row = tl.broadcast_to(position[:, None], (C.TOKENS, C.BLOCK_GROUP))
    row_position = tl.reshape(per_row, (BLOCK_M,))
    ranks = in_sequence & scores
    last_scored = last_ranked
    if C.ENOUGH is not None:
        last_scored = q_block
    last_block = tl.max(tl.where(ranks, last_scored, -1), 0)
    seen_by_all = tl.min(tl.where(in_sequence, position, 2147483647), 0)

    column = tl.arange(0, C.BLOCK_N)
    own_part = tl.full((BLOCK_M, C.BLOCK_N), 0.0, tl.float32)
    next_part = tl.full((C.TOKENS, C.BLOCK_N), 0.0, tl.float32)
    carry = tl.full((C.TOKENS,), 0.0, tl.float32)
    least = least_bits(topn)
    # one loop over blocks and steps, so that loads are fetched ahead across blocks
    for step in range((last_block + C.BLOCK_N) // C.BLOCK_N * RATIO):
        j0 = step // RATIO * C.BLOCK_N
        m = step % RATIO
        i = (j0 + column) * RATIO + m
        row = cmp_seq_start + i
        k, k_scale = load_keys(k_ptr, k_scale_ptr, k_strides, row, row < N, KV_HEADS, C)
        s = products(q, k, k_scale, scale, C)
        newest = (j0 + C.BLOCK_N - 1) * RATIO + m
        if newest * C.COMPRESS_STRIDE + C.COMPRESS_BLOCK - 1 > seen_by_all:
            last_token = i * C.COMPRESS_STRIDE + C.COMPRESS_BLOCK - 1
            s = tl.where(last_token[None, :] <= row_position[:, None], s, float("-inf"))
        p = probabilities(s, scale, lse, C)
        # compressed block j*R + m begins m strides into selection block j and is SPAN strides long
        if RATIO == 1:
            own_part = p
        else:
            own_part += p * (tl.minimum(m + SPAN, RATIO) - m)
        if SPAN > 1:
            beyond = m + SPAN - RATIO
            if beyond > 0:
                part = sum_heads(p, C)
                next_part += part * beyond
        if m == RATIO - 1:
            score = sum_heads(own_part, C)
            own_part = tl.full((BLOCK_M, C.BLOCK_N), 0.0, tl.float32)
            if SPAN > 1:
                left = tl.broadcast_to(tl.maximum(column - 1, 0)[None, :], (C.TOKENS, C.BLOCK_N))
                from_left = tl.gather(next_part, left, 1)
                score += tl.where(column[None, :] == 0, carry[:, None], from_left)
                carry = tl.sum(tl.where(column[None, :] == C.BLOCK_N - 1, next_part, 0.0), 1)
                next_part = tl.full((C.TOKENS, C.BLOCK_N), 0.0, tl.float32)
            else:
                # threads hold copies of a sum over heads; gathered, it is sorted once
                own = tl.broadcast_to(column[None, :], (C.TOKENS, C.BLOCK_N))
                score = tl.gather(score, own, 1)
            j = j0 + column
            ranked = (j[None, :] <= last_ranked[:, None]) & (j >= C.NUM_INITIAL)[None, :]
            if C.ENOUGH is not None:
                forced = (j[None, :] <= q_block[:, None]) & (ranked == 0) & ranks[:, None]
                forced_mass += tl.sum(tl.where(forced, score, 0.0), 1)
            topn, least = add_scores(topn, least, score, ranked & ranks[:, None], j, C)
    return topn, forced_mass


@kernel(do_not_specialize=["T", "L", "N", "num_tiles", "q_start"])
def nsa_select_topn(
    q_ptr,
    lse_ptr,  # [B, T, H], contiguous
    k_ptr,
    k_scale_ptr,  # [B, N, K], contiguous, with FP8
    leader_ptr,  # [L + 1], the last is T, with PACKED and SHARE > 1
    seq_start_ptr,  # [T], with PACKED, as is the next
    cmp_seq_start_ptr,
    q_strides,
    k_strides,
    T,
    L,
    N,
    KV_HEADS,
    q_start,
    scale,  # without IEEE: times log2(e)
    num_tiles,
    block_idx_ptr,  # [B, T, K, n], with REGION [B, L, K, n]; contiguous; written
    C: tl.constexpr,
):
    # the last tiles have the most to do and go first
    pid = tl.program_id(0)
    heads = tl.num_programs(0) // num_tiles
    tile = num_tiles - 1 - pid // heads
    b = (pid % heads // KV_HEADS).to(tl.int64)
    kv_head = (pid % heads % KV_HEADS).to(tl.int64)

    row = tile * C.TOKENS + tl.arange(0, C.TOKENS * C.BLOCK_GROUP) // C.BLOCK_GROUP
    row_t = leading_tokens(leader_ptr, row, L, C)
    q, lse = load_queries(q_ptr, lse_ptr, q_strides, b, kv_head, row_t, T, KV_HEADS, C)
    q, scale = round_queries(q, scale, C)
    k_ptr += b * k_strides[0] + kv_head * k_strides[2]
    if C.FP8:
        k_scale_ptr += b * N * KV_HEADS + kv_head

    leader = tile * C.TOKENS + tl.arange(0, C.TOKENS)
    t = leading_tokens(leader_ptr, leader, L, C)
    mask = t < T
    if C.PACKED:
        seq_start = tl.load(seq_start_ptr + t, mask=mask, other=0)
        position = t - seq_start
    else:
        position = t + q_start
    q_block = position // C.SELECT_BLOCK
    most = most_blocks(position, C)
    slot = tl.arange(0, C.SLOTS)
    if C.REGION > 0:
        LATE: tl.constexpr = C.COMPRESS_BLOCK - C.COMPRESS_STRIDE
        last_ranked = last_region(position, C.SELECT_BLOCK // C.REGION, LATE, C.REGION, C.NUM_LOCAL)
        count = last_ranked - (C.NUM_INITIAL - 1)
        scores = count > most
        block = tl.broadcast_to((C.NUM_INITIAL + slot)[None, :], (C.TOKENS, C.SLOTS))
        occupied = (slot[None, :] < count[:, None]) & (scores == 0)[:, None]
    else:
        last_ranked = q_block - C.NUM_LOCAL
        selects_all = q_block < most
        if C.ENOUGH is not None:
            selects_all = q_block < 0
        block, occupied = forced_blocks(slot, q_block, selects_all, C)
        scores = selects_all == 0
    topn = make_list(slot, block, occupied, most)

    forced_mass = tl.full((C.TOKENS,), 0.0, tl.float32)
    if C.PACKED:
        first = tile * C.TOKENS
        end = first + tl.sum(mask.to(tl.int32), 0)
        while first < end:
            first_t = leading_tokens(leader_ptr, first, L, C)
            in_sequence = mask & (seq_start == tl.load(seq_start_ptr + first_t))
            cmp_seq_start = tl.load(cmp_seq_start_ptr + first_t)
            topn, forced_mass = _add_scored(
                *(topn, forced_mass, q, lse, scores, position, q_block, last_ranked, in_sequence),
                *(k_ptr, k_scale_ptr, cmp_seq_start, k_strides, N, KV_HEADS, scale),
                C,
            )
            first += tl.sum(in_sequence.to(tl.int32), 0)
    else:
        topn, forced_mass = _add_scored(
            *(topn, forced_mass, q, lse, scores, position, q_block, last_ranked, mask),
            *(k_ptr, k_scale_ptr, 0, k_strides, N, KV_HEADS, scale),
            C,
        )

    if C.ENOUGH is not None:
        topn = limit_mass(topn, forced_mass, C)
    row_step = KV_HEADS * C.NUM_SELECTED
    if C.REGION > 0:
        out = (b * L + leader.to(tl.int64)) * row_step
        store_lists(block_idx_ptr + out + kv_head * C.NUM_SELECTED, 0, mask, topn, slot, 1, C)
    else:
        count = lists_after(leader_ptr, leader, t, T, L, C)
        out = (b * T + t.to(tl.int64)) * row_step + kv_head * C.NUM_SELECTED
        store_lists(block_idx_ptr + out, row_step, count, topn, slot, C.SHARE, C)
