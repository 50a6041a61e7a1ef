"""dk and dv of sliding-window attention, as a Triton kernel without atomics; the compressed branch
is the same with strided keys (:mod:`.bounds`).

Where few blocks of keys have many queries, parts of the queries are summed apart and added in
order, so that the result is the same in every run.

B batch, T query tokens, S keys, H query heads, G heads per group, D key size, V value size.
C, LEAD, STRIDE and ``seq_starts``: :mod:`.bounds`.
"""

from __future__ import annotations

import triton.language as tl

from nsa.backends.compiled.columns import (
    add_products,
    dot_rows,
    load_rows,
    scale_rows,
    store_rows,
    zeros,
)
from nsa.backends.compiled.common import LOG2_E
from nsa.backends.compiled.window.bounds import (
    first_visible,
    is_visible,
    last_visible,
    loop_of,
    step_of,
    steps_of,
    visible_to,
)
from nsa.backends.compiled.window.rows import load_heads, locate
from nsa.core.kernel import kernel


@kernel(do_not_specialize=["T", "S", "window", "q_start", "splits"])
def nsa_window_bwd_dkv(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,  # [B, T, H], contiguous
    delta_ptr,  # [B, T, H], contiguous
    weight_ptr,  # [B, T, H], contiguous: of each row's probabilities, with WEIGHTED
    dk_ptr,  # [B, S, KV_HEADS, D], contiguous, with SPLIT [splits, …]; written
    dv_ptr,
    seq_starts,
    seen_ptrs,
    T,
    S,
    KV_HEADS,
    window,
    q_start,
    splits,
    scale,
    scale_log2,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    LEAD: tl.constexpr,
    STRIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    C: tl.constexpr,
):
    """dk and dv of one block of keys: all tiles of queries that see any of them."""
    if SPLIT:  # the part changes fastest
        blocks = tl.cdiv(S, C.BLOCK_N)
        pid = tl.program_id(0)
        split = pid % splits
        block = pid // splits % blocks
        b = (pid // splits // blocks // KV_HEADS).to(tl.int64)
        kv_head = (pid // splits // blocks % KV_HEADS).to(tl.int64)
    else:
        block, b, kv_head = locate(tl.cdiv(S, C.BLOCK_N), KV_HEADS)
    H = KV_HEADS * C.G
    s0 = block * C.BLOCK_N
    last_s = tl.minimum(s0 + C.BLOCK_N, S) - 1
    s = s0 + tl.arange(0, C.BLOCK_N)
    k = load_heads(k_ptr, b, s, kv_head, k_strides, s < S, C.D, C.BLOCK_D)
    v = load_heads(v_ptr, b, s, kv_head, v_strides, s < S, C.V, C.BLOCK_DV)
    any_from, any_until, all_from, all_until = visible_to(
        s0, last_s, seq_starts, seen_ptrs, T, window, q_start, LEAD, STRIDE, C
    )
    if SPLIT:  # whole tiles of queries, so that the parts together read what one would
        tiles = tl.cdiv(tl.maximum(any_until - any_from, 0), C.TOKENS)
        each = tl.cdiv(tiles, splits) * C.TOKENS
        any_from += split * each
        any_until = tl.minimum(any_until, any_from + each)
    span = steps_of(any_from, any_until, all_from, tl.minimum(all_until, any_until), C.TOKENS)
    q_ptr += b * q_strides[0] + kv_head * C.G * q_strides[2]
    dout_ptr += b * dout_strides[0] + kv_head * C.G * dout_strides[2]
    lse_ptr += kv_head * C.G
    delta_ptr += kv_head * C.G
    if WEIGHTED:
        weight_ptr += kv_head * C.G

    row = tl.arange(0, C.BLOCK_M)
    token = row // C.G
    head = row % C.G
    place = token * H + head
    dk = zeros(C.BLOCK_N, C.BLOCK_D)
    dv = zeros(C.BLOCK_N, C.BLOCK_DV)
    for MASKED in tl.static_range(2):
        begin, steps = loop_of(span, C.TOKENS, MASKED)
        # Keeping what is the same in every step spills where heads are large.
        for step in tl.range(steps, disable_licm=C.BLOCK_D + C.BLOCK_DV > 128):
            t0 = step_of(span, begin, step, C.TOKENS, MASKED)
            mask = token < C.TOKENS
            if MASKED:
                mask &= t0 + token < any_until
            at = t0.to(tl.int64)
            q_at = token * q_strides[1] + head * q_strides[2]
            dout_at = token * dout_strides[1] + head * dout_strides[2]
            q = load_rows(q_ptr + at * q_strides[1], q_at, q_strides[3], mask, C.D, C.BLOCK_D)
            dout = load_rows(
                dout_ptr + at * dout_strides[1], dout_at, dout_strides[3], mask, C.V, C.BLOCK_DV
            )
            rows = (b * T + at) * H
            # a row outside the mask has probability exp(-inf)
            lse = tl.load(lse_ptr + rows + place, mask=mask, other=float("inf"))
            delta = tl.load(delta_ptr + rows + place, mask=mask, other=0.0)
            scores = dot_rows(k, q, C)
            dp = dot_rows(v, dout, C)
            scores = tl.minimum(scores * scale_log2 - (lse * LOG2_E)[None, :], 0.0)
            if MASKED:
                t = tl.minimum(t0 + token, T - 1)
                position = last_visible(t, seq_starts, q_start, LEAD, STRIDE, C)
                oldest = first_visible(t, position, seq_starts, window, C)
                visible = is_visible(s[:, None], oldest[None, :], position[None, :])
                scores = tl.where(visible, scores, float("-inf"))
            p = tl.exp2(scores)
            if WEIGHTED:
                p *= tl.load(weight_ptr + rows + place, mask=mask, other=0.0)[None, :]
            dv = add_products(dv, p, dout, C)
            ds = p * (dp - delta[None, :])
            if MASKED:  # what overflowed in another sequence's row may be no number
                ds = tl.where(p == 0.0, 0.0, ds)
            dk = add_products(dk, ds, q, C)

    out_row = (b * S + s.to(tl.int64)) * KV_HEADS + kv_head
    if SPLIT:
        out_row += split * (tl.num_programs(0) // splits // blocks * S).to(tl.int64)
    store_rows(dk_ptr, out_row * C.D, scale_rows(dk, scale), s < S, C.D, C.BLOCK_D)
    store_rows(dv_ptr, out_row * C.V, dv, s < S, C.V, C.BLOCK_DV)
