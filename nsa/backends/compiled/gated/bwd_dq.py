"""dq of the compressed branch and of the window at once, and the gates' gradient.

The two branches of a layer read the same queries and the same gradient of the gated sum, so that
one program can take both. No branch then needs the gradient of its own output: a gate g of a row
makes its probabilities g*p, and the gradient of the scores ``g*p*(dp - delta)`` with
``delta = Σ dout * out`` of the row, which is also the gate's gradient.

B batch, T query tokens, N compressed blocks, H query heads, G heads per group, D key size, V value
size. C, LEAD, STRIDE and ``…_seq_starts``: :mod:`nsa.backends.compiled.window.bounds`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.columns import load_rows, scale_rows, store_rows, sum_products, zeros
from nsa.backends.compiled.common import LOG2_E
from nsa.backends.compiled.window.bwd_dq import dq_over_keys
from nsa.backends.compiled.window.rows import load_heads, query_rows
from nsa.core.kernel import kernel


@triton.jit
def _row_statistics(
    dout,
    out_ptrs,
    lse_ptrs,
    gates_ptr,
    dgates_ptr,
    stats_ptr,
    rows,
    row,
    mask,
    WEIGHTED: tl.constexpr,
    C: tl.constexpr,
):
    """lse in base 2, delta and weight of the compressed branch's rows, then of the window's.

    Stores those of every branch for the other kernels, and the gates' gradient.
    """
    for branch in tl.static_range(2, -1, -1):
        out = load_rows(out_ptrs[branch], row * C.V, 1, None, C.V, C.BLOCK_DV)
        delta = sum_products(dout, out)
        lse = tl.load(lse_ptrs[branch] + row)
        weight = tl.load(gates_ptr + row * 3 + branch).to(tl.float32)
        tl.store(dgates_ptr + row * 3 + branch, delta.to(dgates_ptr.dtype.element_ty), mask=mask)
        if not WEIGHTED:  # exp(s - lse + log g) is g*p
            delta = tl.where((weight < 0.0) | (weight > 1.0), float("nan"), delta)
            shut = weight == 0.0
            lse = tl.where(shut, float("inf"), lse - tl.log(tl.where(shut, 1.0, weight)))
        tl.store(stats_ptr + branch * rows + row, lse, mask=mask)
        tl.store(stats_ptr + (3 + branch) * rows + row, delta, mask=mask)
        if WEIGHTED:
            tl.store(stats_ptr + (6 + branch) * rows + row, weight, mask=mask)
        if branch == 2:
            window = (lse * LOG2_E, delta, weight)
    return (lse * LOG2_E, delta, weight), window


@kernel(do_not_specialize=["rows", "T", "N", "window", "q_start", "window_start"])
def nsa_gated_bwd_dq(
    q_ptr,
    k_cmp_ptr,
    v_cmp_ptr,
    k_win_ptr,
    v_win_ptr,
    gates_ptr,  # [B, T, H, 3], contiguous
    out_ptrs,  # three [B, T, H, V], contiguous
    lse_ptrs,  # three [B, T, H], contiguous
    dout_ptr,
    dq_ptr,  # [B, T, H, D], contiguous; written
    dgates_ptr,  # [B, T, H, 3], contiguous; written
    stats_ptr,  # fp32 [2 or 3, 3, B, T, H]: lse, delta and weight of every branch; written
    cmp_seq_starts,
    win_seq_starts,
    rows,  # B*T*H
    T,
    N,
    KV_HEADS,
    window,
    q_start,
    window_start,
    factor,
    scale_log2,
    q_strides,
    k_cmp_strides,
    v_cmp_strides,
    k_win_strides,
    v_win_strides,
    dout_strides,
    LEAD: tl.constexpr,
    STRIDE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    C: tl.constexpr,
):
    """dq of the compressed branch and of the window, the gates' gradient, and what the kernels for
    dk, dv and the selected branch need of every row.

    Without WEIGHTED gates are in 0…1, and a gate is part of the lse: those kernels then do nothing
    for it.
    """
    b, kv_head, first_t, last_t, t, head, mask = query_rows(T, KV_HEADS, C)
    rows = rows.to(tl.int64)
    row = (b * T + t.to(tl.int64)) * (KV_HEADS * C.G) + head
    q = load_heads(q_ptr, b, t, head, q_strides, None, C.D, C.BLOCK_D)
    dout = load_heads(dout_ptr, b, t, head, dout_strides, None, C.V, C.BLOCK_DV)
    # all before the loops: dout is then no longer held in registers
    cmp_stats, win_stats = _row_statistics(
        dout,
        out_ptrs,
        lse_ptrs,
        gates_ptr,
        dgates_ptr,
        stats_ptr,
        rows,
        row,
        mask,
        WEIGHTED,
        C,
    )
    dq = dq_over_keys(
        zeros(C.BLOCK_M, C.BLOCK_D),
        q,
        dout,
        cmp_stats,
        k_cmp_ptr + b * k_cmp_strides[0] + kv_head * k_cmp_strides[2],
        v_cmp_ptr + b * v_cmp_strides[0] + kv_head * v_cmp_strides[2],
        k_cmp_strides,
        v_cmp_strides,
        cmp_seq_starts,
        t,
        first_t,
        last_t,
        N,
        q_start,
        scale_log2,
        LEAD,
        STRIDE,
        WEIGHTED,
        C,
    )
    dq = dq_over_keys(
        dq,
        q,
        dout,
        win_stats,
        k_win_ptr + b * k_win_strides[0] + kv_head * k_win_strides[2],
        v_win_ptr + b * v_win_strides[0] + kv_head * v_win_strides[2],
        k_win_strides,
        v_win_strides,
        win_seq_starts,
        t,
        first_t,
        last_t,
        window,
        window_start,
        scale_log2,
        0,
        1,
        WEIGHTED,
        C,
    )
    store_rows(dq_ptr, row * C.D, scale_rows(dq, factor), mask, C.D, C.BLOCK_D)
