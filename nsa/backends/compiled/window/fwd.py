"""Sliding-window attention, forward, as a Triton kernel; the compressed branch is the same with
strided keys (:mod:`.bounds`).

The G heads of a group are rows of one tile: a program that takes m tokens has m * G rows on the
same m + w - 1 keys, so keys and values are read once for all of them, and little of the window's
edge is computed in vain. The algorithm is FlashAttention-2's (arXiv 2307.08691).

B batch, T query tokens, H query heads, G heads per group, D key size, V value size.
C, LEAD, STRIDE and ``seq_starts``: :mod:`.bounds`.
"""

from __future__ import annotations

import triton.language as tl

from nsa.backends.compiled.columns import (
    add_products,
    add_rows,
    divide_rows,
    dot_rows,
    load_rows,
    scale_rows,
    store_rows,
    zeros,
)
from nsa.backends.compiled.window.bounds import is_visible, loop_of, visible_keys
from nsa.backends.compiled.window.rows import (
    load_heads,
    load_keys,
    query_rows,
)
from nsa.core.kernel import kernel


@kernel(do_not_specialize=["T", "window", "q_start"])
def nsa_window_fwd(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [B, T, H, V], contiguous
    lse_ptr,  # [B, T, H], contiguous
    branch_ptrs,  # with MIX: out of the compressed and the selected branch, the sum (written)
    gates_ptr,  # with MIX: [B, T, H, 3], contiguous
    seq_starts,
    T,
    KV_HEADS,
    window,
    q_start,
    scale,
    scale_log2,
    q_strides,
    k_strides,
    v_strides,
    LEAD: tl.constexpr,
    STRIDE: tl.constexpr,
    MIX: tl.constexpr,
    C: tl.constexpr,
):
    """One branch; with MIX also the gated sum of the three, of which this one is the window."""
    b, kv_head, first_t, last_t, t, head, mask = query_rows(T, KV_HEADS, C)
    q = load_heads(q_ptr, b, t, head, q_strides, None, C.D, C.BLOCK_D)
    oldest, position, span = visible_keys(
        t, first_t, last_t, seq_starts, window, q_start, LEAD, STRIDE, C
    )
    k_ptr += b * k_strides[0] + kv_head * k_strides[2]
    v_ptr += b * v_strides[0] + kv_head * v_strides[2]

    m_i = tl.full((C.BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.full((C.BLOCK_M,), 0.0, tl.float32)
    acc = zeros(C.BLOCK_M, C.BLOCK_DV)
    for MASKED in tl.static_range(2):
        begin, steps = loop_of(span, C.BLOCK_N, MASKED)
        # Keeping what is the same in every step spills where heads are large.
        for step in tl.range(steps, disable_licm=C.BLOCK_D + C.BLOCK_DV > 128):
            k, v, s = load_keys(k_ptr, v_ptr, k_strides, v_strides, span, begin, step, MASKED, C)
            scores = dot_rows(q, k, C)
            if MASKED:
                visible = is_visible(s[None, :], oldest[:, None], position[:, None])
                scores = tl.where(visible, scores, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(scores, 1))
            # other sequences' keys alone so far
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
            # the difference first: scaled apart, two huge scores round apart
            p = tl.exp2((scores - base[:, None]) * scale_log2)
            alpha = tl.exp2((m_i - base) * scale_log2)
            l_i = l_i * alpha + tl.sum(p, 1)
            acc = add_products(scale_rows(acc, alpha[:, None]), p, v, C)
            m_i = m_new

    row = (b * T + t.to(tl.int64)) * (KV_HEADS * C.G) + head
    lse = m_i * scale
    if LEAD > 0:  # some see nothing
        lse = tl.where(l_i == 0.0, float("-inf"), lse)
        l_i = tl.where(l_i == 0.0, 1.0, l_i)
    acc = divide_rows(acc, l_i[:, None])
    store_rows(out_ptr, row * C.V, acc, mask, C.V, C.BLOCK_DV)
    tl.store(lse_ptr + row, lse + tl.log(l_i), mask=mask)
    if MIX:
        gates_ptr += row * 3
        gate = tl.load(gates_ptr + 2).to(tl.float32)[:, None]
        acc = scale_rows(acc, gate)
        for branch in tl.static_range(2):
            gate = tl.load(gates_ptr + branch).to(tl.float32)[:, None]
            out = load_rows(branch_ptrs[branch], row * C.V, 1, mask, C.V, C.BLOCK_DV)
            acc = add_rows(acc, scale_rows(out, gate))
        store_rows(branch_ptrs[2], row * C.V, acc, mask, C.V, C.BLOCK_DV)
