"""dq of two bands at once, the compressed branch's and the window's, and the gates' gradient.

The two branches of a layer read the same queries and the same gradient of the gated sum, so that
one program can take both. No branch then needs the gradient of its own output: a gate g of a row
makes its probabilities g*p, and the gradient of the scores ``g*p*(dp - delta)`` with
``delta = Σ dout * out`` of the row, which is also the gate's gradient.

B batch, T query tokens, H query heads, K key/value heads, G heads per group, D key size, V value
size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.window.bounds import LOG2_E, locate
from nsa.backends.compiled.window.bwd_dq import add_band


@triton.jit
def _row_facts(
    branch: tl.constexpr,
    dout,
    out_ptr,
    lse_ptr,
    gate_ptr,
    gate_stride,
    dgates_ptr,
    rows_ptr,
    rows,
    place,
    at,
    mask,
    there,
    WEIGHTED: tl.constexpr,
):
    """lse in base 2, delta and weight of a branch's rows, and stores them for the other kernels."""
    out = tl.load(out_ptr + at, mask=mask, other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(lse_ptr + place)
    weight = tl.load(gate_ptr + branch * gate_stride).to(tl.float32)
    tl.store(dgates_ptr + place * 3 + branch, delta.to(dgates_ptr.dtype.element_ty), mask=there)
    if not WEIGHTED:  # exp(s - lse + log g) is g*p
        delta = tl.where((weight < 0.0) | (weight > 1.0), float("nan"), delta)
        shut = weight == 0.0
        lse = tl.where(shut, float("inf"), lse - tl.log(tl.where(shut, 1.0, weight)))
    tl.store(rows_ptr + branch * rows + place, lse, mask=there)
    tl.store(rows_ptr + (3 + branch) * rows + place, delta, mask=there)
    if WEIGHTED:
        tl.store(rows_ptr + (6 + branch) * rows + place, weight, mask=there)
    return lse * LOG2_E, delta, weight


@triton.jit(do_not_specialize=["rows", "T", "N", "window"])
def gated_query_gradient(
    q_ptr,
    k_cmp_ptr,
    v_cmp_ptr,
    k_win_ptr,
    v_win_ptr,
    gates_ptr,
    out_cmp_ptr,  # [B, T, H, V], contiguous, as are the next two
    out_slc_ptr,
    out_win_ptr,
    lse_cmp_ptr,  # [B, T, H], contiguous, as are the next two
    lse_slc_ptr,
    lse_win_ptr,
    dout_ptr,
    dq_ptr,  # [B, T, H, D], contiguous; written
    dgates_ptr,  # [B, T, H, 3], contiguous; written
    rows_ptr,  # fp32 [2 or 3, 3, B, T, H]: lse, delta and weight of every branch; written
    start_ptr,
    cmp_start_ptr,
    first_ptr,
    rows,
    T,
    N,
    K,
    window,
    factor,
    scale_log2,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    q_stride_d,
    kc_stride_b,
    kc_stride_s,
    kc_stride_k,
    kc_stride_d,
    vc_stride_b,
    vc_stride_s,
    vc_stride_k,
    vc_stride_d,
    kw_stride_b,
    kw_stride_s,
    kw_stride_k,
    kw_stride_d,
    vw_stride_b,
    vw_stride_s,
    vw_stride_k,
    vw_stride_d,
    g_stride_b,
    g_stride_t,
    g_stride_h,
    g_stride_c,
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
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """dq of the compressed branch and of the window, the gates' gradient, and what the kernels for
    dk, dv and the selected branch need of every row.

    Without WEIGHTED gates are in 0…1, and a gate is part of the lse: those kernels then do nothing
    for it.
    """
    tile, b, kv = locate(tl.cdiv(T, TOKENS), K)
    H = K * G
    rows = rows.to(tl.int64)
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
    out_mask = (vdim < V)[None, :]
    dout = tl.load(
        dout_ptr
        + b * do_stride_b
        + wide_t[:, None] * do_stride_t
        + head[:, None] * do_stride_h
        + vdim[None, :] * do_stride_d,
        mask=out_mask,
        other=0.0,
    )
    at = place[:, None] * V + vdim[None, :]
    gate_ptr = gates_ptr + b * g_stride_b + wide_t * g_stride_t + head * g_stride_h
    _row_facts(
        1,
        dout,
        out_slc_ptr,
        lse_slc_ptr,
        gate_ptr,
        g_stride_c,
        dgates_ptr,
        rows_ptr,
        rows,
        place,
        at,
        out_mask,
        there,
        WEIGHTED,
    )
    # all before the loops: dout is then no longer held in registers
    win_lse_log2, win_delta, win_weight = _row_facts(
        2,
        dout,
        out_win_ptr,
        lse_win_ptr,
        gate_ptr,
        g_stride_c,
        dgates_ptr,
        rows_ptr,
        rows,
        place,
        at,
        out_mask,
        there,
        WEIGHTED,
    )
    lse_log2, delta, weight = _row_facts(
        0,
        dout,
        out_cmp_ptr,
        lse_cmp_ptr,
        gate_ptr,
        g_stride_c,
        dgates_ptr,
        rows_ptr,
        rows,
        place,
        at,
        out_mask,
        there,
        WEIGHTED,
    )
    dq = add_band(
        tl.zeros((ROWS, DIM), tl.float32),
        q,
        dout,
        lse_log2,
        delta,
        weight,
        k_cmp_ptr + b * kc_stride_b + kv * kc_stride_k,
        v_cmp_ptr + b * vc_stride_b + kv * vc_stride_k,
        cmp_start_ptr,
        first_ptr,
        t,
        first,
        last,
        N,
        0,
        scale_log2,
        kc_stride_s,
        kc_stride_d,
        vc_stride_s,
        vc_stride_d,
        D,
        V,
        KEYS,
        DIM,
        VDIM,
        LEAD,
        STRIDE,
        True,
        PACKED,
        PRECISION,
        WEIGHTED,
    )
    dq = add_band(
        dq,
        q,
        dout,
        win_lse_log2,
        win_delta,
        win_weight,
        k_win_ptr + b * kw_stride_b + kv * kw_stride_k,
        v_win_ptr + b * vw_stride_b + kv * vw_stride_k,
        start_ptr,
        first_ptr,
        t,
        first,
        last,
        window,
        0,
        scale_log2,
        kw_stride_s,
        kw_stride_d,
        vw_stride_s,
        vw_stride_d,
        D,
        V,
        KEYS,
        DIM,
        VDIM,
        0,
        1,
        False,
        PACKED,
        PRECISION,
        WEIGHTED,
    )
    tl.store(
        dq_ptr + place[:, None] * D + dim[None, :],
        (dq * factor).to(dq_ptr.dtype.element_ty),
        mask=there[:, None] & (dim < D)[None, :],
    )
