"""Selected attention (paper Eq. 11-12): forward and dq as Triton kernels.

A program takes m neighbouring tokens of one key/value head, all G query heads of each as rows of
one tile, and walks over the union of the tokens' block lists (``lists``):
a block that several of them list is fetched once, and m*G rows fill a matrix instruction that one
token's G rows would leave mostly idle.

Scores are kept in base 2: ``exp2(s*c - m)`` with ``c = scale * log2(e)`` is one multiply-add and
one hardware instruction.

B batch, T query tokens, S key tokens, H query heads, K key/value heads, G heads per group, D key
size, V value size, n listed blocks, W entries of a union list.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from nsa.backends.compiled.window.bounds import LOG2_E

LN2 = tl.constexpr(math.log(2.0))

_UNSPECIALIZED = ["T", "tiles", "key_end", "q_start"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def forward_kernel(
    q,
    k,
    v,
    out,  # [B, T, H, V], contiguous
    lse,  # [B, T, H], contiguous
    rows,
    masks,
    counts,
    q_b,
    q_t,
    q_h,
    k_b,
    k_s,
    k_h,
    v_b,
    v_s,
    v_h,
    T,
    tiles,
    key_end,
    q_start,
    KV,
    score_scale,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    SELECT: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Tiles of one head side by side: its keys and values then stay in the L2 cache.
    pid = tl.program_id(0)
    tile = pid % tiles
    head = (pid // tiles) % KV
    b = (pid // tiles // KV).to(tl.int64)
    r = tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    slot = r // G
    token = tile * TOKENS + slot
    live = (slot < TOKENS) & (token < T)
    query_head = head * G + r % G
    shift = tl.where(slot < TOKENS, slot, 0)
    last = tl.minimum(q_start + token, key_end - 1)  # the last key row that the query sees

    q_ptr = q + b * q_b + (token.to(tl.int64) * q_t + query_head.to(tl.int64) * q_h)[:, None]
    q_mask = live[:, None]
    k_mask_d = (d < D)[None, :]
    v_mask_e = (e < V)[None, :]
    if BLOCK_D != D:
        q_mask = q_mask & k_mask_d
    q_tile = tl.load(q_ptr + d[None, :], mask=q_mask, other=0.0)
    k_ptr = k + b * k_b + head.to(tl.int64) * k_h
    v_ptr = v + b * v_b + head.to(tl.int64) * v_h
    k_offset = n[:, None] * k_s + d[None, :]
    v_offset = n[:, None] * v_s + e[None, :]

    entry = (b * tiles + tile) * KV + head
    count = tl.load(counts + entry)
    rows += entry * (TOKENS * WIDTH)
    masks += entry * (TOKENS * WIDTH)

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for step in range(count * PARTS):
        part = (step % PARTS) * BLOCK_N
        first = tl.load(rows + step // PARTS) + part
        bits = tl.load(masks + step // PARTS)
        exists = (n < SELECT - part) & (first + n < key_end)
        k_mask = exists[:, None]
        v_mask = exists[:, None]
        if BLOCK_D != D:
            k_mask = k_mask & k_mask_d
        if BLOCK_V != V:
            v_mask = v_mask & v_mask_e
        k_tile = tl.load(k_ptr + first.to(tl.int64) * k_s + k_offset, mask=k_mask, other=0.0)
        # How far into these keys each row sees, so that a key costs one comparison.
        reach = tl.minimum(last - first, SELECT - 1 - part)
        reach = tl.where(((bits >> shift) & 1) != 0, reach, -1)
        visible = n[None, :] <= reach[:, None]
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        s = tl.where(visible, s * score_scale, float("-inf"))
        new = tl.maximum(highest, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(highest - safe)
        total = total * shrink + tl.sum(p, 1)
        v_tile = tl.load(v_ptr + first.to(tl.int64) * v_s + v_offset, mask=v_mask, other=0.0)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        highest = new

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    log = tl.where(empty, float("-inf"), highest * LN2 + tl.log(tl.where(empty, 1.0, total)))
    row = (b * T + token) * (KV * G) + query_head
    out_mask = live[:, None]
    if BLOCK_V != V:
        out_mask = out_mask & v_mask_e
    tl.store(out + row[:, None] * V + e[None, :], acc.to(out.dtype.element_ty), mask=out_mask)
    tl.store(lse + row, log, mask=live)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def dq_kernel(
    q,
    k,
    v,
    dout,
    out,  # [B, T, H, V], contiguous; not read with MORE
    lse,  # [B, T, H], contiguous
    delta,  # [B, T, H], contiguous; written, read with MORE
    weight,  # [B, T, H], contiguous: of each row's probabilities, with WEIGHTED
    dq,  # [B, T, H, D], contiguous; written, with MORE added to
    rows,
    masks,
    counts,
    q_b,
    q_t,
    q_h,
    k_b,
    k_s,
    k_h,
    v_b,
    v_s,
    v_h,
    do_b,
    do_t,
    do_h,
    T,
    tiles,
    key_end,
    q_start,
    KV,
    score_scale,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    SELECT: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    MORE: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = pid % tiles
    head = (pid // tiles) % KV
    b = (pid // tiles // KV).to(tl.int64)
    r = tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    slot = r // G
    token = tile * TOKENS + slot
    live = (slot < TOKENS) & (token < T)
    query_head = head * G + r % G
    shift = tl.where(slot < TOKENS, slot, 0)
    last = tl.minimum(q_start + token, key_end - 1)

    token64 = token.to(tl.int64)
    head64 = query_head.to(tl.int64)
    row = (b * T + token) * (KV * G) + query_head
    d_mask = live[:, None]
    e_mask = live[:, None]
    k_mask_d = (d < D)[None, :]
    v_mask_e = (e < V)[None, :]
    if BLOCK_D != D:
        d_mask = d_mask & k_mask_d
    if BLOCK_V != V:
        e_mask = e_mask & v_mask_e
    q_ptr = q + b * q_b + (token64 * q_t + head64 * q_h)[:, None] + d[None, :]
    do_ptr = dout + b * do_b + (token64 * do_t + head64 * do_h)[:, None] + e[None, :]
    q_tile = tl.load(q_ptr, mask=d_mask, other=0.0)
    do_tile = tl.load(do_ptr, mask=e_mask, other=0.0)
    if MORE:
        mean = tl.load(delta + row, mask=live, other=0.0)
    else:
        out_tile = tl.load(out + row[:, None] * V + e[None, :], mask=e_mask, other=0.0)
        mean = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
        tl.store(delta + row, mean, mask=live)
    log = tl.load(lse + row, mask=live, other=0.0) * LOG2_E
    k_ptr = k + b * k_b + head.to(tl.int64) * k_h
    v_ptr = v + b * v_b + head.to(tl.int64) * v_h
    k_offset = n[:, None] * k_s + d[None, :]
    v_offset = n[:, None] * v_s + e[None, :]

    entry = (b * tiles + tile) * KV + head
    count = tl.load(counts + entry)
    rows += entry * (TOKENS * WIDTH)
    masks += entry * (TOKENS * WIDTH)

    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    # Keeping what is the same in every step would spill it where D is large.
    for step in tl.range(0, count * PARTS, disable_licm=True):
        part = (step % PARTS) * BLOCK_N
        first = tl.load(rows + step // PARTS) + part
        bits = tl.load(masks + step // PARTS)
        exists = (n < SELECT - part) & (first + n < key_end)
        k_mask = exists[:, None]
        v_mask = exists[:, None]
        if BLOCK_D != D:
            k_mask = k_mask & k_mask_d
        if BLOCK_V != V:
            v_mask = v_mask & v_mask_e
        k_tile = tl.load(k_ptr + first.to(tl.int64) * k_s + k_offset, mask=k_mask, other=0.0)
        v_tile = tl.load(v_ptr + first.to(tl.int64) * v_s + v_offset, mask=v_mask, other=0.0)
        reach = tl.minimum(last - first, SELECT - 1 - part)
        reach = tl.where(((bits >> shift) & 1) != 0, reach, -1)
        visible = n[None, :] <= reach[:, None]
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        # No probability is above 1; where scores are so large that rounding the lse says
        # otherwise, this keeps the gradient finite, as it does where an unseen score overflowed:
        # the minimum of no number and 0 is 0.
        p = tl.exp2(tl.minimum(s * score_scale - log[:, None], 0.0))
        if WEIGHTED:
            p *= tl.load(weight + row, mask=live, other=0.0)[:, None]
        # The mask comes before the product: selecting 16-bit results takes twice the instructions.
        ds = p * tl.where(visible, dp - mean[:, None], 0.0)
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)

    acc = acc * scale
    at = row[:, None] * D + d[None, :]
    if MORE:
        acc += tl.load(dq + at, mask=d_mask, other=0.0).to(tl.float32)
    tl.store(dq + at, acc.to(dq.dtype.element_ty), mask=d_mask)
