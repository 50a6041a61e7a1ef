"""The exact pass over the regions that are searched, a list of blocks for each leading token.

G heads per group, D key size, n blocks selected, r blocks of a region, k regions selected; C is a
:class:`~nsa.backends.compiled.select.tiles.Constants` with TOKENS = 1.

A program takes one leading token of one key/value head, its G heads as rows. What it searches, in
ascending order: the regions of the initial blocks, the k best of :mod:`.kernel`, and the blocks
from the last region that is not ranked up to its own. BLOCK_N of these at a time; each step is one
m, as in :mod:`.kernel`, but the compressed blocks that begin before a block are read for it again,
since its left neighbour may not be searched. Sums are in the same order.
"""

from __future__ import annotations

import triton.language as tl

from nsa.backends.compiled.select.kernel import last_region
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


@kernel(do_not_specialize=["T", "L", "N", "q_start"])
def nsa_select_in_regions(
    q_ptr,
    lse_ptr,
    k_ptr,
    k_scale_ptr,  # [B, N, K], contiguous, with FP8
    leader_ptr,  # [L + 1], the last is T, with PACKED and SHARE > 1
    seq_start_ptr,  # [T], with PACKED, as is the next
    cmp_seq_start_ptr,
    q_strides,
    lse_strides,
    k_strides,
    T,
    L,
    N,
    KV_HEADS,
    q_start,
    scale,  # without IEEE: times log2(e)
    regions_ptr,  # [B, L, K, k], contiguous
    block_idx_ptr,  # [B, T, K, n], contiguous; written
    C: tl.constexpr,
):
    RATIO: tl.constexpr = C.SELECT_BLOCK // C.COMPRESS_STRIDE
    SPAN: tl.constexpr = C.COMPRESS_BLOCK // C.COMPRESS_STRIDE
    STEPS: tl.constexpr = RATIO + SPAN - 1
    FIRST_REGION: tl.constexpr = (C.NUM_INITIAL + C.REGION - 1) // C.REGION
    pid = tl.program_id(0)
    heads = tl.num_programs(0) // L
    leader = L - 1 - pid // heads
    b = (pid % heads // KV_HEADS).to(tl.int64)
    kv_head = (pid % heads % KV_HEADS).to(tl.int64)
    t = leading_tokens(leader_ptr, leader, L, C)
    if t >= T:
        return
    row_t = t + tl.full((C.BLOCK_GROUP,), 0, tl.int32)
    q, lse = load_queries(q_ptr, lse_ptr, q_strides, lse_strides, b, kv_head, row_t, T, C)
    q, scale = round_queries(q, scale, C)
    k_ptr += b * k_strides[0] + kv_head * k_strides[2]
    if C.FP8:
        k_scale_ptr += b * N * KV_HEADS + kv_head
    regions_ptr += ((b * L + leader) * KV_HEADS + kv_head) * C.NUM_REGIONS

    cmp_seq_start = 0
    position = t + q_start
    if C.PACKED:
        cmp_seq_start = tl.load(cmp_seq_start_ptr + t)
        position = t - tl.load(seq_start_ptr + t)
    q_block = position // C.SELECT_BLOCK
    LATE: tl.constexpr = C.COMPRESS_BLOCK - C.COMPRESS_STRIDE
    last = last_region(position, C.SELECT_BLOCK, LATE, C.REGION, C.NUM_LOCAL)
    ranked_regions = tl.maximum(last + 1 - FIRST_REGION, 0)
    chosen = tl.minimum(ranked_regions, C.NUM_REGIONS)
    # searched blocks by number: those of the first regions, of the chosen ones, the young ones
    chosen_from = FIRST_REGION * C.REGION
    young_from = chosen_from + chosen * C.REGION
    young = tl.maximum(last + 1, FIRST_REGION) * C.REGION
    searched = young_from + tl.maximum(q_block + 1 - young, 0)

    own = q_block + tl.full((1,), 0, tl.int32)
    most = most_blocks(position + tl.full((1,), 0, tl.int32), C)
    selects_all = (own < most) & (ranked_regions <= C.NUM_REGIONS)
    if C.ENOUGH is not None:
        selects_all = own < 0
    slot = tl.arange(0, C.SLOTS)
    block, occupied = forced_blocks(slot, own, selects_all, C)
    topn = make_list(slot, block, occupied, most)
    searched = tl.where(tl.max(selects_all.to(tl.int32), 0) > 0, 0, searched)

    column = tl.arange(0, C.BLOCK_N)
    own_part = tl.full((C.BLOCK_GROUP, C.BLOCK_N), 0.0, tl.float32)
    left_part = tl.full((1, C.BLOCK_N), 0.0, tl.float32)
    forced_mass = tl.full((1,), 0.0, tl.float32)
    least = least_bits(topn)
    for step in range((searched + C.BLOCK_N - 1) // C.BLOCK_N * STEPS):
        x = step // STEPS * C.BLOCK_N + column
        m = step % STEPS
        if m >= RATIO:
            m -= STEPS
        in_chosen = (x >= chosen_from) & (x < young_from)
        at = tl.where(in_chosen, x - chosen_from, 0)
        region = tl.load(regions_ptr + at // C.REGION, mask=in_chosen, other=0)
        j = tl.where(in_chosen, region * C.REGION + at % C.REGION, x - young_from + young)
        j = tl.where(x < chosen_from, x, j)
        i = j * RATIO + m
        seen = (i >= 0) & (i * C.COMPRESS_STRIDE + C.COMPRESS_BLOCK - 1 <= position)
        row = cmp_seq_start + i
        k, k_scale = load_keys(k_ptr, k_scale_ptr, k_strides, row, seen, KV_HEADS, C)
        s = products(q, k, k_scale, scale, C)
        s = tl.where(seen[None, :], s, float("-inf"))
        p = probabilities(s, scale, lse, C)
        # compressed block j*R + m begins m strides into selection block j and is SPAN strides long
        if m < 0:
            part = sum_heads(p, C)
            left_part += part * (m + SPAN)
        else:
            own_part += p * (tl.minimum(m + SPAN, RATIO) - m)
        if step % STEPS == STEPS - 1:
            score = sum_heads(own_part, C) + left_part
            own_part = tl.full((C.BLOCK_GROUP, C.BLOCK_N), 0.0, tl.float32)
            left_part = tl.full((1, C.BLOCK_N), 0.0, tl.float32)
            candidate = j <= q_block
            ranked = candidate & (j >= C.NUM_INITIAL) & (j <= q_block - C.NUM_LOCAL)
            if C.ENOUGH is not None:
                forced = candidate & (ranked == 0)
                forced_mass += tl.sum(tl.where(forced[None, :], score, 0.0), 1)
            topn, least = add_scores(topn, least, score, ranked[None, :], j, C)

    if C.ENOUGH is not None:
        topn = limit_mass(topn, forced_mass, C)
    count = lists_after(leader_ptr, leader, t, T, L, C) + tl.full((1,), 0, tl.int32)
    row_step = KV_HEADS * C.NUM_SELECTED
    out = (b * T + t + tl.full((1,), 0, tl.int64)) * row_step + kv_head * C.NUM_SELECTED
    store_lists(block_idx_ptr + out, row_step, count, topn, slot, C.SHARE, C)
