"""Selection of a step (paper Eq. 8-12), and the compressed branch's output.

A query and key/value head has two kinds of programs. Some sum columns of the compressed branch's
partial results. The others rank BLOCKS selection blocks each, and the last of them merges their
lists. ``R = l'/d`` compressed blocks begin in a selection block; block ``j`` scores the weighted
sum of ``p[j*R + m]`` over m, every block by the same operations in the same order (equal scores
must stay equal).

B sequences, S queries of each, N compressed blocks, K key/value heads, G heads per group, V value
size, n blocks selected; C is a :class:`~nsa.backends.compiled.decode.tiles.Constants`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.decode.compressed import last_visible
from nsa.backends.compiled.decode.parts import is_last, merge_parts, merge_stats
from nsa.backends.compiled.select.topn import (
    forced_blocks,
    limit_mass,
    make_list,
    most_blocks,
    score_bits,
    score_keys,
    store_lists,
)

UNROLLED = tl.constexpr(16)  # compressed blocks of a selection block whose loads may overlap


@triton.jit
def _add_overlap(score, scores_ptr, lse, j, m, last, row, row_mask, C: tl.constexpr):
    """Adds the share of compressed blocks ``j*R + m`` to the scores ``[BLOCKS]`` of blocks j."""
    RATIO: tl.constexpr = C.SELECT_BLOCK // C.COMPRESS_STRIDE
    SPAN: tl.constexpr = C.COMPRESS_BLOCK // C.COMPRESS_STRIDE
    i = j * RATIO + m
    inside = ((i >= 0) & (i <= last))[:, None] & row_mask[None, :]
    at = i.to(tl.int64)[:, None] * C.ROWS + row[None, :]
    s = tl.load(scores_ptr + at, mask=inside, other=float("-inf"))
    p = tl.sum(tl.exp2(s.to(tl.float32) - lse[None, :]), 1)
    return score + p * (tl.minimum(m + SPAN, RATIO) - tl.maximum(m, 0)).to(tl.float32)


@triton.jit
def block_scores(scores_ptr, lse, j, last, row, row_mask, C: tl.constexpr):
    """fp32 ``[BLOCKS]`` of blocks j; lse ``[BLOCK_GROUP]`` in base 2, last the last key seen."""
    RATIO: tl.constexpr = C.SELECT_BLOCK // C.COMPRESS_STRIDE
    SPAN: tl.constexpr = C.COMPRESS_BLOCK // C.COMPRESS_STRIDE
    score = tl.full([j.shape[0]], 0.0, tl.float32)
    zero = last * 0
    if RATIO + SPAN <= UNROLLED:
        for m in tl.static_range(1 - SPAN, RATIO):
            score = _add_overlap(score, scores_ptr, lse, j, zero + m, last, row, row_mask, C)
    else:
        for m in range(1 - SPAN, RATIO):
            score = _add_overlap(score, scores_ptr, lse, j, zero + m, last, row, row_mask, C)
    return score


@triton.jit(do_not_specialize=["N", "splits", "num_chunks"])
def nsa_decode_select(
    position_ptr,  # [B]
    scores_ptr,  # of :func:`.compressed.nsa_decode_compressed`
    part_ptrs,  # likewise
    keys_ptr,  # int64 [B, S, K, num_chunks, SLOTS]
    mass_ptr,  # fp32 [B, S, K, num_chunks], with C.ENOUGH
    counters_ptr,  # [B, S, K], zeros
    out_cmp_ptr,  # fp32 [B, S, H, V], contiguous; written
    block_idx_ptr,  # [B, S, K, n], contiguous; written
    N,
    splits,
    KV_HEADS,
    num_chunks,  # 0: nothing is selected
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
):
    SLICES: tl.constexpr = (C.V + COLUMNS - 1) // COLUMNS
    pid = tl.program_id(0)
    kv_head = pid % KV_HEADS
    role = pid // KV_HEADS % (num_chunks + SLICES)
    query = (pid // KV_HEADS // (num_chunks + SLICES)).to(tl.int64)
    b = query // C.S
    s = (query % C.S).to(tl.int32)
    position = tl.load(position_ptr + b) + s
    last = tl.minimum(last_visible(position, C), N - 1)
    head_row = b * KV_HEADS + kv_head
    g = tl.arange(0, C.BLOCK_GROUP)
    row = s * C.G + g
    row_mask = g < C.G
    # those of the last query, as the launch before wrote them
    newest = tl.minimum(last_visible(position - s + (C.S - 1), C), N - 1)
    count = (newest + KEYS) // KEYS
    if role >= num_chunks:
        e = (role - num_chunks) * COLUMNS + tl.arange(0, COLUMNS)
        first = head_row * splits
        out = merge_parts(part_ptrs, first, count, row, row_mask, e, C.ROWS, C.V, PARTS, STEP)
        at = (query * KV_HEADS + kv_head) * C.G + g
        inside = row_mask[:, None] & (e < C.V)[None, :]
        tl.store(out_cmp_ptr + at[:, None] * C.V + e[None, :], out, mask=inside)
    else:
        if keys_ptr is not None:
            q_block = position // C.SELECT_BLOCK
            one = tl.full((1,), 0, tl.int32)
            most = most_blocks(one + position, C)
            selects_all = one + q_block < most
            last_scored = q_block - C.NUM_LOCAL
            if C.ENOUGH is not None:
                selects_all = one + q_block < 0
                last_scored = q_block
            last_scored = tl.where(tl.max(selects_all.to(tl.int32), 0) > 0, -1, last_scored)
            active = tl.maximum(last_scored + BLOCKS, 0) // BLOCKS
            list_row = query * KV_HEADS + kv_head
            slot = tl.arange(0, C.SLOTS)
            if role < active:
                m_i, l_i = merge_stats(
                    part_ptrs[1], head_row * splits, count, row, row_mask, C.ROWS, PARTS
                )
                # nothing for the rows that fill up a group, nor for a query that sees no block
                empty = l_i == 0.0
                lse = tl.where(empty, float("inf"), m_i + tl.log2(tl.where(empty, 1.0, l_i)))
                j = role * BLOCKS + tl.arange(0, BLOCKS)
                scores_ptr += head_row * N * C.ROWS
                score = block_scores(scores_ptr, lse, j, last, row, row_mask, C)
                ranked = (j >= C.NUM_INITIAL) & (j <= q_block - C.NUM_LOCAL)
                bits = score_bits(score[None, :], ranked[None, :])
                best = tl.topk(score_keys(bits, j, C), C.SLOTS)
                at = (list_row * num_chunks + role) * C.SLOTS + slot
                tl.store(keys_ptr + at[None, :], best)
                if C.ENOUGH is not None:
                    forced = (j <= q_block) & (ranked == 0)
                    mass = tl.sum(tl.where(forced, score, 0.0), 0)
                    tl.store(mass_ptr + list_row * num_chunks + role, mass)
            if is_last(counters_ptr + list_row, num_chunks):
                block, occupied = forced_blocks(slot, one + q_block, selects_all, C)
                topn = make_list(slot, block, occupied, most)
                # an ascending list against a descending one, as in add_scores
                x = tl.arange(0, BLOCKS)
                keys_ptr += list_row * num_chunks * C.SLOTS
                for begin in range(0, active * C.SLOTS, BLOCKS):
                    inside = begin + x < active * C.SLOTS
                    keys = tl.load(
                        keys_ptr + begin + x, mask=inside, other=-1, cache_modifier=".cg"
                    )
                    topn = tl.bitonic_merge(tl.maximum(topn, tl.topk(keys[None, :], C.SLOTS)))
                if C.ENOUGH is not None:
                    forced_mass = tl.full((1,), 0.0, tl.float32)
                    mass_ptr += list_row * num_chunks
                    for chunk in range(active):
                        forced_mass += tl.load(mass_ptr + chunk, cache_modifier=".cg")
                    topn = limit_mass(topn, forced_mass, C)
                out_ptr = block_idx_ptr + (list_row + one) * C.NUM_SELECTED
                store_lists(out_ptr, 0, one + 1, topn, slot, 1, C)
