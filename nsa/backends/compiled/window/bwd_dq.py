"""dq of sliding-window attention, as a Triton kernel; the compressed branch is the same with
strided keys (:mod:`.bounds`). :mod:`nsa.backends.compiled.gated.bwd_dq` has dq of both at once.

B batch, T query tokens, H query heads, G heads per group, D key size, V value size.
C, LEAD, STRIDE and ``seq_starts``: :mod:`.bounds`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.columns import (
    add_products,
    dot_rows,
    load_rows,
    scale_rows,
    store_rows,
    sum_products,
    zeros,
)
from nsa.backends.compiled.common import LOG2_E
from nsa.backends.compiled.window.bounds import is_visible, loop_of, visible_keys
from nsa.backends.compiled.window.rows import (
    load_heads,
    load_keys,
    query_rows,
)
from nsa.core.kernel import kernel


@triton.jit
def dq_over_keys(
    dq,  # fp32 in parts, as is the result
    q,
    dout,
    stats,  # lse in base 2, delta, and with WEIGHTED the weight of each row's probabilities
    k_ptr,  # of the batch row and the head, as is v_ptr
    v_ptr,
    k_strides,
    v_strides,
    seq_starts,
    t,
    first_t,
    last_t,
    window,
    q_start,
    scale_log2,
    LEAD: tl.constexpr,
    STRIDE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    C: tl.constexpr,
):
    """``dq + Σ ds * k`` over the keys that tokens ``first_t … last_t`` see."""
    oldest, position, span = visible_keys(
        t, first_t, last_t, seq_starts, window, q_start, LEAD, STRIDE, C
    )
    lse_log2, delta, weight = stats
    for MASKED in tl.static_range(2):
        begin, steps = loop_of(span, C.BLOCK_N, MASKED)
        # Keeping what is the same in every step spills where heads are large.
        for step in tl.range(steps, disable_licm=C.BLOCK_D + C.BLOCK_DV > 128):
            k, v, s = load_keys(k_ptr, v_ptr, k_strides, v_strides, span, begin, step, MASKED, C)
            scores = dot_rows(q, k, C)
            dp = dot_rows(dout, v, C)
            # rounding of a huge lse must not make a probability above 1, nor an unseen score that
            # overflowed one that is no number: the minimum of that and 0 is 0
            p = tl.exp2(tl.minimum(scores * scale_log2 - lse_log2[:, None], 0.0))
            if WEIGHTED:
                p *= weight[:, None]
            ds = dp - delta[:, None]
            if MASKED:
                visible = is_visible(s[None, :], oldest[:, None], position[:, None])
                ds = tl.where(visible, ds, 0.0)
            dq = add_products(dq, p * ds, k, C)
    return dq


@kernel(do_not_specialize=["T", "window", "q_start"])
def nsa_window_bwd_dq(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [B, T, H, V], contiguous
    dout_ptr,
    lse_ptr,  # [B, T, H], contiguous
    delta_ptr,  # [B, T, H], contiguous; written
    dq_ptr,  # [B, T, H, D], contiguous; written
    seq_starts,
    T,
    KV_HEADS,
    window,
    q_start,
    factor,
    scale_log2,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    LEAD: tl.constexpr,
    STRIDE: tl.constexpr,
    C: tl.constexpr,
):
    """dq, and delta = Σ dout * out of every row, which the kernel for dk and dv needs too."""
    b, kv_head, first_t, last_t, t, head, mask = query_rows(T, KV_HEADS, C)
    row = (b * T + t.to(tl.int64)) * (KV_HEADS * C.G) + head
    q = load_heads(q_ptr, b, t, head, q_strides, None, C.D, C.BLOCK_D)
    dout = load_heads(dout_ptr, b, t, head, dout_strides, None, C.V, C.BLOCK_DV)
    out = load_rows(out_ptr, row * C.V, 1, None, C.V, C.BLOCK_DV)
    delta = sum_products(dout, out)
    tl.store(delta_ptr + row, delta, mask=mask)
    dq = dq_over_keys(
        zeros(C.BLOCK_M, C.BLOCK_D),
        q,
        dout,
        (tl.load(lse_ptr + row) * LOG2_E, delta, None),
        k_ptr + b * k_strides[0] + kv_head * k_strides[2],
        v_ptr + b * v_strides[0] + kv_head * v_strides[2],
        k_strides,
        v_strides,
        seq_starts,
        t,
        first_t,
        last_t,
        window,
        q_start,
        scale_log2,
        LEAD,
        STRIDE,
        False,
        C,
    )
    store_rows(dq_ptr, row * C.D, scale_rows(dq, factor), mask, C.D, C.BLOCK_D)
