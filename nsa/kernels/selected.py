"""Selected attention (paper Eq. 11-12): forward and dq as Triton kernels; launches of all three.

A program takes m neighbouring tokens of one key/value head, all G query heads of each as rows of
one tile, and walks over the union of the tokens' block lists (:mod:`nsa.kernels.selected_lists`):
a block that several of them list is fetched once, and m*G rows fill a matrix instruction that one
token's G rows would leave mostly idle. dk and dv turn the loop round (:mod:`.selected_kv`).

Scores are kept in base 2: ``exp2(s*c - m)`` with ``c = scale * log2(e)`` is one multiply-add and
one hardware instruction.

B batch, T query tokens, S key tokens, H query heads, K key/value heads, G heads per group, D key
size, V value size, n listed blocks, W entries of a union list.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.selected_kv import row_sums, rows_contiguous, selected_dkv
from nsa.kernels.selected_lists import UnionLists, union_lists
from nsa.kernels.selected_tiles import (
    QueryTiles,
    SelectedTiles,
    default_tiles,
    padded,
    padded_rows,
)

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))

_UNSPECIALIZED = ["T", "tiles", "key_end", "q_start"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _forward_kernel(
    q,
    k,
    v,
    out,  # [B, T, H, V], contiguous
    lse,  # [B, T, H], contiguous
    rows,
    masks,
    counts,
    q_b,
    q_t,
    q_h,
    k_b,
    k_s,
    k_h,
    v_b,
    v_s,
    v_h,
    T,
    tiles,
    key_end,
    q_start,
    KV,
    score_scale,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    SELECT: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Tiles of one head side by side: its keys and values then stay in the L2 cache.
    pid = tl.program_id(0)
    tile = pid % tiles
    head = (pid // tiles) % KV
    b = (pid // tiles // KV).to(tl.int64)
    r = tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    slot = r // G
    token = tile * TOKENS + slot
    live = (slot < TOKENS) & (token < T)
    query_head = head * G + r % G
    shift = tl.where(slot < TOKENS, slot, 0)
    last = tl.minimum(q_start + token, key_end - 1)  # the last key row that the query sees

    q_ptr = q + b * q_b + (token.to(tl.int64) * q_t + query_head.to(tl.int64) * q_h)[:, None]
    q_mask = live[:, None]
    k_mask_d = (d < D)[None, :]
    v_mask_e = (e < V)[None, :]
    if BLOCK_D != D:
        q_mask = q_mask & k_mask_d
    q_tile = tl.load(q_ptr + d[None, :], mask=q_mask, other=0.0)
    k_ptr = k + b * k_b + head.to(tl.int64) * k_h
    v_ptr = v + b * v_b + head.to(tl.int64) * v_h
    k_offset = n[:, None] * k_s + d[None, :]
    v_offset = n[:, None] * v_s + e[None, :]

    entry = (b * tiles + tile) * KV + head
    count = tl.load(counts + entry)
    rows += entry * (TOKENS * WIDTH)
    masks += entry * (TOKENS * WIDTH)

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for step in range(count * PARTS):
        part = (step % PARTS) * BLOCK_N
        first = tl.load(rows + step // PARTS) + part
        bits = tl.load(masks + step // PARTS)
        exists = (n < SELECT - part) & (first + n < key_end)
        k_mask = exists[:, None]
        v_mask = exists[:, None]
        if BLOCK_D != D:
            k_mask = k_mask & k_mask_d
        if BLOCK_V != V:
            v_mask = v_mask & v_mask_e
        k_tile = tl.load(k_ptr + first.to(tl.int64) * k_s + k_offset, mask=k_mask, other=0.0)
        # How far into these keys each row sees, so that a key costs one comparison.
        reach = tl.minimum(last - first, SELECT - 1 - part)
        reach = tl.where(((bits >> shift) & 1) != 0, reach, -1)
        visible = n[None, :] <= reach[:, None]
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        s = tl.where(visible, s * score_scale, float("-inf"))
        new = tl.maximum(highest, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(highest - safe)
        total = total * shrink + tl.sum(p, 1)
        v_tile = tl.load(v_ptr + first.to(tl.int64) * v_s + v_offset, mask=v_mask, other=0.0)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        highest = new

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    log = tl.where(empty, float("-inf"), highest * LN2 + tl.log(tl.where(empty, 1.0, total)))
    row = (b * T + token) * (KV * G) + query_head
    out_mask = live[:, None]
    if BLOCK_V != V:
        out_mask = out_mask & v_mask_e
    tl.store(out + row[:, None] * V + e[None, :], acc.to(out.dtype.element_ty), mask=out_mask)
    tl.store(lse + row, log, mask=live)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _dq_kernel(
    q,
    k,
    v,
    dout,
    out,  # [B, T, H, V], contiguous
    lse,  # [B, T, H], contiguous
    delta,  # [B, T, H], contiguous; written
    dq,  # [B, T, H, D], contiguous; written
    rows,
    masks,
    counts,
    q_b,
    q_t,
    q_h,
    k_b,
    k_s,
    k_h,
    v_b,
    v_s,
    v_h,
    do_b,
    do_t,
    do_h,
    T,
    tiles,
    key_end,
    q_start,
    KV,
    score_scale,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    SELECT: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = pid % tiles
    head = (pid // tiles) % KV
    b = (pid // tiles // KV).to(tl.int64)
    r = tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    slot = r // G
    token = tile * TOKENS + slot
    live = (slot < TOKENS) & (token < T)
    query_head = head * G + r % G
    shift = tl.where(slot < TOKENS, slot, 0)
    last = tl.minimum(q_start + token, key_end - 1)

    token64 = token.to(tl.int64)
    head64 = query_head.to(tl.int64)
    row = (b * T + token) * (KV * G) + query_head
    d_mask = live[:, None]
    e_mask = live[:, None]
    k_mask_d = (d < D)[None, :]
    v_mask_e = (e < V)[None, :]
    if BLOCK_D != D:
        d_mask = d_mask & k_mask_d
    if BLOCK_V != V:
        e_mask = e_mask & v_mask_e
    q_ptr = q + b * q_b + (token64 * q_t + head64 * q_h)[:, None] + d[None, :]
    do_ptr = dout + b * do_b + (token64 * do_t + head64 * do_h)[:, None] + e[None, :]
    q_tile = tl.load(q_ptr, mask=d_mask, other=0.0)
    do_tile = tl.load(do_ptr, mask=e_mask, other=0.0)
    out_tile = tl.load(out + row[:, None] * V + e[None, :], mask=e_mask, other=0.0)
    mean = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + row, mean, mask=live)
    log = tl.load(lse + row, mask=live, other=0.0) * LOG2E
    k_ptr = k + b * k_b + head.to(tl.int64) * k_h
    v_ptr = v + b * v_b + head.to(tl.int64) * v_h
    k_offset = n[:, None] * k_s + d[None, :]
    v_offset = n[:, None] * v_s + e[None, :]

    entry = (b * tiles + tile) * KV + head
    count = tl.load(counts + entry)
    rows += entry * (TOKENS * WIDTH)
    masks += entry * (TOKENS * WIDTH)

    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    # Keeping what is the same in every step would spill it where D is large.
    for step in tl.range(0, count * PARTS, disable_licm=True):
        part = (step % PARTS) * BLOCK_N
        first = tl.load(rows + step // PARTS) + part
        bits = tl.load(masks + step // PARTS)
        exists = (n < SELECT - part) & (first + n < key_end)
        k_mask = exists[:, None]
        v_mask = exists[:, None]
        if BLOCK_D != D:
            k_mask = k_mask & k_mask_d
        if BLOCK_V != V:
            v_mask = v_mask & v_mask_e
        k_tile = tl.load(k_ptr + first.to(tl.int64) * k_s + k_offset, mask=k_mask, other=0.0)
        v_tile = tl.load(v_ptr + first.to(tl.int64) * v_s + v_offset, mask=v_mask, other=0.0)
        reach = tl.minimum(last - first, SELECT - 1 - part)
        reach = tl.where(((bits >> shift) & 1) != 0, reach, -1)
        visible = n[None, :] <= reach[:, None]
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        # No probability is above 1; where scores are so large that rounding the lse says
        # otherwise, this keeps the gradient finite.
        p = tl.exp2(tl.minimum(s * score_scale - log[:, None], 0.0))
        ds = tl.where(visible, p * (dp - mean[:, None]), 0.0)
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)

    acc = acc * scale
    tl.store(dq + row[:, None] * D + d[None, :], acc.to(dq.dtype.element_ty), mask=d_mask)


def selected_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    *,
    start: Tensor | None,
    select_block: int,
    scale: float,
    q_start: int = 0,
    tiles: QueryTiles | None = None,
    lists: UnionLists | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens ``s <= t`` of the listed blocks.

    Args:
        q: ``[B, T, H, D]``, fp32, fp16 or bf16.
        k, v: ``[B, S, K, D]`` and ``[B, S, K, V]``, of q's dtype.
        block_idx: int32 ``[B, T, K, n]``, strictly ascending, then −1; block j covers the
            positions ``j*l' … j*l' + l' - 1`` of the query's own sequence.
        start: None for a regular batch; when packed (B = 1), int32 ``[T]``, the first row of k
            and v of each token's sequence.
        select_block: l', in tokens.
        scale: of the scores.
        q_start: position of q's first row; 0 when packed.
        tiles: how to cut the launch; None takes :func:`default_tiles`.
        lists: made by :func:`union_lists` for as many tokens a tile as ``tiles`` has, or None.

    Returns:
        out ``[B, T, H, V]`` in q's dtype and lse ``[B, T, H]``, fp32, natural log; 0 and −inf
        where nothing is visible.
    """
    B, T, H, D = q.shape
    K, V = v.shape[2:]
    out = torch.empty(B, T, H, V, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    tiles = tiles or default_tiles(q, v, block_idx, select_block).forward
    q, k, v = map(rows_contiguous, (q, k, v))
    with torch.cuda.device_of(q):
        if lists is None:
            lists = _lists(k, block_idx, tiles, start, select_block, q_start)
        _forward_kernel[(lists.counts.numel(),)](
            q,
            k,
            v,
            out,
            lse,
            lists.rows,
            lists.masks,
            lists.counts,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            T,
            lists.counts.shape[1],
            k.shape[1],
            q_start,
            K,
            scale * LOG2E.value,
            **_constants(q, v, block_idx, select_block, tiles),
        )
    return out, lse


def selected_dq(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_idx: Tensor,
    *,
    start: Tensor | None,
    select_block: int,
    scale: float,
    q_start: int = 0,
    tiles: QueryTiles | None = None,
    lists: UnionLists | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of q, and what :func:`selected_dkv` needs of out.

    Arguments as of :func:`selected_forward`, with its results and the gradient ``dout`` of out.

    Returns:
        dq ``[B, T, H, D]`` in q's dtype, and delta ``[B, T, H]``, fp32, the sum of ``dout * out``.
    """
    B, T, H, D = q.shape
    dq = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    delta = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    if delta.numel() == 0:
        return dq, delta
    tiles = tiles or default_tiles(q, v, block_idx, select_block).dq
    q, k, v, dout = map(rows_contiguous, (q, k, v, dout))
    with torch.cuda.device_of(q):
        if lists is None:
            lists = _lists(k, block_idx, tiles, start, select_block, q_start)
        _dq_kernel[(lists.counts.numel(),)](
            q,
            k,
            v,
            dout,
            out.contiguous(),
            lse.contiguous(),
            delta,
            dq,
            lists.rows,
            lists.masks,
            lists.counts,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *dout.stride()[:3],
            T,
            lists.counts.shape[1],
            k.shape[1],
            q_start,
            k.shape[2],
            scale * LOG2E.value,
            scale,
            **_constants(q, v, block_idx, select_block, tiles),
        )
    return dq, delta


def selected_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_idx: Tensor,
    *,
    start: Tensor | None,
    select_block: int,
    scale: float,
    q_start: int = 0,
    sequences: int | None = None,
    tiles: SelectedTiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients ``(dq, dk, dv)``, each in q's dtype and the shape of its input.

    Arguments as of :func:`selected_forward`, with its results and the gradient ``dout`` of out.
    ``sequences``, as of :func:`selected_dkv`, saves idle programs in a packed batch.
    dk and dv, and dq where the tiles say so, are summed by atomic adds in fp32, so that their last
    bits may differ between runs.
    """
    tiles = tiles or default_tiles(q, v, block_idx, select_block)
    call: dict[str, Any] = {
        "start": start,
        "select_block": select_block,
        "scale": scale,
        "q_start": q_start,
    }
    dout = rows_contiguous(dout)
    if tiles.dkv.with_dq:
        dq, delta = None, row_sums(dout, out)
    else:
        dq, delta = selected_dq(dout, q, k, v, out, lse, block_idx, **call, tiles=tiles.dq)
    dk, dv, summed = selected_dkv(
        dout, q, k, v, lse, delta, block_idx, **call, sequences=sequences, tiles=tiles.dkv
    )
    return cast(Tensor, summed if dq is None else dq), dk, dv


def _lists(
    k: Tensor,
    block_idx: Tensor,
    tiles: QueryTiles,
    start: Tensor | None,
    select_block: int,
    q_start: int,
) -> UnionLists:
    return union_lists(
        block_idx,
        tokens=tiles.tokens,
        key_rows=k.shape[1],
        start=start,
        select_block=select_block,
        q_start=q_start,
    )


def _constants(
    q: Tensor, v: Tensor, block_idx: Tensor, select_block: int, tiles: QueryTiles
) -> dict[str, int | str]:
    D, V, G = q.shape[3], v.shape[3], q.shape[2] // v.shape[2]
    return {
        "G": G,
        "D": D,
        "V": V,
        "SELECT": select_block,
        "WIDTH": block_idx.shape[3],
        "TOKENS": tiles.tokens,
        "ROWS": padded_rows(tiles.tokens, G),
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": padded(D),
        "BLOCK_V": padded(V),
        "PARTS": triton.cdiv(select_block, tiles.block_n),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
