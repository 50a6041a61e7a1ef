"""Selected attention of short sequences, at most 64 blocks each: dense causal, under a bit mask.

B batch, T query tokens, S keys, H query heads, K key/value heads, G heads per group, D key size,
V value size, n listed blocks, l' tokens of a block. "Position" means the row of the keys.

Where a sequence has few blocks, neighbouring tokens together list nearly all of them, and looking
blocks up costs more than it saves. Here a list is one int64: bit j says that block j is listed. The
tiles are those of :mod:`nsa.kernels.window`: m tokens times G heads are rows. A program goes
through the blocks that one of its tokens lists, or (dk, dv) through the tokens that list one of its
blocks, and masks the rest.

Tiles of keys start where their sequence starts, packed or not, so that a tile lies in one block
whenever l' is a multiple of it: a row then sees the keys up to one number, or none. A program whose
queries or keys are of several sequences takes these one after the other.

No atomics: all gradients are deterministic.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.window import (
    LOG2_E,
    LOG2E,
    WindowTiles,
    _locate,
    _positive,
    forward_tiles,
    key_gradient_tiles,
    query_gradient_tiles,
)

MAX_BLOCKS = 64
"""Blocks of a sequence at most: the bits of an int64."""

BLOCKS = tl.constexpr(MAX_BLOCKS)
FAR = tl.constexpr(2**31 - 1)


def short_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    *,
    start: Tensor | None,
    select_block: int,
    scale: float,
    q_start: int = 0,
    tiles: WindowTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens ``s <= t`` of the listed blocks; blocks from 64 on do not exist.

    Args:
        q: ``[B, T, H, D]``, fp32, fp16 or bf16; query head h reads key head h // G.
        k, v: ``[B, S, K, D]`` and ``[B, S, K, V]``, of q's dtype; S is T when packed.
        block_idx: int32 ``[B, T, K, n]``, in any order; −1 lists nothing. Block j covers the
            positions ``j*l' … j*l' + l' - 1`` of the query's own sequence.
        start: None for a regular batch; packed (B = 1): int32 ``[T]``, the first token of each
            token's sequence, which does not decrease.
        select_block: l', in tokens.
        scale: of the scores.
        q_start: position of q's first row; 0 when packed.
        tiles: overrides the tiles of the window's forward kernel.

    Returns:
        out ``[B, T, H, V]`` in q's dtype and lse ``[B, T, H]``, fp32, natural log; 0 and −inf
        where nothing is visible.
    """
    B, T, H, D = q.shape
    S, K, V = v.shape[1:]
    out = torch.empty(B, T, H, V, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    q, scale, _ = _positive(q, scale)
    tiles = tiles or _dividing(forward_tiles(q.dtype, max(D, V)), select_block)
    shape, options = _shape(q, k, v, tiles, start, select_block, q_start)
    with torch.cuda.device_of(q):
        bits = block_bits(block_idx)
        _forward[(triton.cdiv(T, shape["TOKENS"]) * B * K,)](
            q,
            k,
            v,
            bits,
            out,
            lse,
            *_sequences(start, bits),
            T,
            S,
            K,
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


def short_backward(
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
    q_tiles: WindowTiles | None = None,
    k_tiles: WindowTiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`short_forward`, whose arguments and results come in unchanged.

    Args:
        dout: ``[B, T, H, V]``, the gradient of ``out``, in its dtype.
        q_tiles, k_tiles: override the tiles of the window's two gradient kernels.

    Returns:
        dq, dk, dv, shaped like q, k, v and in their dtypes.
    """
    B, T, H, D = q.shape
    S, K, V = v.shape[1:]
    dq = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    dk = torch.empty(B, S, K, D, dtype=k.dtype, device=q.device)
    dv = torch.empty(B, S, K, V, dtype=v.dtype, device=q.device)
    if lse.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    out, lse = out.contiguous(), lse.contiguous()
    q, scale, sign = _positive(q, scale)
    delta = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    tiles = q_tiles or _dividing(query_gradient_tiles(q.dtype, max(D, V)), select_block)
    shape, options = _shape(q, k, v, tiles, start, select_block, q_start)
    with torch.cuda.device_of(q):
        bits = block_bits(block_idx)
        sequences = _sequences(start, bits)
        _query_gradient[(triton.cdiv(T, shape["TOKENS"]) * B * K,)](
            q,
            k,
            v,
            bits,
            out,
            dout,
            lse,
            delta,
            dq,
            *sequences,
            T,
            S,
            K,
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
    if S == 0:
        return dq, dk, dv
    tiles = k_tiles or key_gradient_tiles(q.dtype, max(D, V))
    shape, options = _shape(q, k, v, tiles, start, select_block, q_start)
    with torch.cuda.device_of(q):
        _key_gradient[(triton.cdiv(S, tiles.keys) * B * K,)](
            q,
            k,
            v,
            bits,
            dout,
            lse,
            delta,
            dk,
            dv,
            *sequences,
            T,
            S,
            K,
            q_start,
            scale,
            scale * LOG2E,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *dout.stride(),
            **shape,
            **options,
        )
    return dq, dk, dv


def block_bits(block_idx: Tensor) -> Tensor:
    """int64 ``[B, T, K]`` of lists int32 ``[B, T, K, n]``: bit j is set where block j is listed.

    Blocks that no bit stands for are left out.
    """
    block_idx = block_idx.contiguous()
    bits = torch.empty(block_idx.shape[:3], dtype=torch.int64, device=block_idx.device)
    if bits.numel():
        grid = (triton.cdiv(bits.numel(), 128),)
        _bits[grid](block_idx, bits, bits.numel(), block_idx.shape[3], ROWS=128, num_warps=4)
    return bits


def _sequences(start: Tensor | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    """int32 ``[T]`` each: where a token's sequence starts, and where it has ended."""
    if start is None:
        return unused, unused
    start = start.contiguous()
    return start, torch.searchsorted(start, start, right=True, out_int32=True)


def _dividing(tiles: WindowTiles, select_block: int) -> WindowTiles:
    """Half as many keys if only those divide a block."""
    if select_block % tiles.keys and tiles.keys > 32 and select_block % (tiles.keys // 2) == 0:
        return replace(tiles, keys=tiles.keys // 2)
    return tiles


def _shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: WindowTiles,
    start: Tensor | None,
    select_block: int,
    q_start: int,
) -> tuple[dict[str, Any], dict[str, int]]:
    """The constants of a launch, and its options."""
    G, D, V = q.shape[2] // k.shape[2], q.shape[3], v.shape[3]
    assert start is None or (q_start == 0 and k.shape[1] == q.shape[1])
    rows = max(tiles.rows, triton.next_power_of_2(G))
    constants = {
        "G": G,
        "D": D,
        "V": V,
        "SELECT": select_block,
        "TOKENS": rows // G,
        "SLOTS": triton.next_power_of_2(rows // G),
        "ROWS": rows,
        "KEYS": tiles.keys,
        "PARTS": select_block // tiles.keys if select_block % tiles.keys == 0 else 0,
        "DIM": max(16, triton.next_power_of_2(D)),
        "VDIM": max(16, triton.next_power_of_2(V)),
        "PACKED": start is not None,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # tf32: no effect on 16 bits
    }
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    if tiles.maxnreg is not None:
        options["maxnreg"] = tiles.maxnreg
    return constants, options


@triton.jit(do_not_specialize=["rows"])
def _bits(lists_ptr, bits_ptr, rows, n, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    bits = tl.zeros((ROWS,), tl.int64)
    for i in range(n):
        block = tl.load(lists_ptr + row * n + i, mask=row < rows, other=-1)
        exists = (block >= 0) & (block < BLOCKS)
        bit = tl.full((ROWS,), 1, tl.int64) << tl.where(exists, block, 0).to(tl.int64)
        bits = bits | tl.where(exists, bit, 0)
    tl.store(bits_ptr + row, bits, mask=row < rows)


@triton.jit
def _lowest(bits):
    """Number of the lowest set bit of an int64 scalar: the exponent of its value as a float."""
    return (((bits & -bits).to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def _number(is_set):
    """int64 scalar with bit i set where the i-th of 64 elements is 1."""
    return tl.sum(is_set.to(tl.int64) << tl.arange(0, BLOCKS).to(tl.int64), 0)


@triton.jit
def _segments(first, last, start_ptr, SLOTS: tl.constexpr, PACKED: tl.constexpr):
    """How many sequences tokens first … last are of."""
    segments = 1
    if PACKED:
        token = first + tl.arange(0, SLOTS)
        start = tl.load(start_ptr + token, mask=token <= last, other=-1)
        segments = tl.sum(((start == token) | (token == first)).to(tl.int32), 0)
    return segments


@triton.jit
def _segment(t, last, start_ptr, stop_ptr, S, q_start, SELECT: tl.constexpr, PACKED: tl.constexpr):
    """The sequence of token t: first key, last of its tokens up to ``last``, end of their keys."""
    origin = 0
    final = last
    if PACKED:
        origin = tl.load(start_ptr + t)
        final = tl.minimum(last, tl.load(stop_ptr + t) - 1)
    end = tl.minimum(final + q_start + 1, S)
    return origin, final, tl.minimum(end, origin + BLOCKS * SELECT)


@triton.jit
def _union(t, final, bits_ptr, K, keys, SELECT: tl.constexpr, SLOTS: tl.constexpr):
    """Blocks among the first ``keys`` keys that one of tokens t … final lists; their number."""
    token = t + tl.arange(0, SLOTS)
    block = tl.arange(0, BLOCKS)
    bits = tl.load(bits_ptr + token.to(tl.int64) * K, mask=token <= final, other=0)
    listed = tl.max(((bits[:, None] >> block[None, :].to(tl.int64)) & 1).to(tl.int32), 0)
    listed = tl.where(block * SELECT < keys, listed, 0)
    return _number(listed), tl.sum(listed, 0)


@triton.jit
def _step(step, remaining, origin, SELECT: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr):
    """First key of a tile, its block, and the blocks that remain after it."""
    if PARTS == 0:
        block = 0
        s0 = origin + step * KEYS
    else:
        block = _lowest(remaining)
        s0 = origin + block * SELECT + (step % PARTS) * KEYS
        after = remaining & (remaining - 1)
        remaining = tl.where(step % PARTS == PARTS - 1, after, remaining)
    return s0, block, remaining


@triton.jit
def _visible(
    s, s0, block, origin, end, bits, position, SELECT: tl.constexpr, KEYS: tl.constexpr, ONE
):
    """Which of the keys s (a row) each query (a column) sees."""
    if ONE:  # in a tile of one block, all keys up to a number, or none
        reach = tl.minimum(position, end - 1) - s0
        reach = tl.where(((bits >> block.to(tl.int64)) & 1) != 0, reach, -1)
        return tl.arange(0, KEYS)[None, :] <= reach[:, None]
    blocks = tl.minimum((s - origin) // SELECT, BLOCKS - 1).to(tl.int64)
    bit = tl.where(s < end, tl.full((KEYS,), 1, tl.int64) << blocks, 0)
    return ((bits[:, None] & bit[None, :]) != 0) & (s[None, :] <= position[:, None])


@triton.jit(do_not_specialize=["T", "S", "q_start"])
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    bits_ptr,
    out_ptr,
    lse_ptr,
    start_ptr,
    stop_ptr,
    T,
    S,
    K,
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
    SELECT: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,  # tiles of a block; 0: tiles do not divide blocks
    DIM: tl.constexpr,
    VDIM: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(T, TOKENS)
    tile, b, kv = _locate(tiles, K)
    tile = tiles - 1 - tile  # what takes longest goes first
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
    k_ptr += b * k_stride_b + kv * k_stride_k
    v_ptr += b * v_stride_b + kv * v_stride_k
    bits_ptr += b * T * K + kv
    bits = tl.load(bits_ptr + t.to(tl.int64) * K)

    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, VDIM), tl.float32)
    t0 = first
    for _ in range(_segments(first, last, start_ptr, SLOTS, PACKED)):
        origin, final, end = _segment(t0, last, start_ptr, stop_ptr, S, q_start, SELECT, PACKED)
        own = bits
        if PACKED:
            own = tl.where((t >= t0) & (t <= final), bits, 0)
        if PARTS == 0:
            remaining = 0
            steps = tl.cdiv(tl.maximum(end - origin, 0), KEYS)
        else:
            remaining, count = _union(t0, final, bits_ptr, K, end - origin, SELECT, SLOTS)
            steps = count * PARTS
        for step in range(steps):
            s0, block, remaining = _step(step, remaining, origin, SELECT, KEYS, PARTS)
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
            visible = _visible(
                s, s0, block, origin, end, own, t + q_start, SELECT, KEYS, PARTS != 0
            )
            scores = tl.where(visible, scores, float("-inf"))
            new = tl.maximum(highest, tl.max(scores, 1))
            base = tl.where(new == float("-inf"), 0.0, new)  # nothing seen so far
            # the difference first: scaled apart, two huge scores round apart
            p = tl.exp2((scores - base[:, None]) * scale_log2)
            shrink = tl.exp2((highest - base) * scale_log2)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None]
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
            highest = new
        t0 = final + 1

    place = (b * T + t.to(tl.int64)) * H + head
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    tl.store(
        out_ptr + place[:, None] * V + vdim[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=there[:, None] & (vdim < V)[None, :],
    )
    lse = tl.where(empty, float("-inf"), highest * scale + tl.log(total))
    tl.store(lse_ptr + place, lse, mask=there)


@triton.jit(do_not_specialize=["T", "S", "q_start"])
def _query_gradient(
    q_ptr,
    k_ptr,
    v_ptr,
    bits_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    start_ptr,
    stop_ptr,
    T,
    S,
    K,
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
    SELECT: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    DIM: tl.constexpr,
    VDIM: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, and delta = Σ dout * out of every row, which the other kernel needs too."""
    tiles = tl.cdiv(T, TOKENS)
    tile, b, kv = _locate(tiles, K)
    tile = tiles - 1 - tile
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
    k_ptr += b * k_stride_b + kv * k_stride_k
    v_ptr += b * v_stride_b + kv * v_stride_k
    bits_ptr += b * T * K + kv
    bits = tl.load(bits_ptr + wide_t * K)

    dq = tl.zeros((ROWS, DIM), tl.float32)
    t0 = first
    for _ in range(_segments(first, last, start_ptr, SLOTS, PACKED)):
        origin, final, end = _segment(t0, last, start_ptr, stop_ptr, S, q_start, SELECT, PACKED)
        own = bits
        if PACKED:
            own = tl.where((t >= t0) & (t <= final), bits, 0)
        if PARTS == 0:
            remaining = 0
            steps = tl.cdiv(tl.maximum(end - origin, 0), KEYS)
        else:
            remaining, count = _union(t0, final, bits_ptr, K, end - origin, SELECT, SLOTS)
            steps = count * PARTS
        for step in range(steps):
            s0, block, remaining = _step(step, remaining, origin, SELECT, KEYS, PARTS)
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
            visible = _visible(
                s, s0, block, origin, end, own, t + q_start, SELECT, KEYS, PARTS != 0
            )
            ds = tl.where(visible, p * (dp - delta[:, None]), 0.0)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        t0 = final + 1

    tl.store(
        dq_ptr + place[:, None] * D + dim[None, :],
        (dq * factor).to(dq_ptr.dtype.element_ty),
        mask=there[:, None] & (dim < D)[None, :],
    )


@triton.jit(do_not_specialize=["T", "S", "q_start"])
def _key_gradient(
    q_ptr,
    k_ptr,
    v_ptr,
    bits_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    start_ptr,
    stop_ptr,
    T,
    S,
    K,
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
    do_stride_b,
    do_stride_t,
    do_stride_h,
    do_stride_d,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    SELECT: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    DIM: tl.constexpr,
    VDIM: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of the tiles of keys that start among KEYS keys: one, or more where packed."""
    place, b, kv = _locate(tl.cdiv(S, KEYS), K)
    H = K * G
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    vdim = tl.arange(0, VDIM)
    slot = tl.arange(0, SLOTS)
    number = tl.arange(0, BLOCKS)
    token = row // G
    head = kv * G + row % G
    q_ptr += b * q_stride_b
    dout_ptr += b * do_stride_b
    k_ptr += b * k_stride_b + kv * k_stride_k
    v_ptr += b * v_stride_b + kv * v_stride_k
    bits_ptr += b * T * K + kv

    among = place * KEYS + tl.arange(0, KEYS)
    tiles = 1
    if PACKED:
        start = tl.load(start_ptr + among, mask=among < S, other=0)
        is_first = (among < S) & ((among - start) % KEYS == 0)
        tiles = tl.sum(is_first.to(tl.int32), 0)
    s0 = place * KEYS - 1
    for _ in range(tiles):
        if PACKED:
            s0 = tl.min(tl.where(is_first & (among > s0), among, FAR), 0)
            origin = tl.load(start_ptr + s0)
            s_end = tl.load(stop_ptr + s0)
            first_t = s0
            end_t = s_end
        else:
            s0 = place * KEYS
            origin = 0
            s_end = S
            first_t = tl.maximum(s0 - q_start, 0)
            end_t = T
        s = s0 + tl.arange(0, KEYS)
        key = s[:, None].to(tl.int64)
        k = tl.load(
            k_ptr + key * k_stride_s + dim[None, :] * k_stride_d,
            mask=(s < s_end)[:, None] & (dim < D)[None, :],
            other=0.0,
        )
        v = tl.load(
            v_ptr + key * v_stride_s + vdim[None, :] * v_stride_d,
            mask=(s < s_end)[:, None] & (vdim < V)[None, :],
            other=0.0,
        )
        # The blocks of these keys as bits, counted from the first of them: they seldom fill 32.
        low = (s0 - origin) // SELECT
        end_t = tl.where(low < BLOCKS, end_t, first_t)
        block = (s - origin) // SELECT
        if KEYS <= 30 * SELECT:
            bit = tl.full((KEYS,), 1, tl.int32) << (block - low)
        else:
            past = (block - low).to(tl.int64)
            bit = tl.full((KEYS,), 1, tl.int64) << tl.minimum(past, BLOCKS - 1)
        bit = tl.where(block < BLOCKS, bit, 0)
        high = (s0 + KEYS - 1 - origin) // SELECT
        these = _number((number >= low) & (number <= high))
        low = tl.minimum(low, BLOCKS - 1).to(tl.int64)

        dk = tl.zeros((KEYS, DIM), tl.float32)
        dv = tl.zeros((KEYS, VDIM), tl.float32)
        for chunk in range(first_t, end_t, BLOCKS * TOKENS):
            # which of the next 64 tiles of queries list one of the blocks
            query = chunk + number[:, None] * TOKENS + slot[None, :]
            lists = tl.load(
                bits_ptr + query.to(tl.int64) * K,
                mask=(query < end_t) & (slot < TOKENS)[None, :],
                other=0,
            )
            listed = tl.max(((lists & these) != 0).to(tl.int32), 1)
            remaining = _number(listed)
            for _i in range(tl.sum(listed, 0)):
                t = chunk + _lowest(remaining) * TOKENS + token
                remaining = remaining & (remaining - 1)
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
                line = (b * T + wide_t) * H + head
                lse = tl.load(lse_ptr + line, mask=there, other=0.0)
                delta = tl.load(delta_ptr + line, mask=there, other=0.0)
                bits = tl.load(bits_ptr + wide_t * K, mask=there, other=0) >> low
                scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
                p = tl.exp2(tl.minimum(scores * scale_log2 - (lse * LOG2_E)[None, :], 0.0))
                ds = p * (dp - delta[None, :])
                if PARTS != 0:
                    reach = tl.where((bits & 1) != 0, t + q_start, -1)
                    visible = s[:, None] <= reach[None, :]
                else:
                    position = t + q_start
                    visible = (bits.to(bit.dtype)[None, :] & bit[:, None]) != 0
                    visible = visible & (s[:, None] <= position[None, :])
                # after the fact: what overflowed in a row that sees none of it may be no number
                p = tl.where(visible, p, 0.0)
                ds = tl.where(visible, ds, 0.0)
                dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

        line = (b * S + key) * K + kv
        tl.store(
            dk_ptr + line * D + dim[None, :],
            (dk * scale).to(dk_ptr.dtype.element_ty),
            mask=(s < s_end)[:, None] & (dim < D)[None, :],
        )
        tl.store(
            dv_ptr + line * V + vdim[None, :],
            dv.to(dv_ptr.dtype.element_ty),
            mask=(s < s_end)[:, None] & (vdim < V)[None, :],
        )
