"""Selected attention (paper Eq. 11-12), the gradients of k and v, and of q on the way.

Key-stationary: a program holds one block of keys and values, and the sums of their gradients, while
it walks over a chunk of the tokens that selected the block (:mod:`.inverse_index`), some at a time:
they need not be neighbours, so that every row of every matrix product is useful whatever the lists.

A block with several chunks (every token selects block 0) is summed by atomic adds into fp32
buffers: not deterministic to the last bit, but without a second pass over partial sums, which
random lists make many. dq can be summed in the same way (``KeyTiles.with_dq``): n adds to each
element, and no second time the scores and dp that dk and dv need anyway.

With *ordered* chunks (:mod:`.inverse_index`) the sums of all but a block's first stand in memory of
their own, and :func:`nsa_selected_bwd_sum` adds them, in order, to what the first one wrote. Two
values then reach an element, one kernel after the other, and zeros, where the block of a packed
sequence's end reaches into the next sequence.

B batch, T query tokens, S key tokens, H query heads, K key/value heads, G heads per group, D key
size, V value size; C is a :class:`~nsa.backends.compiled.selected.tiles.Constants`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.columns import (
    add_products,
    add_rows,
    add_to_rows,
    dot_rows,
    load_rows,
    scale_rows,
    store_rows,
    zeros,
)
from nsa.backends.compiled.common import LOG2_E
from nsa.core.kernel import kernel

FAR = tl.constexpr(2**31 - 1)
"""Past every token."""


@triton.jit
def _add_queries(
    dk,  # in parts, as are all tiles of heads and the results
    dv,
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
        q = load_rows(q_ptr, q_row, 1, None, C.D, C.BLOCK_D)
        dout = load_rows(dout_ptr, dout_row, 1, None, C.V, C.BLOCK_DV)
        lse_log2 = tl.load(row_ptrs[0] + row, mask=mask, other=float("inf")) * LOG2_E
        delta = tl.load(row_ptrs[1] + row)
        s = dot_rows(q, k, C)
        dp = dot_rows(dout, v, C)
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
        p_keys = tl.trans(p.to(dout[0].dtype))
        ds_keys = tl.trans(ds.to(q[0].dtype))
        dv = add_products(dv, p_keys, dout, C)
        dk = add_products(dk, ds_keys, q, C)
        if WITH_DQ:
            dq = add_products(zeros(C.BLOCK_M, C.BLOCK_D), tl.trans(ds_keys), k, C)
            if not SCALE_DS:
                dq = scale_rows(dq, scale)
            add_to_rows(dq_ptr, row * C.D, dq, slot < C.TOKENS, C.D, C.BLOCK_D)
    return dk, dv


@triton.jit
def _locate_block(block_id, part, num_blocks, KV_HEADS, BLOCK_PITCH: tl.constexpr):
    """Batch row, key/value head and first key row of one part of a block."""
    b_head = (block_id // num_blocks).to(tl.int32)
    first_row = (block_id % num_blocks).to(tl.int32) * BLOCK_PITCH + part
    return b_head // KV_HEADS, b_head % KV_HEADS, first_row


@triton.jit
def _is_continued(block_ids_ptr, begin, block_id, CHUNK: tl.constexpr):
    """Whether the ordered chunk that begins there is not the first of its block."""
    return tl.load(block_ids_ptr + begin - CHUNK, mask=begin >= CHUNK, other=-1) == block_id


@triton.jit
def _part_row(begin, part, CHUNK: tl.constexpr, C: tl.constexpr):
    """Where the sums of such a chunk stand: no two begin less than CHUNK apart."""
    n = tl.arange(0, C.BLOCK_N)
    return (begin // CHUNK - 1).to(tl.int64) * C.SELECT_BLOCK + part + n


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
    parts_ptr,  # fp32 [P // CHUNK, l', D + V], contiguous; written with CHUNK
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
    CHUNK: tl.constexpr,
    INT64: tl.constexpr,
    C: tl.constexpr,
):
    block_ids_ptr, offsets_ptr, num_chunks_ptr, tokens_ptr, ends_ptr = index_ptrs
    part = (tl.program_id(0) % C.PARTS) * C.BLOCK_N
    row = tl.arange(0, C.BLOCK_M)
    n = tl.arange(0, C.BLOCK_N)
    chunk = tl.program_id(0) // C.PARTS
    if chunk < tl.load(num_chunks_ptr):
        begin = tl.load(offsets_ptr + chunk)
        end = tl.load(offsets_ptr + chunk + 1)
        block_id = tl.load(block_ids_ptr + begin).to(tl.int64)
        b, kv_head, first_row = _locate_block(block_id, part, num_blocks, KV_HEADS, BLOCK_PITCH)
        entry = begin
        begin *= SHARE
        end *= SHARE
        b64 = b.to(tl.int64)
        kv_head64 = kv_head.to(tl.int64)
        exists = (n < C.SELECT_BLOCK - part) & (first_row + n < S)
        first64 = first_row.to(tl.int64)
        k_ptr += b64 * k_strides[0] + kv_head64 * k_strides[2] + first64 * k_strides[1]
        v_ptr += b64 * v_strides[0] + kv_head64 * v_strides[2] + first64 * v_strides[1]
        k = load_rows(k_ptr + n * k_strides[1], None, 1, exists, C.D, C.BLOCK_D)
        v = load_rows(v_ptr + n * v_strides[1], None, 1, exists, C.V, C.BLOCK_DV)
        head = kv_head * C.G + row % C.G
        # Tokens are numbered through the batch. A stride of 1 is a constant: it has no dtype.
        q_ptr += b64 * q_strides[0] - b64 * T * q_strides[1]
        dout_ptr += b64 * dout_strides[0] - b64 * T * dout_strides[1]

        dk = zeros(C.BLOCK_N, C.BLOCK_D)
        dv = zeros(C.BLOCK_N, C.BLOCK_DV)
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
        grad_row = (b64 * S + first_row + n) * KV_HEADS + kv_head
        if not SCALE_DS:
            dk = scale_rows(dk, scale)
        if CHUNK is not None:
            continued = _is_continued(block_ids_ptr, entry, block_id, CHUNK)
            part_ptr = parts_ptr + _part_row(entry, part, CHUNK, C) * (C.D + C.V)
            store_rows(part_ptr, None, dk, exists & continued, C.D, C.BLOCK_D)
            store_rows(part_ptr + C.D, None, dv, exists & continued, C.V, C.BLOCK_DV)
            exists = exists & (continued == 0)
        add_to_rows(dk_ptr + grad_row * C.D, None, dk, exists, C.D, C.BLOCK_D)
        add_to_rows(dv_ptr + grad_row * C.V, None, dv, exists, C.V, C.BLOCK_DV)


@kernel(do_not_specialize=["S", "num_blocks", "entries"])
def nsa_selected_bwd_sum(
    parts_ptr,  # as of :func:`nsa_selected_bwd_dkv`, as are the other arguments
    dk_ptr,
    dv_ptr,
    block_ids_ptr,
    offsets_ptr,
    num_chunks_ptr,
    S,
    KV_HEADS,
    num_blocks,
    entries,
    BLOCK_PITCH: tl.constexpr,
    CHUNK: tl.constexpr,
    C: tl.constexpr,
):
    """Adds to dk and dv what the chunks of a block but its first have summed: one program a block
    (and part), which is that of its second chunk."""
    part = (tl.program_id(0) % C.PARTS) * C.BLOCK_N
    chunk = tl.program_id(0) // C.PARTS
    if chunk < tl.load(num_chunks_ptr):
        at = tl.load(offsets_ptr + chunk)
        block_id = tl.load(block_ids_ptr + at).to(tl.int64)
        second = _is_continued(block_ids_ptr, at, block_id, CHUNK)
        if second & (_is_continued(block_ids_ptr, at - CHUNK, block_id, CHUNK) == 0):
            b, kv_head, first_row = _locate_block(block_id, part, num_blocks, KV_HEADS, BLOCK_PITCH)
            n = tl.arange(0, C.BLOCK_N)
            exists = (n < C.SELECT_BLOCK - part) & (first_row + n < S)
            dk = zeros(C.BLOCK_N, C.BLOCK_D)
            dv = zeros(C.BLOCK_N, C.BLOCK_DV)
            same = second
            while same:
                part_ptr = parts_ptr + _part_row(at, part, CHUNK, C) * (C.D + C.V)
                dk = add_rows(dk, load_rows(part_ptr, None, 1, exists, C.D, C.BLOCK_D))
                dv = add_rows(dv, load_rows(part_ptr + C.D, None, 1, exists, C.V, C.BLOCK_DV))
                at += CHUNK
                same = tl.load(block_ids_ptr + at, mask=at < entries, other=-1) == block_id
            grad_row = (b.to(tl.int64) * S + first_row + n) * KV_HEADS + kv_head
            add_to_rows(dk_ptr + grad_row * C.D, None, dk, exists, C.D, C.BLOCK_D)
            add_to_rows(dv_ptr + grad_row * C.V, None, dv, exists, C.V, C.BLOCK_DV)
