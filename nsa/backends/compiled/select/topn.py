"""The list of a query while it grows: int64 keys, score bits above, inverted index below.

The largest keys are the best blocks, ties to the lower index. Forced blocks outrank every score,
and a slot past the most that a query may list is occupied by a "block" that is written as -1.

n blocks selected; SLOTS is n padded to a power of two, BLOCK_N blocks are scored at a time; C is a
:class:`~nsa.backends.compiled.select.tiles.Constants`.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_BLOCK = tl.constexpr(2**31 - 1)
FORCED_BITS = tl.constexpr(0x7FFFFFFF)  # above those of every float, infinity included
FORCED = tl.constexpr(0x7FFFFFFF << 32)
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def most_blocks(position, C: tl.constexpr):
    """int32 like position: how many blocks a query lists at most."""
    most = tl.full(position.shape, C.NUM_SELECTED, tl.int32)
    for i in tl.static_range(len(C.SCHEDULE)):
        most = tl.where(position < C.SCHEDULE[i][0], C.SCHEDULE[i][1], most)
    return most


@triton.jit
def forced_blocks(slot, q_block, selects_all, C: tl.constexpr):
    """``(block, occupied)`` ``[TOKENS, SLOTS]`` of the blocks that need no score."""
    local = q_block[:, None] - (C.NUM_LOCAL - 1) + (slot - C.NUM_INITIAL)[None, :]
    initial = (slot < C.NUM_INITIAL)[None, :]
    forced = tl.where(initial, slot[None, :], local)
    block = tl.where(selects_all[:, None], slot[None, :], forced)
    known = tl.where(selects_all, q_block + 1, C.NUM_INITIAL + C.NUM_LOCAL)
    occupied = slot[None, :] < known[:, None]
    if C.SCORES_EARLY:  # no more candidates than forced blocks: each once
        once = tl.where(initial, slot[None, :] <= q_block[:, None], local >= C.NUM_INITIAL)
        occupied = occupied & (once | selects_all[:, None])
    return block, occupied


@triton.jit
def make_list(slot, block, occupied, most):
    """The keys ``[TOKENS, SLOTS]``, ascending, of blocks that outrank every score."""
    counts = slot[None, :] < most[:, None]
    block = tl.where(counts, block, NO_BLOCK)
    keys = (block ^ NO_BLOCK).to(tl.int64) | FORCED
    return tl.sort(tl.where(occupied | (counts == 0), keys, -1))


@triton.jit
def least_bits(topn):
    """int32 ``[TOKENS]``: the score bits that a block has to exceed."""
    return (tl.min(topn, 1) >> 32).to(tl.int32)


@triton.jit
def score_bits(score, ranked):
    """int32 like score, fp32: what ranks it; −1 where not ``ranked``."""
    # not a number would sort as an enormous score or as no block at all
    bits = tl.minimum(tl.maximum(score.to(tl.int32, bitcast=True), 0), INFINITY_BITS)
    return tl.where(ranked, bits, -1)


@triton.jit
def score_keys(bits, j, C: tl.constexpr):
    """The keys of blocks ``j`` ``[BLOCKS]`` with bits ``[TOKENS, BLOCKS]``; −1 of none."""
    inverted = tl.broadcast_to((j ^ NO_BLOCK)[None, :], (C.TOKENS, j.shape[0]))
    return tl.where(bits < 0, -1, (bits.to(tl.int64) << 32) | inverted.to(tl.int64))


@triton.jit
def add_scores(topn, least, score, ranked, j, C: tl.constexpr):
    """Merges blocks ``j`` ``[BLOCK_N]``, ascending and higher than all before, where ``ranked``.

    score fp32 and ranked ``[TOKENS, BLOCK_N]``; returns topn and its :func:`least_bits`.
    """
    bits = score_bits(score, ranked)
    # an equal score gets in by its lower index alone, and these are higher than all before
    better = (bits > least[:, None]).to(tl.int32)
    if tl.max(tl.max(better, 1), 0) > 0:
        keys = score_keys(bits, j, C)
        # an ascending list against a descending one: the pairwise maxima are the largest of both,
        # and they rise and fall once, which is what the last step of a bitonic sort puts in order
        topn = tl.bitonic_merge(tl.maximum(topn, tl.topk(keys, C.SLOTS)))
        least = least_bits(topn)
    return topn, least


@triton.jit
def limit_mass(topn, forced_mass, C: tl.constexpr):
    """Drops ranked blocks once those before them have the score C.ENOUGH; topn is ascending.

    forced_mass fp32 ``[TOKENS]``: the forced blocks' scores.
    """
    bits = (topn >> 32).to(tl.int32)
    ranked = (bits >= 0) & (bits != FORCED_BITS)
    score = tl.where(ranked, bits.to(tl.float32, bitcast=True), 0.0)
    before = forced_mass[:, None] + (tl.cumsum(score, 1, reverse=True) - score)
    return tl.where(ranked & (before >= C.ENOUGH), -1, topn)


@triton.jit
def store_lists(row_ptr, row_step, count, topn, slot, COPIES: tl.constexpr, C: tl.constexpr):
    """Writes each list to ``count`` ``[TOKENS]`` rows, at most COPIES, from ``row_ptr`` on."""
    index = (topn & 0xFFFFFFFF).to(tl.int32) ^ NO_BLOCK
    index = tl.sort(tl.where(topn < 0, NO_BLOCK, index))
    index = tl.where(index == NO_BLOCK, -1, index)
    for copy in tl.static_range(COPIES):
        mask = (copy < count)[:, None] & (slot < C.NUM_SELECTED)[None, :]
        tl.store(row_ptr[:, None] + copy * row_step + slot[None, :], index, mask=mask)
