"""Attention over a band of keys, forward and backward: the window (paper §3.3.3) and, with keys
that stand ``stride`` tokens apart, the compressed branch (Eq. 7-8).

B batch, T query tokens, S keys, H query heads, K key/value heads, G heads per group, D key size,
V value size.

The G heads of a group are rows of one tile: a program that takes m tokens has m * G rows on the
same m + w - 1 keys, so keys and values are read once for all of them, little of the window's edge
is computed in vain, and the gradients of keys and values need no expansion to query heads.
"Position" means a row of the keys throughout. Query t stands at ``q_start + t``, packed or not, and
sees keys ``max(start, position - w + 1) … position``. Where keys are blocks of l tokens, one every
d (:class:`Blocks`), it stands at the last block that ends at or before it, or at none.

The gradient of q is one kernel, that of k and v another; neither uses atomics, so both are
deterministic: where few blocks of keys have many queries, parts of the queries are summed apart and
added in order. The algorithm is FlashAttention-2's (arXiv 2307.08691).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.window_tiles import (
    WindowTiles,
    forward_tiles,
    key_gradient_tiles,
    query_gradient_tiles,
)

LOG2E = math.log2(math.e)
LOG2_E = tl.constexpr(LOG2E)
PROGRAMS = 1024
"""Programs of the kernel for dk and dv that a launch over few keys is split into, about."""


class Blocks(NamedTuple):
    """Keys that are blocks of tokens."""

    block: int
    """l, tokens of a block."""
    stride: int
    """d, tokens from one block to the next."""
    first: Tensor | None = None
    """Packed: int32 ``[T]``, the first token of each token's sequence."""
    seen_from: Tensor | None = None
    """Packed: int32 ``[S]``, the first token that sees each key, T for a surplus one; it does not
    decrease."""
    seen_until: Tensor | None = None
    """Packed: int32 ``[S]``, the token past the last that sees each key, T for a surplus one."""


TOKENS = Blocks(1, 1)
"""Keys that are the tokens themselves."""


def window_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    start: Tensor | None,
    scale: float,
    q_start: int = 0,
    blocks: Blocks = TOKENS,
    tiles: WindowTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the last ``window`` keys, the query's own included.

    Args:
        q: ``[B, T, H, D]``, fp16, bf16 or fp32; query head h reads key head h // G.
        k, v: ``[B, S, K, D]`` and ``[B, S, K, V]``, q's dtype; S reaches the last query's position.
        window: keys, at least 1.
        start: None for a regular batch; packed (B = 1): int32 ``[T]``, the first key of each
            token's sequence, which does not decrease.
        q_start: number of q's first token; 0 when packed.
        blocks: what a key stands for.
        tiles: overrides :func:`forward_tiles`.

    Returns:
        out ``[B, T, H, V]`` in q's dtype and lse fp32 ``[B, T, H]``, natural log; 0 and −inf for a
        query that sees no block.
    """
    B, T, H, D = q.shape
    K, V = v.shape[2], v.shape[3]
    out = torch.empty(B, T, H, V, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    q, scale, _ = _positive(q, scale)
    tiles = tiles or forward_tiles(q.dtype, max(D, V))
    shape, options = _shape(q, k, v, tiles, start, q_start, blocks)
    with torch.cuda.device_of(q):
        _forward[(triton.cdiv(T, shape["TOKENS"]) * B * K,)](
            q,
            k,
            v,
            out,
            lse,
            lse if start is None else start,
            lse if blocks.first is None else blocks.first,
            T,
            K,
            min(window, k.shape[1]),
            q_start,
            scale,
            scale * LOG2E,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            **shape,
            **options,
        )
    return out, lse


def window_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    window: int,
    start: Tensor | None,
    scale: float,
    q_start: int = 0,
    blocks: Blocks = TOKENS,
    q_tiles: WindowTiles | None = None,
    k_tiles: WindowTiles | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`window_forward`, whose arguments and results come in unchanged.

    Args:
        dout: ``[B, T, H, V]``, the gradient of ``out``, in its dtype.
        q_tiles, k_tiles: override :func:`query_gradient_tiles` and :func:`key_gradient_tiles`.
        splits: parts of the queries that dk and dv are summed over apart; None chooses.

    Returns:
        dq, dk, dv, shaped like q, k, v and in their dtypes.
    """
    B, T, H, D = q.shape
    S, K, V = k.shape[1], v.shape[2], v.shape[3]
    assert blocks.first is None or (blocks.seen_from is not None and blocks.seen_until is not None)
    dq = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    dk = torch.empty(B, S, K, D, dtype=k.dtype, device=q.device)
    dv = torch.empty(B, S, K, V, dtype=v.dtype, device=q.device)
    if lse.numel() == 0 or S == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    out, lse = out.contiguous(), lse.contiguous()
    q, scale, sign = _positive(q, scale)
    delta = torch.empty_like(lse)
    started = lse if start is None else start
    first = lse if blocks.first is None else blocks.first
    tiles = q_tiles or query_gradient_tiles(q.dtype, max(D, V))
    shape, options = _shape(q, k, v, tiles, start, q_start, blocks)
    with torch.cuda.device_of(q):
        _query_gradient[(triton.cdiv(T, shape["TOKENS"]) * B * K,)](
            q,
            k,
            v,
            out,
            dout,
            lse,
            delta,
            dq,
            started,
            first,
            T,
            K,
            min(window, S),
            q_start,
            scale * sign,
            scale * LOG2E,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *dout.stride(),
            **shape,
            **options,
        )
    tiles = k_tiles or key_gradient_tiles(q.dtype, max(D, V))
    shape, options = _shape(q, k, v, tiles, start, q_start, blocks)
    programs = triton.cdiv(S, tiles.keys) * B * K
    if splits is None:
        splits = _splits(programs, min(window * blocks.stride, T), shape["TOKENS"])
    parts = [dk, dv]
    if splits > 1:
        parts = [x.new_empty(splits, *x.shape, dtype=torch.float32) for x in parts]
    with torch.cuda.device_of(q):
        _key_gradient[(programs * splits,)](
            q,
            k,
            v,
            dout,
            lse,
            delta,
            *parts,
            started,
            first,
            lse if blocks.seen_from is None else blocks.seen_from,
            lse if blocks.seen_until is None else blocks.seen_until,
            T,
            S,
            K,
            min(window, S),
            q_start,
            splits,
            scale,
            scale * LOG2E,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *dout.stride(),
            SPLIT=splits > 1,
            **shape,
            **options,
        )
    if splits > 1:
        dk, dv = (x.sum(0).to(dk.dtype) for x in parts)
    return dq, dk, dv


def _splits(programs: int, queries: int, tokens: int) -> int:
    """Parts of the queries of one block of keys: enough programs, each with enough tiles."""
    return max(1, min(PROGRAMS // programs, queries // (tokens * 16)))


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """q and a scale above 0 with the same scores; q is the new one times the third result."""
    if scale > 0:  # the running maximum is taken before scaling
        return q, scale, 1.0
    return (-q, -scale, -1.0) if scale < 0 else (torch.zeros_like(q), 1.0, 0.0)


def _shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: WindowTiles,
    start: Tensor | None,
    q_start: int,
    blocks: Blocks,
) -> tuple[dict[str, Any], dict[str, int]]:
    """The constants of a launch, and its options."""
    G, D, V = q.shape[2] // k.shape[2], q.shape[3], v.shape[3]
    strided = blocks[:2] != (1, 1)
    assert k.shape[1] * blocks.stride + blocks.block > q_start + q.shape[1] or start is not None
    assert start is None or q_start == 0
    assert start is None or not strided or blocks.first is not None
    rows = max(tiles.rows, triton.next_power_of_2(G))
    constants = {
        "G": G,
        "D": D,
        "V": V,
        "TOKENS": rows // G,
        "ROWS": rows,
        "KEYS": tiles.keys,
        "DIM": max(16, triton.next_power_of_2(D)),
        "VDIM": max(16, triton.next_power_of_2(V)),
        "LEAD": blocks.block - 1,
        "STRIDE": blocks.stride,
        "STRIDED": strided,
        "PACKED": start is not None,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # tf32: no effect on 16 bits
    }
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    if tiles.maxnreg is not None:
        options["maxnreg"] = tiles.maxnreg
    return constants, options


@triton.jit
def _locate(tiles, K):
    """Tile, batch row and key head of a program; neighbouring tiles run side by side."""
    pid = tl.program_id(0)
    return pid % tiles, (pid // tiles // K).to(tl.int64), (pid // tiles % K).to(tl.int64)


@triton.jit
def _position(
    t,
    start_ptr,
    first_ptr,
    q_start,
    LEAD: tl.constexpr,
    STRIDE: tl.constexpr,
    STRIDED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The last key that query t sees, one before its sequence's first if none; t a row of q that
    exists."""
    position = t + q_start
    if STRIDED:
        position -= LEAD
        if PACKED:
            position -= tl.load(first_ptr + t)
        position = tl.where(position >= 0, position // STRIDE, -1)
        if PACKED:
            position += tl.load(start_ptr + t)
    return position


@triton.jit
def _oldest(t, position, start_ptr, window, PACKED: tl.constexpr):
    """The first key that query t at ``position`` sees; t a row of q that exists."""
    oldest = tl.maximum(position - window + 1, 0)
    if PACKED:
        oldest = tl.maximum(oldest, tl.load(start_ptr + t))
    return oldest


@triton.jit(do_not_specialize=["T", "window", "q_start"])
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    start_ptr,
    first_ptr,
    T,
    K,
    window,
    q_start,
    scale,
    scale_log2,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_s,
    k_stride_k,
    k_stride_d,
    v_stride_b,
    v_stride_s,
    v_stride_k,
    v_stride_d,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    VDIM: tl.constexpr,
    LEAD: tl.constexpr,
    STRIDE: tl.constexpr,
    STRIDED: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, b, kv = _locate(tl.cdiv(T, TOKENS), K)
    H = K * G
    first = tile * TOKENS
    last = tl.minimum(first + TOKENS, T) - 1

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    vdim = tl.arange(0, VDIM)
    key = tl.arange(0, KEYS)
    t = first + row // G
    there = t <= last
    t = tl.minimum(t, last)  # rows past the end do what the last token does, and are not stored
    head = kv * G + row % G
    q = tl.load(
        q_ptr
        + b * q_stride_b
        + t[:, None].to(tl.int64) * q_stride_t
        + head[:, None] * q_stride_h
        + dim[None, :] * q_stride_d,
        mask=(dim < D)[None, :],
        other=0.0,
    )
    position = _position(t, start_ptr, first_ptr, q_start, LEAD, STRIDE, STRIDED, PACKED)
    oldest = _oldest(t, position, start_ptr, window, PACKED)
    # both ends rise with t
    lowest = _position(first, start_ptr, first_ptr, q_start, LEAD, STRIDE, STRIDED, PACKED)
    end = _position(last, start_ptr, first_ptr, q_start, LEAD, STRIDE, STRIDED, PACKED) + 1
    begin = _oldest(first, lowest, start_ptr, window, PACKED)
    seen_by_all = _oldest(last, end - 1, start_ptr, window, PACKED)
    k_ptr += b * k_stride_b + kv * k_stride_k
    v_ptr += b * v_stride_b + kv * v_stride_k

    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, VDIM), tl.float32)
    for s0 in range(begin, end, KEYS):
        s = s0 + key
        at = s[:, None].to(tl.int64)
        k = tl.load(
            k_ptr + at * k_stride_s + dim[None, :] * k_stride_d,
            mask=(s < end)[:, None] & (dim < D)[None, :],
            other=0.0,
        )
        v = tl.load(
            v_ptr + at * v_stride_s + vdim[None, :] * v_stride_d,
            mask=(s < end)[:, None] & (vdim < V)[None, :],
            other=0.0,
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if (s0 < seen_by_all) | (s0 + KEYS - 1 > lowest):
            visible = (s[None, :] >= oldest[:, None]) & (s[None, :] <= position[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # other sequences' keys alone so far
        # the difference first: scaled apart, two huge scores round apart
        p = tl.exp2((scores - base[:, None]) * scale_log2)
        shrink = tl.exp2((highest - base) * scale_log2)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        highest = new

    place = (b * T + t.to(tl.int64)) * H + head
    log = highest * scale
    if STRIDED:  # some see nothing
        log = tl.where(total == 0.0, float("-inf"), log)
        total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    tl.store(
        out_ptr + place[:, None] * V + vdim[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=there[:, None] & (vdim < V)[None, :],
    )
    tl.store(lse_ptr + place, log + tl.log(total), mask=there)


@triton.jit(do_not_specialize=["T", "window", "q_start"])
def _query_gradient(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    start_ptr,
    first_ptr,
    T,
    K,
    window,
    q_start,
    factor,
    scale_log2,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_s,
    k_stride_k,
    k_stride_d,
    v_stride_b,
    v_stride_s,
    v_stride_k,
    v_stride_d,
    do_stride_b,
    do_stride_t,
    do_stride_h,
    do_stride_d,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    VDIM: tl.constexpr,
    LEAD: tl.constexpr,
    STRIDE: tl.constexpr,
    STRIDED: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, and delta = Σ dout * out of every row, which the other kernel needs too."""
    tile, b, kv = _locate(tl.cdiv(T, TOKENS), K)
    H = K * G
    first = tile * TOKENS
    last = tl.minimum(first + TOKENS, T) - 1

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    vdim = tl.arange(0, VDIM)
    key = tl.arange(0, KEYS)
    t = first + row // G
    there = t <= last
    t = tl.minimum(t, last)
    wide_t = t.to(tl.int64)
    head = kv * G + row % G
    place = (b * T + wide_t) * H + head
    q = tl.load(
        q_ptr
        + b * q_stride_b
        + wide_t[:, None] * q_stride_t
        + head[:, None] * q_stride_h
        + dim[None, :] * q_stride_d,
        mask=(dim < D)[None, :],
        other=0.0,
    )
    dout = tl.load(
        dout_ptr
        + b * do_stride_b
        + wide_t[:, None] * do_stride_t
        + head[:, None] * do_stride_h
        + vdim[None, :] * do_stride_d,
        mask=(vdim < V)[None, :],
        other=0.0,
    )
    out = tl.load(out_ptr + place[:, None] * V + vdim[None, :], mask=(vdim < V)[None, :], other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + place, delta, mask=there)
    lse_log2 = tl.load(lse_ptr + place) * LOG2_E
    position = _position(t, start_ptr, first_ptr, q_start, LEAD, STRIDE, STRIDED, PACKED)
    oldest = _oldest(t, position, start_ptr, window, PACKED)
    # both ends rise with t
    lowest = _position(first, start_ptr, first_ptr, q_start, LEAD, STRIDE, STRIDED, PACKED)
    end = _position(last, start_ptr, first_ptr, q_start, LEAD, STRIDE, STRIDED, PACKED) + 1
    begin = _oldest(first, lowest, start_ptr, window, PACKED)
    seen_by_all = _oldest(last, end - 1, start_ptr, window, PACKED)
    k_ptr += b * k_stride_b + kv * k_stride_k
    v_ptr += b * v_stride_b + kv * v_stride_k

    dq = tl.zeros((ROWS, DIM), tl.float32)
    for s0 in range(begin, end, KEYS):
        s = s0 + key
        at = s[:, None].to(tl.int64)
        k = tl.load(
            k_ptr + at * k_stride_s + dim[None, :] * k_stride_d,
            mask=(s < end)[:, None] & (dim < D)[None, :],
            other=0.0,
        )
        v = tl.load(
            v_ptr + at * v_stride_s + vdim[None, :] * v_stride_d,
            mask=(s < end)[:, None] & (vdim < V)[None, :],
            other=0.0,
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        # rounding of a huge lse must not make a probability above 1
        p = tl.exp2(tl.minimum(scores * scale_log2 - lse_log2[:, None], 0.0))
        ds = p * (dp - delta[:, None])
        if (s0 < seen_by_all) | (s0 + KEYS - 1 > lowest):
            visible = (s[None, :] >= oldest[:, None]) & (s[None, :] <= position[:, None])
            ds = tl.where(visible, ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    tl.store(
        dq_ptr + place[:, None] * D + dim[None, :],
        (dq * factor).to(dq_ptr.dtype.element_ty),
        mask=there[:, None] & (dim < D)[None, :],
    )


@triton.jit(do_not_specialize=["T", "S", "window", "q_start", "splits"])
def _key_gradient(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    start_ptr,
    first_ptr,
    seen_from_ptr,
    seen_until_ptr,
    T,
    S,
    K,
    window,
    q_start,
    splits,
    scale,
    scale_log2,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_s,
    k_stride_k,
    k_stride_d,
    v_stride_b,
    v_stride_s,
    v_stride_k,
    v_stride_d,
    do_stride_b,
    do_stride_t,
    do_stride_h,
    do_stride_d,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    VDIM: tl.constexpr,
    LEAD: tl.constexpr,
    STRIDE: tl.constexpr,
    STRIDED: tl.constexpr,
    SPLIT: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of one block of keys: all tiles of queries that see any of them, in order."""
    if SPLIT:  # the part changes fastest
        blocks = tl.cdiv(S, KEYS)
        pid = tl.program_id(0)
        split = pid % splits
        block = pid // splits % blocks
        b = (pid // splits // blocks // K).to(tl.int64)
        kv = (pid // splits // blocks % K).to(tl.int64)
    else:
        block, b, kv = _locate(tl.cdiv(S, KEYS), K)
    H = K * G
    s0 = block * KEYS
    s_last = tl.minimum(s0 + KEYS, S) - 1

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    vdim = tl.arange(0, VDIM)
    s = s0 + tl.arange(0, KEYS)
    key = s[:, None].to(tl.int64)
    k = tl.load(
        k_ptr + b * k_stride_b + key * k_stride_s + kv * k_stride_k + dim[None, :] * k_stride_d,
        mask=(s < S)[:, None] & (dim < D)[None, :],
        other=0.0,
    )
    v = tl.load(
        v_ptr + b * v_stride_b + key * v_stride_s + kv * v_stride_k + vdim[None, :] * v_stride_d,
        mask=(s < S)[:, None] & (vdim < V)[None, :],
        other=0.0,
    )
    # queries first_t … end_t - 1 may see one of the keys
    first_t = tl.maximum(s0 * STRIDE + LEAD - q_start, 0)
    end_t = tl.minimum((s_last + window) * STRIDE + LEAD - q_start, T)
    if PACKED:
        if STRIDED:
            first_t = tl.load(seen_from_ptr + s0)
            end_t = tl.load(seen_until_ptr + s_last)
        else:
            # starts do not decrease: the last key's sequence ends before the first larger start
            among = tl.arange(0, 256)
            same = 0
            for t0 in range(s_last, end_t, 256):
                start = tl.load(start_ptr + t0 + among, mask=t0 + among < end_t, other=2147483647)
                same += tl.sum((start <= s_last).to(tl.int32), 0)
            end_t = s_last + same
    if SPLIT:  # whole tiles of queries, so that the parts together read what one would
        tiles = tl.cdiv(tl.maximum(end_t - first_t, 0), TOKENS)
        each = tl.cdiv(tiles, splits) * TOKENS
        first_t += split * each
        end_t = tl.minimum(end_t, first_t + each)
    token = row // G
    head = kv * G + row % G
    q_ptr += b * q_stride_b
    dout_ptr += b * do_stride_b

    dk = tl.zeros((KEYS, DIM), tl.float32)
    dv = tl.zeros((KEYS, VDIM), tl.float32)
    for t0 in range(first_t, end_t, TOKENS):
        t = t0 + token
        there = (t < end_t) & (row < TOKENS * G)
        wide_t = t.to(tl.int64)
        q = tl.load(
            q_ptr
            + wide_t[:, None] * q_stride_t
            + head[:, None] * q_stride_h
            + dim[None, :] * q_stride_d,
            mask=there[:, None] & (dim < D)[None, :],
            other=0.0,
        )
        dout = tl.load(
            dout_ptr
            + wide_t[:, None] * do_stride_t
            + head[:, None] * do_stride_h
            + vdim[None, :] * do_stride_d,
            mask=there[:, None] & (vdim < V)[None, :],
            other=0.0,
        )
        place = (b * T + wide_t) * H + head
        # a row that is not there has probability exp(-inf)
        lse = tl.load(lse_ptr + place, mask=there, other=float("inf"))
        delta = tl.load(delta_ptr + place, mask=there, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        p = tl.exp2(tl.minimum(scores * scale_log2 - (lse * LOG2_E)[None, :], 0.0))
        ds = p * (dp - delta[None, :])
        t_last = tl.minimum(t0 + TOKENS, end_t) - 1
        lowest = _position(t0, start_ptr, first_ptr, q_start, LEAD, STRIDE, STRIDED, PACKED)
        highest = _position(t_last, start_ptr, first_ptr, q_start, LEAD, STRIDE, STRIDED, PACKED)
        oldest = _oldest(t_last, highest, start_ptr, window, PACKED)
        if (oldest > s0) | (lowest < s_last):
            real = tl.minimum(t, T - 1)
            position = _position(real, start_ptr, first_ptr, q_start, LEAD, STRIDE, STRIDED, PACKED)
            seen = _oldest(real, position, start_ptr, window, PACKED)
            visible = (s[:, None] >= seen[None, :]) & (s[:, None] <= position[None, :])
            # after the fact: what overflowed in another sequence's row may be no number
            p = tl.where(visible, p, 0.0)
            ds = tl.where(visible, ds, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    place = (b * S + key) * K + kv
    if SPLIT:
        place += split * (tl.num_programs(0) // splits // blocks * S).to(tl.int64)
    tl.store(
        dk_ptr + place * D + dim[None, :],
        (dk * scale).to(dk_ptr.dtype.element_ty),
        mask=(s < S)[:, None] & (dim < D)[None, :],
    )
    tl.store(
        dv_ptr + place * V + vdim[None, :],
        dv.to(dv_ptr.dtype.element_ty),
        mask=(s < S)[:, None] & (vdim < V)[None, :],
    )
