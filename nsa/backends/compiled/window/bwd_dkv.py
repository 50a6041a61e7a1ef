"""dk and dv of attention over a band of keys, as a Triton kernel without atomics.

Where few blocks of keys have many queries, parts of the queries are summed apart and added in
order, so that the result is the same in every run.

B batch, T query tokens, S keys, H query heads, K key/value heads, G heads per group, D key size,
V value size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.window.bounds import LOG2_E, first_seen, last_seen, locate, steps_of


@triton.jit
def _add_queries(
    dk,  # [KEYS, DIM], as is the first result
    dv,  # [KEYS, VDIM], as is the second
    k,
    v,
    q_ptr,  # of the batch row and the first head of the group
    dout_ptr,
    lse_ptr,  # of the first head of the group, as are the next two
    delta_ptr,
    weight_ptr,
    start_ptr,
    first_ptr,
    s,
    b,
    begin,
    end,
    steps,
    before,
    skipped,
    T,
    H,
    window,
    q_start,
    scale_log2,
    q_stride_t,
    q_stride_h,
    q_stride_d,
    do_stride_t,
    do_stride_h,
    do_stride_d,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    VDIM: tl.constexpr,
    LEAD: tl.constexpr,
    STRIDE: tl.constexpr,
    STRIDED: tl.constexpr,
    PACKED: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Tokens from ``begin`` on, TOKENS a step; after ``before`` steps ``skipped`` are left out.
    Without EDGE all of them see every key."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    vdim = tl.arange(0, VDIM)
    token = row // G
    head = row % G
    place = token * H + head
    # Keeping what is the same in every step spills where heads are large.
    for step in tl.range(steps, disable_licm=DIM + VDIM > 128):
        t0 = begin + step * TOKENS
        if EDGE:
            t0 += tl.where(step < before, 0, skipped) * TOKENS
        there = token < TOKENS
        if EDGE:
            there &= t0 + token < end
        q_there = there[:, None] if D == DIM else there[:, None] & (dim < D)[None, :]
        do_there = there[:, None] if V == VDIM else there[:, None] & (vdim < V)[None, :]
        at = t0.to(tl.int64)
        q_row, do_row = token * q_stride_t, token * do_stride_t
        q_at = (q_row + head * q_stride_h)[:, None] + dim[None, :] * q_stride_d
        do_at = (do_row + head * do_stride_h)[:, None] + vdim[None, :] * do_stride_d
        q = tl.load(q_ptr + at * q_stride_t + q_at, mask=q_there, other=0.0)
        dout = tl.load(dout_ptr + at * do_stride_t + do_at, mask=do_there, other=0.0)
        rows = (b * T + at) * H
        # a row that is not there has probability exp(-inf)
        lse = tl.load(lse_ptr + rows + place, mask=there, other=float("inf"))
        delta = tl.load(delta_ptr + rows + place, mask=there, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        scores = tl.minimum(scores * scale_log2 - (lse * LOG2_E)[None, :], 0.0)
        if EDGE:
            real = tl.minimum(t0 + token, T - 1)
            position = last_seen(real, start_ptr, first_ptr, q_start, LEAD, STRIDE, STRIDED, PACKED)
            seen = first_seen(real, position, start_ptr, window, PACKED)
            visible = (s[:, None] >= seen[None, :]) & (s[:, None] <= position[None, :])
            scores = tl.where(visible, scores, float("-inf"))
        p = tl.exp2(scores)
        if WEIGHTED:
            p *= tl.load(weight_ptr + rows + place, mask=there, other=0.0)[None, :]
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        if EDGE:  # what overflowed in another sequence's row may be no number
            ds = tl.where(p == 0.0, 0.0, ds)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T", "S", "window", "q_start", "splits"])
def key_gradient(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    weight_ptr,  # [B, T, H], contiguous: of each row's probabilities, with WEIGHTED
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
    WEIGHTED: tl.constexpr,
):
    """dk and dv of one block of keys: all tiles of queries that see any of them."""
    if SPLIT:  # the part changes fastest
        blocks = tl.cdiv(S, KEYS)
        pid = tl.program_id(0)
        split = pid % splits
        block = pid // splits % blocks
        b = (pid // splits // blocks // K).to(tl.int64)
        kv = (pid // splits // blocks % K).to(tl.int64)
    else:
        block, b, kv = locate(tl.cdiv(S, KEYS), K)
    H = K * G
    s0 = block * KEYS
    s_last = tl.minimum(s0 + KEYS, S) - 1

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
    # queries all_from … all_until - 1 see all of them
    all_from = s_last * STRIDE + LEAD - q_start
    all_until = (s0 + window) * STRIDE + LEAD - q_start
    if PACKED:
        one = s_last
        if STRIDED:  # there a window holds all blocks of a sequence
            all_until = end_t
            all_from = tl.load(seen_from_ptr + s_last)
            one = tl.minimum(all_from, T - 1)
        # none does where the keys are of several sequences
        same = tl.load(start_ptr + one) <= s0
        all_from = tl.where(same, all_from, T)
    if SPLIT:  # whole tiles of queries, so that the parts together read what one would
        tiles = tl.cdiv(tl.maximum(end_t - first_t, 0), TOKENS)
        each = tl.cdiv(tiles, splits) * TOKENS
        first_t += split * each
        end_t = tl.minimum(end_t, first_t + each)
    steps, before, within = steps_of(first_t, end_t, all_from, tl.minimum(all_until, end_t), TOKENS)
    q_ptr += b * q_stride_b + kv * G * q_stride_h
    dout_ptr += b * do_stride_b + kv * G * do_stride_h

    dk = tl.zeros((KEYS, DIM), tl.float32)
    dv = tl.zeros((KEYS, VDIM), tl.float32)
    for edge in tl.static_range(2):
        dk, dv = _add_queries(
            dk,
            dv,
            k,
            v,
            q_ptr,
            dout_ptr,
            lse_ptr + kv * G,
            delta_ptr + kv * G,
            weight_ptr + kv * G,
            start_ptr,
            first_ptr,
            s,
            b,
            first_t if edge == 1 else first_t + before * TOKENS,
            end_t,
            steps - within if edge == 1 else within,
            before,
            within,
            T,
            H,
            window,
            q_start,
            scale_log2,
            q_stride_t,
            q_stride_h,
            q_stride_d,
            do_stride_t,
            do_stride_h,
            do_stride_d,
            G,
            D,
            V,
            TOKENS,
            ROWS,
            DIM,
            VDIM,
            LEAD,
            STRIDE,
            STRIDED,
            PACKED,
            edge == 1,
            PRECISION,
            WEIGHTED,
        )

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
