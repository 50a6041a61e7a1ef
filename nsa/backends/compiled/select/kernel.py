"""Selection in one kernel: scores (paper Eq. 8-10) and the n best blocks of every query, streamed.

B batch, T query tokens, N compressed blocks, J selection blocks, H query heads, K key/value heads,
G heads per group, D key size, n blocks chosen.

A program takes a few tokens of one key/value head, all G heads of them as rows of one tile, and
walks over the selection blocks in chunks. A selection block covers R = l'/d compressed blocks that
begin in it; block ``j`` scores the weighted sum of ``p[j*R + m]`` over m, of which the last ``l/d
- 1`` also reach into block ``j + 1``. Each step of the loop is one m: a product of the rows with
the keys ``j*R + m`` of every j in the chunk, so that the overlap map needs no shuffling of columns,
and every block is summed by the same operations in the same order (equal scores must stay equal).

The best blocks so far are int64 keys, score bits above, inverted index below: the largest keys are
the best blocks, ties to the lower index. Forced blocks are in the list before the loop starts, and
queries that may read all their candidates skip the scores altogether.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.backends.compiled.select.tiles import SelectTiles, select_tiles

LOG2E = math.log2(math.e)
LOG2_E = tl.constexpr(LOG2E)

NO_BLOCK = tl.constexpr(2**31 - 1)
FORCED = tl.constexpr(0x7FFFFFFF << 32)  # above the bits of every float, infinity included
INFINITY_BITS = tl.constexpr(0x7F800000)


def select_forward(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    start: Tensor | None,
    cmp_start: Tensor | None,
    compress_block: int,
    compress_stride: int,
    select_block: int,
    num_selected: int,
    num_initial: int,
    num_local: int,
    scale: float,
    q_start: int = 0,
    tiles: SelectTiles | None = None,
) -> Tensor:
    """The blocks each query reads; nothing of size T x N or T x J is stored.

    Args:
        q: ``[B, T, H, D]``, fp16, bf16 or fp32; query head h belongs to key head h // G.
        k_cmp: ``[B, N, K, D]``, keys of the compressed branch, same dtype; N may be 0. Rows that
            no query sees are read at most, never used.
        lse: fp32 ``[B, T, H]``, natural log, of the compressed branch; −inf where a query sees
            no block.
        start: None for a regular batch; packed (B = 1): int32 ``[T]``, the first token of each
            token's sequence.
        cmp_start: packed: int32 ``[T]``, the row in k_cmp of that sequence's first block.
        compress_block, compress_stride, select_block: l, d and l' in tokens; d divides both
            others, l <= l'.
        num_selected, num_initial, num_local: n, and the blocks always read at the start of the
            sequence and up to the query's own; together at most n.
        q_start: position of q's first row in its sequence; 0 when packed.
        tiles: overrides :func:`select_tiles`.

    Returns:
        int32 ``[B, T, K, n]``, strictly ascending, then −1; numbers count from the start of the
        query's own sequence.
    """
    B, T, H, D = q.shape
    N, K = k_cmp.shape[1], k_cmp.shape[2]
    n = num_selected
    out = torch.empty(B, T, K, n, dtype=torch.int32, device=q.device)
    if out.numel() == 0:
        return out
    if tiles is None:
        tiles = select_tiles(q.dtype, H // K, D, n, triton.cdiv(q_start + T, select_block))
    slots = max(2, triton.next_power_of_2(n))
    assert tiles.blocks >= slots, f"expected chunks of at least {slots} blocks, got {tiles.blocks}"
    assert (start is None) == (cmp_start is None)
    group = triton.next_power_of_2(H // K)
    tokens = max(1, tiles.rows // group)
    span, ratio = compress_block // compress_stride, select_block // compress_stride
    num_tiles = triton.cdiv(T, tokens)
    unused = out  # stands in for pointers that the kernel does not read
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    if tiles.maxnreg is not None:
        options["maxnreg"] = tiles.maxnreg
    with torch.cuda.device_of(q):
        _select[(num_tiles * B * K,)](
            q,
            k_cmp,
            lse,
            out,
            unused if start is None else start,
            unused if cmp_start is None else cmp_start,
            T,
            N,
            K,
            num_tiles,
            q_start,
            scale,
            scale * LOG2E,
            *q.stride(),
            *k_cmp.stride(),
            *lse.stride(),
            G=H // K,
            D=D,
            BLOCK=compress_block,
            STRIDE=compress_stride,
            SPAN=span,
            RATIO=ratio,
            n=n,
            INITIAL=num_initial,
            LOCAL=num_local,
            FIRST=1 - span if tiles.halo == "recompute" else 0,
            SHIFT=tiles.halo == "shift" and span > 1,
            IEEE=q.dtype == torch.float32,
            PACKED=start is not None,
            TOKENS=tokens,
            GROUP=group,
            DIM=max(16, triton.next_power_of_2(D)),
            CHUNK=max(16, tiles.blocks),
            SLOTS=slots,
            **options,
        )
    return out


@triton.jit
def _sum_heads(x, TOKENS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """``[TOKENS * GROUP, CHUNK]`` -> ``[TOKENS, CHUNK]``."""
    return tl.sum(tl.reshape(x, (TOKENS, GROUP, CHUNK)), axis=1)


@triton.jit
def _merge(best, keys, SLOTS: tl.constexpr):
    """The SLOTS largest of both, ascending; best is ascending, both ``[TOKENS, ...]``."""
    # an ascending list against a descending one: the pairwise maxima are the largest of both, and
    # they rise and fall once, which is what the last step of a bitonic sort puts in order
    return tl.bitonic_merge(tl.maximum(best, tl.topk(keys, SLOTS)))


@triton.jit
def _scan(
    best,
    q,
    lse,
    member,
    pos,
    own,
    complete,
    k_ptr,
    k_first,
    N,
    scale,
    scale_log2,
    k_stride_n,
    k_stride_d,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SPAN: tl.constexpr,
    RATIO: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    FIRST: tl.constexpr,
    SHIFT: tl.constexpr,
    IEEE: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Merges the scored blocks of one sequence into ``best`` int64 ``[TOKENS, SLOTS]``.

    q ``[rows, DIM]``; lse fp32 ``[rows]``; member, pos, own and complete ``[TOKENS]``: whether the
    token belongs to this sequence, its position, its block, whether it reads all its candidates.
    """
    STEPS: tl.constexpr = RATIO - FIRST
    # rows of other sequences compute for nothing: a token's scores do not mix with another's
    row_pos = tl.reshape(tl.broadcast_to(pos[:, None], (TOKENS, GROUP)), (TOKENS * GROUP,))
    lse_log2 = lse * LOG2_E
    takes_part = member & (complete == 0)
    last = tl.max(tl.where(takes_part, own - LOCAL, -1), 0)
    seen_by_all = tl.min(tl.where(member, pos, 2147483647), 0)

    column = tl.arange(0, CHUNK)
    dim = tl.arange(0, DIM)
    own_part = tl.zeros((TOKENS * GROUP, CHUNK), dtype=tl.float32)
    next_part = tl.zeros((TOKENS, CHUNK), dtype=tl.float32)
    carry = tl.zeros((TOKENS,), dtype=tl.float32)
    least = (tl.min(best, 1) >> 32).to(tl.int32)
    # one loop over chunks and steps, so that loads are fetched ahead across chunks
    for it in range((last + CHUNK) // CHUNK * STEPS):
        j0 = it // STEPS * CHUNK
        m = it % STEPS + FIRST
        row = (j0 + column) * RATIO + m
        there = (row >= 0) & (k_first + row < N)
        k = tl.load(
            k_ptr + (k_first + row)[:, None].to(tl.int64) * k_stride_n + dim[None, :] * k_stride_d,
            mask=there[:, None] & (dim < D)[None, :],
            other=0.0,
        )
        if IEEE:
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        else:
            s = tl.dot(q, tl.trans(k))
        newest = (j0 + CHUNK - 1) * RATIO + m
        if (newest * STRIDE + BLOCK - 1 > seen_by_all) | (j0 * RATIO + m < 0):
            visible = (row * STRIDE + BLOCK - 1)[None, :] <= row_pos[:, None]
            s = tl.where(visible & (row >= 0)[None, :], s, float("-inf"))
        p = tl.exp(s - lse[:, None]) if IEEE else tl.exp2(s * scale_log2 - lse_log2[:, None])
        # compressed block j*R + m begins at tile m of selection block j: SPAN tiles, RATIO to a
        # selection block
        weight = tl.minimum(m + SPAN, RATIO) - tl.maximum(m, 0)
        own_part += p * weight
        if SHIFT:
            beyond = m + SPAN - RATIO
            if beyond > 0:
                part = _sum_heads(p, TOKENS, GROUP, CHUNK)
                next_part += part * beyond
        if m == RATIO - 1:
            score = _sum_heads(own_part, TOKENS, GROUP, CHUNK)
            own_part = tl.zeros((TOKENS * GROUP, CHUNK), dtype=tl.float32)
            if SHIFT:
                left = tl.broadcast_to(tl.maximum(column - 1, 0)[None, :], (TOKENS, CHUNK))
                from_left = tl.gather(next_part, left, 1)
                score += tl.where(column[None, :] == 0, carry[:, None], from_left)
                carry = tl.sum(tl.where(column[None, :] == CHUNK - 1, next_part, 0.0), 1)
                next_part = tl.zeros((TOKENS, CHUNK), dtype=tl.float32)
            j = j0 + column
            # not a number would sort as an enormous score or as no block at all
            bits = tl.minimum(tl.maximum(score.to(tl.int32, bitcast=True), 0), INFINITY_BITS)
            ranked = (j[None, :] <= (own - LOCAL)[:, None]) & (j >= INITIAL)[None, :]
            bits = tl.where(ranked & takes_part[:, None], bits, -1)
            # an equal score gets in by its lower index alone, and these are higher than all before
            better = (bits > least[:, None]).to(tl.int32)
            if tl.max(tl.max(better, 1), 0) > 0:
                inverted = tl.broadcast_to((j ^ NO_BLOCK)[None, :], (TOKENS, CHUNK))
                keys = tl.where(bits < 0, -1, (bits.to(tl.int64) << 32) | inverted.to(tl.int64))
                best = _merge(best, keys, SLOTS)
                least = (tl.min(best, 1) >> 32).to(tl.int32)
    return best


@triton.jit(do_not_specialize=["T", "N", "num_tiles", "q_start"])
def _select(
    q_ptr,
    k_ptr,
    lse_ptr,
    out_ptr,
    start_ptr,
    cmp_start_ptr,
    T,
    N,
    K,
    num_tiles,
    q_start,
    scale,
    scale_log2,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_n,
    k_stride_k,
    k_stride_d,
    lse_stride_b,
    lse_stride_t,
    lse_stride_h,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SPAN: tl.constexpr,
    RATIO: tl.constexpr,
    n: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    FIRST: tl.constexpr,
    SHIFT: tl.constexpr,
    IEEE: tl.constexpr,
    PACKED: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    # the last tiles have the most to do and go first
    pid = tl.program_id(0)
    heads = tl.num_programs(0) // num_tiles
    tile = num_tiles - 1 - pid // heads
    b = (pid % heads // K).to(tl.int64)
    kv = (pid % heads % K).to(tl.int64)

    row = tl.arange(0, TOKENS * GROUP)
    dim = tl.arange(0, DIM)
    row_t = tile * TOKENS + row // GROUP
    row_h = row % GROUP
    there = (row_t < T) & (row_h < G)
    head = kv * G + row_h
    q = tl.load(
        q_ptr
        + b * q_stride_b
        + row_t[:, None].to(tl.int64) * q_stride_t
        + head[:, None] * q_stride_h
        + dim[None, :] * q_stride_d,
        mask=there[:, None] & (dim < D)[None, :],
        other=0.0,
    )
    lse = tl.load(
        lse_ptr + b * lse_stride_b + row_t.to(tl.int64) * lse_stride_t + head * lse_stride_h,
        mask=there,
        other=float("inf"),
    )
    # exp(-inf): nothing for the rows that fill up a group, nor for a query that sees no block
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    k_ptr += b * k_stride_b + kv * k_stride_k

    t = tile * TOKENS + tl.arange(0, TOKENS)
    valid = t < T
    if PACKED:
        start = tl.load(start_ptr + t, mask=valid, other=0)
        pos = t - start
    else:
        pos = t + q_start
    own = pos // (STRIDE * RATIO)
    complete = own < n

    slot = tl.arange(0, SLOTS)
    local = own[:, None] - (LOCAL - 1) + (slot - INITIAL)[None, :]
    forced = tl.where((slot < INITIAL)[None, :], slot[None, :], local)
    listed = tl.where(complete[:, None], slot[None, :], forced)
    known = tl.where(complete, own + 1, INITIAL + LOCAL)
    # SLOTS - n places are taken by a "block" that outranks all others and is written as -1
    listed = tl.where((slot < n)[None, :], listed, NO_BLOCK)
    taken = (slot[None, :] < known[:, None]) | (slot >= n)[None, :]
    best = (listed ^ NO_BLOCK).to(tl.int64) | FORCED
    best = tl.sort(tl.where(taken, best, -1))

    if PACKED:
        at = tile * TOKENS
        end = tl.minimum(at + TOKENS, T)
        while at < end:
            first = tl.load(start_ptr + at)
            member = valid & (start == first)
            best = _scan(
                best,
                q,
                lse,
                member,
                pos,
                own,
                complete,
                k_ptr,
                tl.load(cmp_start_ptr + at),
                N,
                scale,
                scale_log2,
                k_stride_n,
                k_stride_d,
                D,
                BLOCK,
                STRIDE,
                SPAN,
                RATIO,
                INITIAL,
                LOCAL,
                FIRST,
                SHIFT,
                IEEE,
                TOKENS,
                GROUP,
                DIM,
                CHUNK,
                SLOTS,
            )
            at += tl.sum(member.to(tl.int32), 0)
    else:
        best = _scan(
            best,
            q,
            lse,
            valid,
            pos,
            own,
            complete,
            k_ptr,
            0,
            N,
            scale,
            scale_log2,
            k_stride_n,
            k_stride_d,
            D,
            BLOCK,
            STRIDE,
            SPAN,
            RATIO,
            INITIAL,
            LOCAL,
            FIRST,
            SHIFT,
            IEEE,
            TOKENS,
            GROUP,
            DIM,
            CHUNK,
            SLOTS,
        )

    index = (best & 0xFFFFFFFF).to(tl.int32) ^ NO_BLOCK
    index = tl.sort(tl.where(best < 0, NO_BLOCK, index))
    out = out_ptr + ((b * T + t.to(tl.int64)) * K + kv)[:, None] * n + slot[None, :]
    index = tl.where(index == NO_BLOCK, -1, index)
    tl.store(out, index, mask=valid[:, None] & (slot < n)[None, :])
