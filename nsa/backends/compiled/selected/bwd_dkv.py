"""dk, dv and dq of selected attention: the loop turned round, one block of keys, all its readers.

A program holds one block of keys and values, and the sums of their gradients, while it walks over
a chunk of the tokens that list the block (``lists.chunks``), some at a
time: they need not be neighbours, so that every row of every matrix product is useful whatever the
lists.

A block with several chunks (every token reads block 0) is summed by atomic adds into fp32 buffers:
not deterministic to the last bit, but without a second pass over partial sums, which random lists
make many. dq can be summed in the same way (``KeyTiles.with_dq``): n adds to each element, and no
second time the scores and dp that dk and dv need anyway.

B batch, T query tokens, S key tokens, H query heads, K key/value heads, G heads per group, D key
size, V value size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.backends.compiled.common import rows_contiguous
from nsa.backends.compiled.selected.lists import Chunks, chunks
from nsa.backends.compiled.selected.tiles import KeyTiles, default_tiles, padded, padded_rows
from nsa.backends.compiled.window.bounds import LOG2_E, LOG2E


@triton.jit
def _add_readers(
    dk_acc,  # [BLOCK_N, BLOCK_D], as is the first result
    dv_acc,  # [BLOCK_N, BLOCK_V], as is the second
    begin,
    end,
    k_tile,
    v_tile,
    q_ptr,  # of the batch row
    do_ptr,
    lse,
    delta,
    weight,
    dq,
    tokens,
    token_0,
    query_head,
    first,
    part,
    q_t,
    q_h,
    do_t,
    do_h,
    q_start,
    heads,
    score_scale,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    SELECT: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    WITH_DQ: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FOLD: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What pairs ``begin … end - 1`` add to dk, dv and dq; without MASKED they see every key.

    With FOLD ds is scaled before it is rounded, which costs nothing; dk and dq are not, after it.
    """
    r = tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    slot = r // G
    # What is the same in every step is cheap to compute again; kept, it spills (sm_90).
    for pair in tl.range(begin, end, TOKENS, disable_licm=True):
        # Rows past the end are the last token's again, with probability 0.
        bt = tl.load(tokens + tl.minimum(pair + slot, end - 1))
        row = bt * heads + query_head
        q_row = bt * q_t + query_head * q_h
        do_row = bt * do_t + query_head * do_h
        if WIDE:
            row = bt.to(tl.int64) * heads + query_head
            q_row = bt.to(tl.int64) * q_t + query_head.to(tl.int64) * q_h
            do_row = bt.to(tl.int64) * do_t + query_head.to(tl.int64) * do_h
        q_at = q_ptr + (q_row[:, None] + d[None, :])
        do_at = do_ptr + (do_row[:, None] + e[None, :])
        q_tile = tl.load(q_at, mask=(d < D)[None, :], other=0.0)
        do_tile = tl.load(do_at, mask=(e < V)[None, :], other=0.0)
        live = (slot < TOKENS) & (pair + slot < end)
        log = tl.load(lse + row, mask=live, other=float("inf")) * LOG2_E
        mean = tl.load(delta + row)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        # No probability is above 1; where scores are so large that rounding the lse says otherwise,
        # the minimum keeps the gradient finite.
        # Masks come before the exponential and the product: selecting 16-bit results would take
        # twice the instructions. The product's asks for p, so that no mask has to be kept.
        s = tl.minimum(s * score_scale - log[:, None], 0.0)
        if MASKED:
            # How far into these keys each row sees, so that a key costs one comparison.
            reach = tl.minimum(bt - token_0 + q_start - first, SELECT - 1 - part)
            s = tl.where(n[None, :] <= reach[:, None], s, float("-inf"))
        p = tl.exp2(s)
        if WEIGHTED:
            p *= tl.load(weight + row)[:, None]
        if FOLD:
            dp, mean = dp * scale, mean * scale
        ds = p * (dp - mean[:, None])
        if MASKED:
            ds = tl.where(p == 0.0, 0.0, ds)
        p_keys = tl.trans(p.to(do_tile.dtype))
        ds_keys = tl.trans(ds.to(q_tile.dtype))
        dv_acc = tl.dot(p_keys, do_tile, dv_acc, input_precision=PRECISION)
        dk_acc = tl.dot(ds_keys, q_tile, dk_acc, input_precision=PRECISION)
        if WITH_DQ:
            dq_part = tl.dot(tl.trans(ds_keys), k_tile, input_precision=PRECISION)
            if not FOLD:
                dq_part *= scale
            dq_mask = (slot < TOKENS)[:, None] & (d < D)[None, :]
            dq_at = dq + (row[:, None] * D + d[None, :])
            tl.atomic_add(dq_at, dq_part, mask=dq_mask, sem="relaxed")
    return dk_acc, dv_acc


@triton.jit(do_not_specialize=["T", "S", "q_start", "spans", "blocks"])
def _dkv_kernel(
    q,
    k,
    v,
    dout,
    lse,  # [B, T, H], contiguous
    delta,  # [B, T, H], contiguous
    weight,  # [B, T, H], contiguous: of each row's probabilities, with WEIGHTED
    dk,  # fp32 [B, S, K, D], contiguous; added to
    dv,  # fp32 [B, S, K, V], contiguous; added to
    dq,  # fp32 [B, T, H, D], contiguous; added to with WITH_DQ
    keys,
    tokens,
    starts,
    chunk_count,
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
    S,
    q_start,
    KV,
    spans,
    blocks,
    score_scale,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    SELECT: tl.constexpr,
    UNIT: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PARTS: tl.constexpr,
    NEAR: tl.constexpr,
    WITH_DQ: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FOLD: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = (tl.program_id(0) % PARTS) * BLOCK_N
    r = tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    mask_d = (d < D)[None, :]
    mask_e = (e < V)[None, :]
    chunk = tl.program_id(0) // PARTS
    if chunk < tl.load(chunk_count):
        begin = tl.load(starts + chunk)
        end = tl.load(starts + chunk + 1)
        key = tl.load(keys + begin).to(tl.int64)
        first = (key % blocks).to(tl.int32) * UNIT + part
        b_head = (key // blocks // spans).to(tl.int32)
        head = b_head % KV
        b = b_head // KV
        b64 = b.to(tl.int64)
        head64 = head.to(tl.int64)
        exists = (n < SELECT - part) & (first + n < S)
        k_mask = exists[:, None]
        v_mask = exists[:, None]
        if BLOCK_D != D:
            k_mask = k_mask & mask_d
        if BLOCK_V != V:
            v_mask = v_mask & mask_e
        k_ptr = k + b64 * k_b + head64 * k_h + first.to(tl.int64) * k_s
        v_ptr = v + b64 * v_b + head64 * v_h + first.to(tl.int64) * v_s
        k_tile = tl.load(k_ptr + n[:, None] * k_s + d[None, :], mask=k_mask, other=0.0)
        v_tile = tl.load(v_ptr + n[:, None] * v_s + e[None, :], mask=v_mask, other=0.0)
        query_head = head * G + r % G
        # Tokens are numbered through the batch. A stride of 1 is a constant: it has no dtype.
        q_ptr = q + b64 * q_b - b64 * T * q_t
        do_ptr = dout + b64 * do_b - b64 * T * do_t

        dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv_acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        # Tokens rise: those of the block itself, which do not see all of it, come first.
        middle = end
        if SELECT % BLOCK_N == 0:
            near = begin + tl.arange(0, NEAR)
            t = tl.load(tokens + near, mask=near < end, other=2147483647) - b * T
            inside = (near < end) & (t + q_start < first + BLOCK_N - 1)
            middle = begin + tl.cdiv(tl.sum(inside.to(tl.int32), 0), TOKENS) * TOKENS
            middle = tl.minimum(middle, end)
        for half in tl.static_range(2):
            dk_acc, dv_acc = _add_readers(
                dk_acc,
                dv_acc,
                begin if half == 0 else middle,
                middle if half == 0 else end,
                k_tile,
                v_tile,
                q_ptr,
                do_ptr,
                lse,
                delta,
                weight,
                dq,
                tokens,
                b * T,
                query_head,
                first,
                part,
                q_t,
                q_h,
                do_t,
                do_h,
                q_start,
                KV * G,
                score_scale,
                scale,
                G,
                D,
                V,
                SELECT,
                TOKENS,
                ROWS,
                BLOCK_N,
                BLOCK_D,
                BLOCK_V,
                WITH_DQ,
                WEIGHTED,
                FOLD,
                half == 0,
                WIDE,
                PRECISION,
            )

        # A key past the end of its block is another block's, or nobody's; p and ds of it are 0.
        grad_row = (b64 * S + first + n[:, None]) * KV + head
        if not FOLD:
            dk_acc *= scale
        tl.atomic_add(dk + grad_row * D + d[None, :], dk_acc, mask=k_mask, sem="relaxed")
        tl.atomic_add(dv + grad_row * V + e[None, :], dv_acc, mask=v_mask, sem="relaxed")


def selected_dkv(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    block_idx: Tensor,
    *,
    start: Tensor | None,
    select_block: int,
    scale: float,
    q_start: int = 0,
    sequences: int | None = None,
    weight: Tensor | None = None,
    dq: Tensor | None = None,
    tiles: KeyTiles | None = None,
    cut: Chunks | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of k and v, and of q where the tiles say so.

    Args:
        dout: ``[B, T, H, V]``, the gradient of out.
        q, k, v, block_idx, start, select_block, scale, q_start: as of
            :func:`nsa.backends.compiled.selected.launch.selected_forward`.
        lse: ``[B, T, H]``, fp32, as it returned.
        delta: ``[B, T, H]``, fp32, the sum of ``dout * out``.
        sequences: at most so many packed sequences (``cu_seqlens.numel() - 1``); without it, many
            programs start for nothing.
        weight: ``[B, T, H]``, fp32, of each row's probabilities; None for 1.
        dq: ``[B, T, H, D]``, fp32, contiguous: what q's gradient is added to with
            ``KeyTiles.with_dq``.
        tiles: how to cut the launch; None takes :func:`default_tiles`.
        cut: made by :func:`chunks`, or None.

    Returns:
        dk ``[B, S, K, D]`` and dv ``[B, S, K, V]``, fp32, 0 for keys that nobody sees.
    """
    B, T, H, D = q.shape
    S, K, V = v.shape[1:]
    n = block_idx.shape[3]
    dk = torch.zeros(k.shape, dtype=torch.float32, device=q.device)
    dv = torch.zeros(v.shape, dtype=torch.float32, device=q.device)
    tiles = tiles or default_tiles(q, v, block_idx, select_block).dkv
    assert not tiles.with_dq or (dq is not None and dq.dtype == torch.float32)
    if q.numel() and k.numel() and n:
        G = H // K
        q, k, v, dout = map(rows_contiguous, (q, k, v, dout))
        with torch.cuda.device_of(q):
            if cut is None:
                cut = chunks(
                    block_idx,
                    key_rows=S,
                    start=start,
                    select_block=select_block,
                    chunk=tiles.chunk,
                    span=tiles.span,
                    q_start=q_start,
                    sequences=sequences,
                )
            parts = triton.cdiv(select_block, tiles.block_n)
            _dkv_kernel[(cut.at_most * parts,)](
                q,
                k,
                v,
                dout,
                lse.contiguous(),
                delta.contiguous(),
                lse if weight is None else weight,
                dk,
                dv,
                dk if dq is None else dq,
                cut.keys,
                cut.tokens,
                cut.starts,
                cut.number,
                *q.stride()[:3],
                *k.stride()[:3],
                *v.stride()[:3],
                *dout.stride()[:3],
                T,
                S,
                q_start,
                K,
                cut.spans,
                cut.blocks,
                scale * LOG2E,
                scale,
                G=G,
                D=D,
                V=V,
                SELECT=select_block,
                UNIT=cut.unit,
                TOKENS=tiles.tokens,
                ROWS=padded_rows(tiles.tokens, G),
                BLOCK_N=tiles.block_n,
                BLOCK_D=padded(D),
                BLOCK_V=padded(V),
                PARTS=parts,
                NEAR=padded(select_block),
                WITH_DQ=tiles.with_dq,
                WEIGHTED=weight is not None,
                FOLD=q.dtype != torch.float16,
                WIDE=max(q.numel(), _reach(q), _reach(dout)) >= 2**31,
                PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
                **({} if tiles.maxnreg is None else {"maxnreg": tiles.maxnreg}),
            )
    return dk, dv


def _reach(x: Tensor) -> int:
    """More than any offset of an element ``[B, T, H, ...]`` whose row is told by B * T and H."""
    B, T, H = x.shape[:3]
    return B * T * x.stride(1) + H * x.stride(2) + x.shape[3]
