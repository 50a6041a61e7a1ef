"""Attention over a band of keys, forward, as a Triton kernel.

The G heads of a group are rows of one tile: a program that takes m tokens has m * G rows on the
same m + w - 1 keys, so keys and values are read once for all of them, and little of the band's edge
is computed in vain. The algorithm is FlashAttention-2's (arXiv 2307.08691).

B batch, T query tokens, H query heads, K key/value heads, G heads per group, D key size, V value
size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.window.bounds import first_seen, last_seen, locate, steps_of


@triton.jit
def _attend(
    acc,  # [ROWS, VDIM]; the three are what was and what will be
    highest,  # [ROWS]
    total,  # [ROWS]
    q,
    k_ptr,  # of the batch row and the head
    v_ptr,
    position,
    oldest,
    begin,
    end,
    steps,
    before,
    skipped,
    scale_log2,
    k_stride_s,
    k_stride_d,
    v_stride_s,
    v_stride_d,
    D: tl.constexpr,
    V: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    VDIM: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys from ``begin`` on, KEYS a step; after ``before`` steps ``skipped`` are left out. Without
    EDGE every row sees all of them."""
    dim = tl.arange(0, DIM)
    vdim = tl.arange(0, VDIM)
    key = tl.arange(0, KEYS)
    # Keeping what is the same in every step spills where heads are large.
    for step in tl.range(steps, disable_licm=DIM + VDIM > 128):
        s0 = begin + step * KEYS
        if EDGE:
            s0 += tl.where(step < before, 0, skipped) * KEYS
        there = s0 + key < end if EDGE else key >= 0
        k_there = there[:, None] if D == DIM else there[:, None] & (dim < D)[None, :]
        v_there = there[:, None] if V == VDIM else there[:, None] & (vdim < V)[None, :]
        k_at = key[:, None] * k_stride_s + dim[None, :] * k_stride_d
        v_at = key[:, None] * v_stride_s + vdim[None, :] * v_stride_d
        k = tl.load(k_ptr + s0.to(tl.int64) * k_stride_s + k_at, mask=k_there, other=0.0)
        v = tl.load(v_ptr + s0.to(tl.int64) * v_stride_s + v_at, mask=v_there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if EDGE:
            s = s0 + key
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
    return acc, highest, total


@triton.jit(do_not_specialize=["T", "window", "q_start"])
def forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    start_ptr,
    first_ptr,
    compressed_ptr,  # [B, T, H, V], contiguous, as are the next two
    selected_ptr,
    mixed_ptr,  # written with MIX
    gates_ptr,
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
    g_stride_b,
    g_stride_t,
    g_stride_h,
    g_stride_c,
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
    MIX: tl.constexpr,
):
    """One branch; with MIX also the gated sum of the three, of which this one is the window."""
    tile, b, kv = locate(tl.cdiv(T, TOKENS), K)
    H = K * G
    first = tile * TOKENS
    last = tl.minimum(first + TOKENS, T) - 1

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    vdim = tl.arange(0, VDIM)
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
    position = last_seen(t, start_ptr, first_ptr, q_start, LEAD, STRIDE, STRIDED, PACKED)
    oldest = first_seen(t, position, start_ptr, window, PACKED)
    # both ends rise with t
    lowest = last_seen(first, start_ptr, first_ptr, q_start, LEAD, STRIDE, STRIDED, PACKED)
    end = last_seen(last, start_ptr, first_ptr, q_start, LEAD, STRIDE, STRIDED, PACKED) + 1
    begin = first_seen(first, lowest, start_ptr, window, PACKED)
    seen_by_all = first_seen(last, end - 1, start_ptr, window, PACKED)
    k_ptr += b * k_stride_b + kv * k_stride_k
    v_ptr += b * v_stride_b + kv * v_stride_k

    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, VDIM), tl.float32)
    steps, before, within = steps_of(begin, end, seen_by_all, lowest + 1, KEYS)
    for edge in tl.static_range(2):
        acc, highest, total = _attend(
            acc,
            highest,
            total,
            q,
            k_ptr,
            v_ptr,
            position,
            oldest,
            begin if edge == 1 else begin + before * KEYS,
            end,
            steps - within if edge == 1 else within,
            before,
            within,
            scale_log2,
            k_stride_s,
            k_stride_d,
            v_stride_s,
            v_stride_d,
            D,
            V,
            KEYS,
            DIM,
            VDIM,
            edge == 1,
            PRECISION,
        )

    place = (b * T + t.to(tl.int64)) * H + head
    log = highest * scale
    if STRIDED:  # some see nothing
        log = tl.where(total == 0.0, float("-inf"), log)
        total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    at = place[:, None] * V + vdim[None, :]
    stored = there[:, None] & (vdim < V)[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=stored)
    tl.store(lse_ptr + place, log + tl.log(total), mask=there)
    if MIX:
        gates_ptr += b * g_stride_b + t.to(tl.int64) * g_stride_t + head * g_stride_h
        acc *= tl.load(gates_ptr + 2 * g_stride_c).to(tl.float32)[:, None]
        gate = tl.load(gates_ptr).to(tl.float32)[:, None]
        acc += gate * tl.load(compressed_ptr + at, mask=stored, other=0.0).to(tl.float32)
        gate = tl.load(gates_ptr + g_stride_c).to(tl.float32)[:, None]
        acc += gate * tl.load(selected_ptr + at, mask=stored, other=0.0).to(tl.float32)
        tl.store(mixed_ptr + at, acc.to(mixed_ptr.dtype.element_ty), mask=stored)
