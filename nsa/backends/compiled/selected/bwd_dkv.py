"""Selected attention (paper Eq. 11-12), the gradients of k and v, and of q on the way.

Key-stationary: a program holds one block of keys and values, and the sums of their gradients, while
it walks over a chunk of the tokens that selected the block (:mod:`.inverse_index`), some at a time:
they need not be neighbours, so that every row of every matrix product is useful whatever the lists.

A block with several chunks (every token selects block 0) is summed by atomic adds into fp32
buffers: not deterministic to the last bit, but without a second pass over partial sums, which
random lists make many. dq can be summed in the same way (``KeyTiles.with_dq``): n adds to each
element, and no second time the scores and dp that dk and dv need anyway.

B batch, T query tokens, S key tokens, H query heads, K key/value heads, G heads per group, D key
size, V value size; C is a :class:`~nsa.backends.compiled.selected.tiles.Constants`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.common import LOG2_E, tile_mask
from nsa.core.kernel import kernel

FAR = tl.constexpr(2**31 - 1)
"""Past every token."""


@triton.jit
def _add_queries(
    dk,  # [BLOCK_N, BLOCK_D], as is the first result
    dv,  # [BLOCK_N, BLOCK_DV], as is the second
    begin,
    end,
    k,
    v,
    q_ptr,  # of the batch row
    dout_ptr,
    row_ptrs,  # lse, delta and weight
    dq_ptr,
    token_ptrs,  # of the pairs; with SHARE > 1 the first of each, and the end or None
    first_token,
    head,
    first_row,
    part,
    q_strides,
    dout_strides,
    q_start,
    num_heads,
    scale_log2,
    scale,
    WITH_DQ: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCALE_DS: tl.constexpr,
    MASKED: tl.constexpr,
    SHARE: tl.constexpr,
    INT64: tl.constexpr,
    C: tl.constexpr,
):
    """What pairs ``begin … end - 1`` add to dk, dv and dq; without MASKED they see every key.

    With SHARE > 1 an entry of the index stands for so many pairs, its tokens being consecutive.

    With SCALE_DS ds is scaled before it is rounded, which costs nothing; dk and dq are not, after.
    """
    n = tl.arange(0, C.BLOCK_N)
    d = tl.arange(0, C.BLOCK_D)
    e = tl.arange(0, C.BLOCK_DV)
    slot = tl.arange(0, C.BLOCK_M) // C.G
    # What is the same in every step is cheap to compute again; kept, it spills (sm_90).
    for pair in tl.range(begin, end, C.TOKENS, disable_licm=True):
        # Rows past the end are the last token's again, with probability 0.
        mask = (slot < C.TOKENS) & (pair + slot < end)
        at = tl.minimum(pair + slot, end - 1)
        bt = tl.load(token_ptrs[0] + at // SHARE)
        if SHARE > 1:
            bt += at % SHARE
        if token_ptrs[1] is not None:
            last = tl.load(token_ptrs[1] + at // SHARE) - 1
            mask = mask & (bt <= last)
            bt = tl.minimum(bt, last)
        row = bt * num_heads + head
        q_row = bt * q_strides[1] + head * q_strides[2]
        dout_row = bt * dout_strides[1] + head * dout_strides[2]
        if INT64:
            bt64, head64 = bt.to(tl.int64), head.to(tl.int64)
            row = bt64 * num_heads + head
            q_row = bt64 * q_strides[1] + head64 * q_strides[2]
            dout_row = bt64 * dout_strides[1] + head64 * dout_strides[2]
        q_tile_ptr = q_ptr + (q_row[:, None] + d[None, :])
        dout_tile_ptr = dout_ptr + (dout_row[:, None] + e[None, :])
        q = tl.load(q_tile_ptr, mask=(d < C.D)[None, :], other=0.0)
        dout = tl.load(dout_tile_ptr, mask=(e < C.V)[None, :], other=0.0)
        lse_log2 = tl.load(row_ptrs[0] + row, mask=mask, other=float("inf")) * LOG2_E
        delta = tl.load(row_ptrs[1] + row)
        s = tl.dot(q, tl.trans(k), input_precision=C.PRECISION)
        dp = tl.dot(dout, tl.trans(v), input_precision=C.PRECISION)
        # No probability is above 1; where scores are so large that rounding the lse says otherwise,
        # the minimum keeps the gradient finite.
        # Masks come before the exponential and the product: selecting 16-bit results would take
        # twice the instructions. The product's asks for p, so that no mask has to be kept.
        s = tl.minimum(s * scale_log2 - lse_log2[:, None], 0.0)
        if MASKED:
            # The last of these keys that each row sees, so that a key costs one comparison.
            causal_limit = bt - first_token + q_start - first_row
            causal_limit = tl.minimum(causal_limit, C.SELECT_BLOCK - 1 - part)
            s = tl.where(n[None, :] <= causal_limit[:, None], s, float("-inf"))
        p = tl.exp2(s)
        if WEIGHTED:
            p *= tl.load(row_ptrs[2] + row)[:, None]
        if SCALE_DS:
            dp, delta = dp * scale, delta * scale
        ds = p * (dp - delta[:, None])
        if MASKED:
            ds = tl.where(p == 0.0, 0.0, ds)
        p_keys = tl.trans(p.to(dout.dtype))
        ds_keys = tl.trans(ds.to(q.dtype))
        dv = tl.dot(p_keys, dout, dv, input_precision=C.PRECISION)
        dk = tl.dot(ds_keys, q, dk, input_precision=C.PRECISION)
        if WITH_DQ:
            dq = tl.dot(tl.trans(ds_keys), k, input_precision=C.PRECISION)
            if not SCALE_DS:
                dq *= scale
            dq_mask = (slot < C.TOKENS)[:, None] & (d < C.D)[None, :]
            dq_tile_ptr = dq_ptr + (row[:, None] * C.D + d[None, :])
            tl.atomic_add(dq_tile_ptr, dq, mask=dq_mask, sem="relaxed")
    return dk, dv


@kernel(do_not_specialize=["T", "S", "q_start", "num_blocks"])
def nsa_selected_bwd_dkv(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    row_ptrs,  # lse, delta and, with WEIGHTED, the weight of each row: [B, T, H], contiguous
    dk_ptr,  # fp32 [B, S, K, D], contiguous; added to
    dv_ptr,  # fp32 [B, S, K, V], contiguous; added to
    dq_ptr,  # fp32 [B, T, H, D], contiguous; added to with WITH_DQ
    index_ptrs,  # block ids, offsets, chunks, tokens and their ends of :class:`.InverseIndex`
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    T,
    S,
    q_start,
    KV_HEADS,
    num_blocks,
    scale_log2,
    scale,
    BLOCK_PITCH: tl.constexpr,
    MASKED_PREFIX: tl.constexpr,
    WITH_DQ: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCALE_DS: tl.constexpr,
    SHARE: tl.constexpr,
    INT64: tl.constexpr,
    C: tl.constexpr,
):
    block_ids_ptr, offsets_ptr, num_chunks_ptr, tokens_ptr, ends_ptr = index_ptrs
    part = (tl.program_id(0) % C.PARTS) * C.BLOCK_N
    row = tl.arange(0, C.BLOCK_M)
    n = tl.arange(0, C.BLOCK_N)
    d = tl.arange(0, C.BLOCK_D)
    e = tl.arange(0, C.BLOCK_DV)
    chunk = tl.program_id(0) // C.PARTS
    if chunk < tl.load(num_chunks_ptr):
        begin = tl.load(offsets_ptr + chunk)
        end = tl.load(offsets_ptr + chunk + 1)
        block_id = tl.load(block_ids_ptr + begin).to(tl.int64)
        begin *= SHARE
        end *= SHARE
        first_row = (block_id % num_blocks).to(tl.int32) * BLOCK_PITCH + part
        b_head = (block_id // num_blocks).to(tl.int32)
        kv_head = b_head % KV_HEADS
        b = b_head // KV_HEADS
        b64 = b.to(tl.int64)
        kv_head64 = kv_head.to(tl.int64)
        exists = (n < C.SELECT_BLOCK - part) & (first_row + n < S)
        k_mask = tile_mask(exists, d, C.D, C.BLOCK_D)
        v_mask = tile_mask(exists, e, C.V, C.BLOCK_DV)
        first64 = first_row.to(tl.int64)
        k_ptr += b64 * k_strides[0] + kv_head64 * k_strides[2] + first64 * k_strides[1]
        v_ptr += b64 * v_strides[0] + kv_head64 * v_strides[2] + first64 * v_strides[1]
        k = tl.load(k_ptr + n[:, None] * k_strides[1] + d[None, :], mask=k_mask, other=0.0)
        v = tl.load(v_ptr + n[:, None] * v_strides[1] + e[None, :], mask=v_mask, other=0.0)
        head = kv_head * C.G + row % C.G
        # Tokens are numbered through the batch. A stride of 1 is a constant: it has no dtype.
        q_ptr += b64 * q_strides[0] - b64 * T * q_strides[1]
        dout_ptr += b64 * dout_strides[0] - b64 * T * dout_strides[1]

        dk = tl.full([C.BLOCK_N, C.BLOCK_D], 0.0, tl.float32)
        dv = tl.full([C.BLOCK_N, C.BLOCK_DV], 0.0, tl.float32)
        # Tokens rise: those of the block itself, which do not see all of it, come first.
        middle = end
        if C.SELECT_BLOCK % C.BLOCK_N == 0:
            pair = begin + tl.arange(0, MASKED_PREFIX)
            t = tl.load(tokens_ptr + pair // SHARE, mask=pair < end, other=FAR) - b * T
            if SHARE > 1:
                t += pair % SHARE
            inside = (pair < end) & (t + q_start < first_row + C.BLOCK_N - 1)
            middle = begin + tl.cdiv(tl.sum(inside.to(tl.int32), 0), C.TOKENS) * C.TOKENS
            middle = tl.minimum(middle, end)
        for phase in tl.static_range(2):  # with masks, without
            dk, dv = _add_queries(
                *(dk, dv, begin if phase == 0 else middle, middle if phase == 0 else end, k, v),
                *(q_ptr, dout_ptr, row_ptrs, dq_ptr, (tokens_ptr, ends_ptr)),
                *(b * T, head, first_row, part, q_strides, dout_strides, q_start),
                *(KV_HEADS * C.G, scale_log2, scale),
                *(WITH_DQ, WEIGHTED, SCALE_DS, phase == 0, SHARE, INT64, C),
            )

        # A key past the end of its block is another block's, or nobody's; p and ds of it are 0.
        grad_row = (b64 * S + first_row + n[:, None]) * KV_HEADS + kv_head
        if not SCALE_DS:
            dk *= scale
        tl.atomic_add(dk_ptr + grad_row * C.D + d[None, :], dk, mask=k_mask, sem="relaxed")
        tl.atomic_add(dv_ptr + grad_row * C.V + e[None, :], dv, mask=v_mask, sem="relaxed")
