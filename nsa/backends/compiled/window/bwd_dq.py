"""dq of attention over a band of keys, as a Triton kernel; of two bands at once:
:mod:`.gated_queries`.

B batch, T query tokens, H query heads, K key/value heads, G heads per group, D key size, V value
size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.window.bounds import LOG2_E, first_seen, last_seen, locate, steps_of


@triton.jit
def _add_keys(
    dq,  # [ROWS, DIM], as is the result
    q,
    dout,
    lse_log2,
    delta,
    weight,
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
    WEIGHTED: tl.constexpr,
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
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        # rounding of a huge lse must not make a probability above 1, nor an unseen score that
        # overflowed one that is no number: the minimum of that and 0 is 0
        p = tl.exp2(tl.minimum(scores * scale_log2 - lse_log2[:, None], 0.0))
        if WEIGHTED:
            p *= weight[:, None]
        ds = dp - delta[:, None]
        if EDGE:
            s = s0 + key
            visible = (s[None, :] >= oldest[:, None]) & (s[None, :] <= position[:, None])
            ds = tl.where(visible, ds, 0.0)
        dq = tl.dot((p * ds).to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def add_band(
    dq,  # [ROWS, DIM], as is the result
    q,
    dout,
    lse_log2,
    delta,
    weight,
    k_ptr,  # of the batch row and the head
    v_ptr,
    start_ptr,
    first_ptr,
    t,
    first,
    last,
    window,
    q_start,
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
    LEAD: tl.constexpr,
    STRIDE: tl.constexpr,
    STRIDED: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """``dq + Σ ds * k`` over the keys that tokens ``first … last`` see."""
    position = last_seen(t, start_ptr, first_ptr, q_start, LEAD, STRIDE, STRIDED, PACKED)
    oldest = first_seen(t, position, start_ptr, window, PACKED)
    # both ends rise with t
    lowest = last_seen(first, start_ptr, first_ptr, q_start, LEAD, STRIDE, STRIDED, PACKED)
    end = last_seen(last, start_ptr, first_ptr, q_start, LEAD, STRIDE, STRIDED, PACKED) + 1
    begin = first_seen(first, lowest, start_ptr, window, PACKED)
    seen_by_all = first_seen(last, end - 1, start_ptr, window, PACKED)
    steps, before, within = steps_of(begin, end, seen_by_all, lowest + 1, KEYS)
    for edge in tl.static_range(2):
        dq = _add_keys(
            dq,
            q,
            dout,
            lse_log2,
            delta,
            weight,
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
            WEIGHTED,
        )
    return dq


@triton.jit(do_not_specialize=["T", "window", "q_start"])
def query_gradient(
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
    """dq, and delta = Σ dout * out of every row, which the kernel for dk and dv needs too."""
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
    dq = add_band(
        tl.zeros((ROWS, DIM), tl.float32),
        q,
        dout,
        lse_log2,
        delta,
        delta,
        k_ptr + b * k_stride_b + kv * k_stride_k,
        v_ptr + b * v_stride_b + kv * v_stride_k,
        start_ptr,
        first_ptr,
        t,
        first,
        last,
        window,
        q_start,
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
        LEAD,
        STRIDE,
        STRIDED,
        PACKED,
        PRECISION,
        False,
    )
    tl.store(
        dq_ptr + place[:, None] * D + dim[None, :],
        (dq * factor).to(dq_ptr.dtype.element_ty),
        mask=there[:, None] & (dim < D)[None, :],
    )
