"""Selection of a step (paper Eq. 8-12), and what does not wait for it.

A query and key/value head has three kinds of programs. Some read the window's tokens; meanwhile
others rank selection blocks, a chunk each, and the last of them merges their lists, and others sum
columns of the compressed branch's partial results. How many there are of the last two kinds changes
no result.

B sequences, S queries of each, N compressed blocks, J selection blocks, R rows of a ring, K
key/value heads, G heads per group, V value size, n blocks selected; C is a
:class:`~nsa.backends.compiled.decode.tiles.Constants`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.decode.compressed import last_visible
from nsa.backends.compiled.decode.parts import (
    is_last,
    let_next_start,
    load_queries,
    merge_parts,
    merge_stats,
    store_part,
    wait_for_last,
)
from nsa.backends.compiled.decode.window import attend_window, oldest_visible
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
def block_scores(score_ptrs, m_i, weight, j, written, row, row_mask, C: tl.constexpr):
    """fp32 ``[BLOCKS]`` of blocks j, up to ``written`` those with a score.

    m_i and weight ``[BLOCK_GROUP]``: the whole number that exponentials are taken over, and one
    over their sum.
    """
    sums_ptr, tops_ptr = score_ptrs
    inside = (j <= written)[:, None] & row_mask[None, :]
    at = j[:, None] * (2 * C.ROWS) + row[None, :]
    own = tl.load(sums_ptr + at, mask=inside, other=0.0)
    top = j[:, None] // C.TILE_BLOCKS * C.ROWS + row[None, :]
    own *= tl.exp2(tl.load(tops_ptr + top, mask=inside, other=0.0) - m_i[None, :])
    if C.COMPRESS_BLOCK > C.COMPRESS_STRIDE:
        i = j - 1  # some of whose keys reach into block j
        inside = ((i >= 0) & (i <= written))[:, None] & row_mask[None, :]
        left = tl.load(sums_ptr + at - C.ROWS, mask=inside, other=0.0)
        top = i[:, None] // C.TILE_BLOCKS * C.ROWS + row[None, :]
        own += left * tl.exp2(tl.load(tops_ptr + top, mask=inside, other=0.0) - m_i[None, :])
    return tl.sum(own * weight[None, :], 1)


@triton.jit
def _rank_chunk(
    score_ptrs,  # of the sequence and head
    stats_ptr,
    mass_ptr,  # of the list's first tile
    first_part,
    num_parts,
    begin,
    end,
    last_ranked,
    written,
    row,
    row_mask,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    FOLD: tl.constexpr,
    C: tl.constexpr,
):
    """The best of blocks ``begin … end - 1``, int64 ``[1, SLOTS]`` as of :mod:`..select.topn`."""
    m_i, l_i = merge_stats(stats_ptr, first_part, num_parts, row, row_mask, C.ROWS, GROUPS, FOLD)
    # nothing for the rows that fill up a group, nor for a query that sees no block
    weight = tl.where(l_i == 0.0, 0.0, 1.0 / tl.where(l_i == 0.0, 1.0, l_i))
    topn = tl.full((1, C.SLOTS), -1, tl.int64)
    least = least_bits(topn)
    for first in tl.range(begin, end, BLOCKS, num_stages=1):
        j = first + tl.arange(0, BLOCKS)
        score = block_scores(score_ptrs, m_i, weight, j, written, row, row_mask, C)
        ranked = (j >= C.NUM_INITIAL) & (j <= last_ranked)
        if C.ENOUGH is not None:
            forced = (j < end) & (ranked == 0)
            mass = tl.sum(tl.where(forced, score, 0.0), 0)
            tl.store(mass_ptr + first // BLOCKS, mass)
        topn, least = add_scores(topn, least, score[None, :], ranked[None, :], j, C)
    return topn


@kernel(
    do_not_specialize=["N", "splits", "num_tiles", "num_rows", "num_chunks", "chunk", "window"],
    do_not_specialize_on_alignment=["position_ptr"],
)
def nsa_decode_select(
    q_ptr,
    position_ptr,  # [B]
    window_ptrs,  # of k and v
    score_ptrs,  # of :func:`.compressed.nsa_decode_compressed`, as is the next
    part_ptrs,
    keys_ptr,  # int64 [B, S, K, num_chunks, SLOTS]; None: the lists are given
    mass_ptr,  # fp32 [B, S, K, chunks' tiles of BLOCKS blocks], with C.ENOUGH
    counters_ptr,  # [B, S, K], zeros
    out_cmp_ptr,  # fp32 [B, S, H, V], contiguous; written
    window_part_ptrs,  # of parts [B, S, K, WINDOW_PARTS]; written
    block_idx_ptr,  # [B, S, K, n], contiguous; written
    q_strides,
    window_strides,  # of k and v
    N,
    splits,
    num_tiles,
    KV_HEADS,
    num_rows,  # B * S * K
    num_chunks,
    chunk,  # blocks of a chunk, a multiple of BLOCKS
    window,
    ring,
    scale_log2,
    KEYS: tl.constexpr,
    GROUPS: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW_PARTS: tl.constexpr,
    WINDOW_KEYS: tl.constexpr,
    WINDOW_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    C: tl.constexpr,
):
    let_next_start(C)
    pid = tl.program_id(0)
    role = pid // num_rows
    list_row = (pid % num_rows).to(tl.int64)
    kv_head = list_row % KV_HEADS
    b = list_row // KV_HEADS // C.S
    s = (list_row // KV_HEADS % C.S).to(tl.int32)
    position = tl.load(position_ptr + b) + s
    head_row = b * KV_HEADS + kv_head
    g = tl.arange(0, C.BLOCK_GROUP)
    row = s * C.G + g
    row_mask = g < C.G
    # of the last query, as the launch before wrote them
    newest = tl.minimum(last_visible(position - s + (C.S - 1), C), N - 1)
    num_parts = (newest + KEYS) // KEYS
    if role >= WINDOW_PARTS:
        wait_for_last(C)
    if role >= WINDOW_PARTS + num_chunks:
        e = (role - WINDOW_PARTS - num_chunks) * COLUMNS + tl.arange(0, COLUMNS)
        first = head_row * splits
        out = merge_parts(part_ptrs, first, num_parts, row, row_mask, e, C.ROWS, C.V, GROUPS, FOLD)
        at = list_row * C.G + g
        inside = row_mask[:, None] & (e < C.V)[None, :]
        tl.store(out_cmp_ptr + at[:, None] * C.V + e[None, :], out, mask=inside)
    elif role < WINDOW_PARTS:
        begin = oldest_visible(position, window) + role * WINDOW_KEYS
        end = tl.minimum(begin + WINDOW_KEYS, position + 1)
        if begin < end:
            k_strides, v_strides = window_strides
            q = load_queries(q_ptr, q_strides, b, s, kv_head * C.G + g, row_mask, C.D, C.BLOCK_D)
            k_ptr = window_ptrs[0] + b * k_strides[0] + kv_head * k_strides[2]
            v_ptr = window_ptrs[1] + b * v_strides[0] + kv_head * v_strides[2]
            m_i, l_i, acc = attend_window(
                *(q, k_ptr, v_ptr, k_strides, v_strides, begin, end, ring, scale_log2),
                *(WINDOW_KEYS, WINDOW_UNIT, BLOCK_N, C),
            )
            at = list_row * WINDOW_PARTS + role
            store_part(window_part_ptrs, at, g, row_mask, m_i, l_i, acc, C.G, C.V)
    elif keys_ptr is not None:
        q_block = position // C.SELECT_BLOCK
        one = tl.full((1,), 0, tl.int32)
        most = most_blocks(one + position, C)
        selects_all = one + q_block < most
        last_scored = q_block - C.NUM_LOCAL
        if C.ENOUGH is not None:
            selects_all = one + q_block < 0
            last_scored = q_block
        end = tl.where(tl.max(selects_all.to(tl.int32), 0) > 0, 0, last_scored + 1)
        active = tl.maximum(end + chunk - 1, 0) // chunk
        slot = tl.arange(0, C.SLOTS)
        keys_ptr += list_row * num_chunks * C.SLOTS
        if C.ENOUGH is not None:
            mass_ptr += list_row * num_chunks * (chunk // BLOCKS)
        chunk_id = role - WINDOW_PARTS
        if chunk_id < active:
            sums_ptr = score_ptrs[0] + head_row * num_tiles * (C.TILE_BLOCKS * 2 * C.ROWS)
            tops_ptr = score_ptrs[1] + head_row * num_tiles * C.ROWS
            begin = chunk_id * chunk
            topn = _rank_chunk(
                *((sums_ptr, tops_ptr), part_ptrs[1], mass_ptr, head_row * splits, num_parts),
                *(begin, tl.minimum(begin + chunk, end), q_block - C.NUM_LOCAL),
                *(tl.where(newest >= 0, newest // C.RATIO, -1), row, row_mask, BLOCKS),
                *(GROUPS, FOLD, C),
            )
            tl.store(keys_ptr + chunk_id * C.SLOTS + slot[None, :], topn)
        if is_last(counters_ptr + list_row, num_chunks):
            block, occupied = forced_blocks(slot, one + q_block, selects_all, C)
            topn = make_list(slot, block, occupied, most)
            x = tl.arange(0, BLOCKS)
            for first in tl.range(0, active * C.SLOTS, BLOCKS, num_stages=1):
                inside = first + x < active * C.SLOTS
                keys = tl.load(keys_ptr + first + x, mask=inside, other=-1, cache_modifier=".cg")
                # an ascending list against a descending one, as in add_scores
                topn = tl.bitonic_merge(tl.maximum(topn, tl.topk(keys[None, :], C.SLOTS)))
            if C.ENOUGH is not None:
                forced_mass = tl.full((1,), 0.0, tl.float32)
                for tile in tl.range(0, (end + BLOCKS - 1) // BLOCKS, num_stages=1):
                    forced_mass += tl.load(mass_ptr + tile, cache_modifier=".cg")
                topn = limit_mass(topn, forced_mass, C)
            out_ptr = block_idx_ptr + (list_row + one) * C.NUM_SELECTED
            store_lists(out_ptr, 0, one + 1, topn, slot, 1, C)
