"""The exact pass over the regions that are searched, a list of blocks for each leading token.

G heads per group, D key size, n blocks selected, r blocks of a region, k regions selected; C is a
:class:`~nsa.backends.compiled.select.tiles.Constants` with TOKENS = 1.

A program takes one leading token of one key/value head. What it searches, in ascending order: the
regions of the initial blocks, the k best of :mod:`.kernel`, and those from the last region that is
not ranked up to the token's own block. Each is cut into pieces of C.PIECE blocks, most often one;
the keys of a piece are those that begin in its blocks and, before them, the l/d - 1 that only reach
into them, and are read again if the piece before has them, too. Piece after piece, BLOCK_N keys
make a step: they are the rows of its product, the heads are the columns. A key's probability,
summed over the heads, is kept until C.CHUNK keys have been read, and only then is every block
summed, by the same operations in the same order (equal scores must stay equal), and ranked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.columns import dot_rows
from nsa.backends.compiled.common import LOG2_E
from nsa.backends.compiled.select.kernel import last_region
from nsa.backends.compiled.select.scores import (
    leading_tokens,
    lists_after,
    load_keys,
    load_queries,
    round_queries,
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
def _first_block(regions_ptr, piece, chosen, young_region, C: tl.constexpr):
    """The first block of each piece by its number, which is not negative, like ``piece``."""
    FIRST_REGION: tl.constexpr = (C.NUM_INITIAL + C.REGION - 1) // C.REGION
    PIECES: tl.constexpr = C.REGION // C.PIECE
    at = piece // PIECES - FIRST_REGION
    in_chosen = (at >= 0) & (at < chosen)
    region = tl.load(regions_ptr + at, mask=in_chosen, other=0)
    other = tl.where(at < 0, at + FIRST_REGION, at - chosen + young_region)
    return tl.where(in_chosen, region, other) * C.REGION + piece % PIECES * C.PIECE


@triton.jit
def _key_masses(q, scale, lse, k, k_scale, C: tl.constexpr):
    """fp32 ``[BLOCK_N]``: the probabilities of keys, summed over the heads.

    k and q are tiles in parts of BLOCK_N and of BLOCK_GROUP rows, lse fp32 ``[BLOCK_GROUP]``, scale
    fp32 of all, or with C.FP8 ``[1, BLOCK_GROUP]``; without C.IEEE scale and lse are times log2(e).
    """
    s = dot_rows(k, q, C)
    if C.FP8:
        s = s * k_scale[:, None]
    s = s * scale - lse[None, :]
    return tl.sum(tl.exp(s) if C.IEEE else tl.exp2(s), 1)


@kernel(do_not_specialize=["T", "L", "N", "q_start"])
def nsa_select_in_regions(
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
    regions_ptr,  # [B, L, K, k], contiguous
    block_idx_ptr,  # [B, T, K, n], contiguous; written
    C: tl.constexpr,
):
    RATIO: tl.constexpr = C.SELECT_BLOCK // C.COMPRESS_STRIDE
    SPAN: tl.constexpr = C.COMPRESS_BLOCK // C.COMPRESS_STRIDE
    FIRST_REGION: tl.constexpr = (C.NUM_INITIAL + C.REGION - 1) // C.REGION
    KEYS: tl.constexpr = C.PIECE_KEYS
    STEPS: tl.constexpr = C.CHUNK // C.BLOCK_N
    pid = tl.program_id(0)
    heads = tl.num_programs(0) // L
    leader = L - 1 - pid // heads
    b = (pid % heads // KV_HEADS).to(tl.int64)
    kv_head = (pid % heads % KV_HEADS).to(tl.int64)
    t = leading_tokens(leader_ptr, leader, L, C)
    if t >= T:
        return
    row_t = t + tl.full((C.BLOCK_GROUP,), 0, tl.int32)
    q, lse = load_queries(q_ptr, lse_ptr, q_strides, b, kv_head, row_t, T, KV_HEADS, C)
    q, scale = round_queries(q, scale, C)
    if C.FP8:
        scale = tl.trans(scale)
    if not C.IEEE:
        lse *= LOG2_E
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
    young_region = tl.maximum(last + 1, FIRST_REGION)
    young = q_block - young_region * C.REGION + C.PIECE
    pieces = (FIRST_REGION + chosen) * (C.REGION // C.PIECE) + tl.maximum(young, 0) // C.PIECE

    own = q_block + tl.full((1,), 0, tl.int32)
    most = most_blocks(position + tl.full((1,), 0, tl.int32), C)
    selects_all = (own < most) & (ranked_regions <= C.NUM_REGIONS)
    if C.ENOUGH is not None:
        selects_all = own < 0
    slot = tl.arange(0, C.SLOTS)
    block, occupied = forced_blocks(slot, own, selects_all, C)
    topn = make_list(slot, block, occupied, most)
    pieces = tl.where(tl.max(selects_all.to(tl.int32), 0) > 0, 0, pieces)

    column = tl.arange(0, C.BLOCK_N)
    exists = tl.full((C.BLOCK_N,), 0, tl.int32) < N
    end = pieces * KEYS - (C.PIECE - 1 - q_block % C.PIECE) * RATIO  # no key of blocks to come
    x = tl.arange(0, C.CHUNK_BLOCKS)
    forced_mass = tl.full((1,), 0.0, tl.float32)
    least = least_bits(topn)
    for first in range(0, pieces, C.PIECES):
        masses = tl.full((STEPS, C.BLOCK_N), 0.0, tl.float32)
        keys = tl.minimum(end - first * KEYS, C.PIECES * KEYS)
        for step in range((keys + C.BLOCK_N - 1) // C.BLOCK_N):
            key = step * C.BLOCK_N + column
            piece = first + key // KEYS
            i = _first_block(regions_ptr, piece, chosen, young_region, C) * RATIO
            i += key % KEYS - (SPAN - 1)
            seen = (i >= 0) & (i * C.COMPRESS_STRIDE + C.COMPRESS_BLOCK - 1 <= position)
            # without masks and signs, both of which cost: a key that is not seen is any other
            row = tl.where(seen & (piece < pieces), cmp_seq_start + i, 0).to(tl.uint32)
            k, k_scale = load_keys(k_ptr, k_scale_ptr, k_strides, row, exists, KV_HEADS, C)
            mass = _key_masses(q, scale, lse, k, k_scale, C)
            masses = tl.where((tl.arange(0, STEPS) == step)[:, None], mass[None, :], masses)

        piece = first + x // C.PIECE
        j = _first_block(regions_ptr, piece, chosen, young_region, C) + x % C.PIECE
        key = x // C.PIECE * KEYS + x % C.PIECE * RATIO + (SPAN - 1)
        masses = tl.reshape(masses, (C.CHUNK,))
        score = tl.full((C.CHUNK_BLOCKS,), 0.0, tl.float32)
        # compressed block j*R + m begins m strides into selection block j and is SPAN strides long
        for m in tl.static_range(1 - SPAN, RATIO):
            i = j * RATIO + m
            seen = (i >= 0) & (i * C.COMPRESS_STRIDE + C.COMPRESS_BLOCK - 1 <= position)
            mass = tl.gather(masses, tl.minimum(key + m, C.CHUNK - 1), 0)
            score += tl.where(seen, mass, 0.0) * (min(m + SPAN, RATIO) - max(m, 0))
        candidate = (x < C.PIECES * C.PIECE) & (piece < pieces) & (j <= q_block)
        ranked = candidate & (j >= C.NUM_INITIAL) & (j <= q_block - C.NUM_LOCAL)
        if C.ENOUGH is not None:
            forced_mass += tl.sum(tl.where(candidate & (ranked == 0), score, 0.0), 0)
        topn, least = add_scores(topn, least, score[None, :], ranked[None, :], j, C)

    if C.ENOUGH is not None:
        topn = limit_mass(topn, forced_mass, C)
    count = lists_after(leader_ptr, leader, t, T, L, C) + tl.full((1,), 0, tl.int32)
    row_step = KV_HEADS * C.NUM_SELECTED
    out = (b * T + t + tl.full((1,), 0, tl.int64)) * row_step + kv_head * C.NUM_SELECTED
    store_lists(block_idx_ptr + out, row_step, count, topn, slot, C.SHARE, C)
