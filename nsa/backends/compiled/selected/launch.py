"""Selected attention (paper Eq. 11-12), forward and backward: launches of :mod:`.fwd`,
:mod:`.bwd_dq` and :mod:`.bwd_dkv`; of :mod:`.far` in :mod:`.far_launch`.

B batch, T query tokens, S key tokens, H query heads, K key/value heads, G heads per group, D key
size, V value size, n selected blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from nsa.backends.compiled.common import LOG2E, bwd_preprocess, rows_contiguous
from nsa.backends.compiled.selected.bwd_dkv import nsa_selected_bwd_dkv, nsa_selected_bwd_sum
from nsa.backends.compiled.selected.bwd_dq import nsa_selected_bwd_dq
from nsa.backends.compiled.selected.far_launch import (
    dq_with_far_blocks,
    forward_with_far_blocks,
)
from nsa.backends.compiled.selected.fwd import nsa_selected_fwd
from nsa.backends.compiled.selected.inverse_index import InverseIndex, inverse_index
from nsa.backends.compiled.selected.shared import shared_index, shared_lists
from nsa.backends.compiled.selected.tiles import (
    Constants,
    KeyTiles,
    QueryTiles,
    SelectedTiles,
    constants,
    default_tiles,
)
from nsa.backends.compiled.selected.union import TileUnions, tile_unions
from nsa.backends.compiled.tiling import launch_options, padded


def selected_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    *,
    start: Tensor | None,
    select_block: int,
    scale: float,
    q_start: int = 0,
    share: int = 1,
    sequences: int | None = None,
    tiles: QueryTiles | None = None,
    unions: TileUnions | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens ``s <= t`` of the selected blocks.

    Args:
        q: ``[B, T, H, D]``, fp32, fp16 or bf16.
        k, v: ``[B, S, K, D]`` and ``[B, S, K, V]``, of q's dtype.
        block_idx: int32 ``[B, T, K, n]``, strictly ascending, then −1; block j covers the
            positions ``j*l' … j*l' + l' - 1`` of the query's own sequence.
        start: None for a fixed-length batch; when packed (B = 1), int32 ``[T]``, the first row of
            k and v of each token's sequence.
        select_block: l', in tokens.
        scale: of the scores.
        q_start: position of q's first row; 0 when packed.
        share: so many tokens, from the start of each sequence on, have one list, and each list has
            only blocks up to the query's own, as ``select_share`` makes them; q_start is a multiple
            of it.
        sequences: at most so many packed sequences (``cu_seqlens.numel() - 1``); without it, many
            programs may start for nothing.
        tiles: of the launch; None takes :func:`default_tiles`. With ``share``, their tokens divide
            it.
        unions: made by :func:`tile_unions` for as many tokens a tile as ``tiles`` has, or None;
            where ``tiles`` have far blocks, None.

    Returns:
        out ``[B, T, H, V]`` in q's dtype and lse ``[B, T, H]``, fp32, natural log; 0 and −inf
        where nothing is visible.
    """
    B, T, H, D = q.shape
    S, K, V = v.shape[1:]
    out = torch.empty(B, T, H, V, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    tiles = tiles or default_tiles(q, v, block_idx, select_block, share).forward
    q, k, v = map(rows_contiguous, (q, k, v))
    where: dict[str, Any] = {"start": start, "select_block": select_block, "sequences": sequences}
    with torch.cuda.device_of(q):
        if tiles.far is not None:
            assert share == 1, share
            assert unions is None
            call: dict[str, Any] = {**where, "scale": scale, "q_start": q_start, "tiles": tiles}
            forward_with_far_blocks(q, k, v, block_idx, out, lse, **call)
            return out, lse
        blocks, num_tiles = _blocks_of_tiles(
            block_idx, unions, tiles, key_rows=S, share=share, **where, q_start=q_start
        )
        nsa_selected_fwd[(B * num_tiles * K,)](
            *(q, k, v, out, lse),
            *(blocks, None),
            *(x.stride() for x in (q, k, v)),
            *(T, num_tiles, S, q_start, 0, K, scale * LOG2E),
            SINCE=None,
            C=_query_constants(q, v, block_idx, select_block, tiles, start, share),
            **launch_options(tiles.num_warps, tiles.num_stages),
        )
    return out, lse


def selected_dq(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    block_idx: Tensor,
    *,
    start: Tensor | None,
    select_block: int,
    scale: float,
    q_start: int = 0,
    out: Tensor | None = None,
    delta: Tensor | None = None,
    weight: Tensor | None = None,
    dq: Tensor | None = None,
    share: int = 1,
    sequences: int | None = None,
    tiles: QueryTiles | None = None,
    unions: TileUnions | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of q and delta: from out, or, with both given, delta as it is and dq added to.

    Args:
        dout: ``[B, T, H, V]``, the gradient of out.
        q, k, v, block_idx, start, select_block, scale, q_start, share, sequences, tiles, unions: as
            of :func:`selected_forward`.
        out, lse: as it returned.
        delta: ``[B, T, H]``, fp32, contiguous, the sum of ``dout * out``.
        weight: ``[B, T, H]``, fp32, contiguous, of each row's probabilities; None for 1.
        dq: ``[B, T, H, D]``, contiguous, of any dtype.

    Returns:
        dq, in q's dtype unless given, and delta.
    """
    T, S, K = q.shape[1], k.shape[1], k.shape[2]
    tiles = tiles or default_tiles(q, v, block_idx, select_block, share).dq
    if tiles.far is not None and out is not None:  # which adds to dq alone
        delta, out = bwd_preprocess(dout, out), None
        dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    accumulate = out is None
    if out is not None:
        out = out.contiguous()
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        delta = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    assert dq is not None, "expected out, or delta and dq"
    assert delta is not None, "expected out, or delta and dq"
    if delta.numel() == 0:
        return dq, delta
    q, k, v, dout = map(rows_contiguous, (q, k, v, dout))
    where: dict[str, Any] = {"start": start, "select_block": select_block, "q_start": q_start}
    with torch.cuda.device_of(q):
        if tiles.far is not None:
            assert share == 1, share
            assert unions is None
            of_rows = lse.contiguous(), delta, weight
            where |= {"scale": scale, "tiles": tiles, "sequences": sequences}
            dq_with_far_blocks(dout, q, k, v, *of_rows, dq, block_idx, **where)
            return dq, delta
        blocks, num_tiles = _blocks_of_tiles(
            block_idx, unions, tiles, key_rows=S, share=share, sequences=sequences, **where
        )
        nsa_selected_bwd_dq[(q.shape[0] * num_tiles * K,)](
            *(q, k, v, dout, dq if out is None else out, lse.contiguous(), delta),
            *(delta if weight is None else weight, dq),
            *(blocks, None),
            *(x.stride() for x in (q, k, v, dout)),
            *(T, num_tiles, S, q_start, 0, K, scale * LOG2E, scale),
            ACCUMULATE=accumulate,
            WEIGHTED=weight is not None,
            SINCE=None,
            C=_query_constants(q, v, block_idx, select_block, tiles, start, share),
            **launch_options(tiles.num_warps, tiles.num_stages),
        )
    return dq, delta


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
    share: int = 1,
    sequences: int | None = None,
    weight: Tensor | None = None,
    dq: Tensor | None = None,
    tiles: KeyTiles | None = None,
    index: InverseIndex | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of k and v, and of q where the tiles say so.

    Args:
        dout, q, k, v, lse, delta, block_idx, start, select_block, scale, q_start, share, weight: as
            of :func:`selected_dq`.
        sequences: at most so many packed sequences (``cu_seqlens.numel() - 1``); without it, many
            programs start for nothing.
        dq: ``[B, T, H, D]``, fp32, contiguous: what q's gradient is added to with
            ``KeyTiles.with_dq``.
        tiles: of the launch; None takes :func:`default_tiles`.
        index: made by :func:`inverse_index`, or None.

    Returns:
        dk ``[B, S, K, D]`` and dv ``[B, S, K, V]``, fp32, 0 for keys that nobody sees.
    """
    T, S, K = q.shape[1], k.shape[1], k.shape[2]
    dk = torch.zeros(k.shape, dtype=torch.float32, device=q.device)
    dv = torch.zeros(v.shape, dtype=torch.float32, device=q.device)
    tiles = tiles or default_tiles(q, v, block_idx, select_block, share).dkv
    assert not tiles.with_dq or (dq is not None and dq.dtype == torch.float32)
    if not (q.numel() and k.numel() and block_idx.numel()):
        return dk, dv
    q, k, v, dout = map(rows_contiguous, (q, k, v, dout))
    where: dict[str, Any] = {"start": start, "select_block": select_block, "sequences": sequences}
    where |= {"key_rows": S, "chunk": tiles.chunk, "ordered": tiles.ordered}
    with torch.cuda.device_of(q):
        if share > 1:
            index = index or shared_index(block_idx, share=share, **where)
        else:
            index = index or inverse_index(block_idx, q_start=q_start, **where)
        entries, parts = index.tokens.numel() - 1, None
        if index.chunk is not None:
            shape = entries // index.chunk, select_block, k.shape[3] + v.shape[3]
            parts = torch.empty(shape, dtype=torch.float32, device=q.device)
        grid = (index.max_chunks * triton.cdiv(select_block, tiles.block_n),)
        lists = index.block_ids, index.offsets, index.num_chunks
        C = constants(q, v, block_idx, select_block, tiles)
        nsa_selected_bwd_dkv[grid](
            *(q, k, v, dout),
            (lse.contiguous(), delta.contiguous(), delta if weight is None else weight),
            *(dk, dv, dk if dq is None else dq, parts),
            (*lists, index.tokens, index.ends),
            *(x.stride() for x in (q, k, v, dout)),
            *(T, S, q_start, K, index.num_blocks, scale * LOG2E, scale),
            BLOCK_PITCH=index.block_pitch,
            MASKED_PREFIX=padded(select_block),
            WITH_DQ=tiles.with_dq,
            WEIGHTED=weight is not None,
            SCALE_DS=q.dtype != torch.float16,
            SHARE=index.share,
            CHUNK=index.chunk,
            INT64=max(q.numel(), _row_extent(q), _row_extent(dout)) >= 2**31,
            C=C,
            **launch_options(tiles.num_warps, tiles.num_stages, tiles.maxnreg),
        )
        if parts is not None and parts.numel():
            nsa_selected_bwd_sum[grid](
                *(parts, dk, dv, *lists, S, K, index.num_blocks, entries),
                BLOCK_PITCH=index.block_pitch,
                CHUNK=index.chunk,
                C=C,
                **launch_options(tiles.num_warps, 1),
            )
    return dk, dv


def selected_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_idx: Tensor,
    *,
    start: Tensor | None,
    select_block: int,
    scale: float,
    q_start: int = 0,
    share: int = 1,
    sequences: int | None = None,
    tiles: SelectedTiles | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients ``(dq, dk, dv)``, each in q's dtype and the shape of its input.

    Arguments as of :func:`selected_forward`, with its results and the gradient ``dout`` of out.
    ``sequences``, as of :func:`selected_dkv`, saves idle programs in a packed batch.
    dk and dv, and dq where the tiles say so, are summed by atomic adds in fp32, so that their last
    bits may differ between runs; not where ``deterministic`` chose the tiles.
    """
    tiles = tiles or default_tiles(
        q, v, block_idx, select_block, share, deterministic=deterministic
    )
    call: dict[str, Any] = {"start": start, "select_block": select_block}
    call |= {"scale": scale, "q_start": q_start, "share": share, "sequences": sequences}
    dout = rows_contiguous(dout)
    summed = None
    if tiles.dkv.with_dq:
        dq = summed = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        delta = bwd_preprocess(dout, out)
    else:
        dq, delta = selected_dq(dout, q, k, v, lse, block_idx, **call, out=out, tiles=tiles.dq)
    call |= {"dq": summed, "tiles": tiles.dkv}
    dk, dv = selected_dkv(dout, q, k, v, lse, delta, block_idx, **call)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _blocks_of_tiles(
    block_idx: Tensor,
    unions: TileUnions | None,
    tiles: QueryTiles,
    *,
    share: int,
    sequences: int | None,
    start: Tensor | None,
    **where: Any,
) -> tuple[tuple[Any, ...], int]:
    """What a kernel over query tiles reads of their blocks, and the number of tiles."""
    if share > 1:
        assert unions is None and share % tiles.tokens == 0, (unions, share, tiles)
        lists = shared_lists(block_idx, tokens=tiles.tokens, start=start, sequences=sequences)
        return lists[1:], lists.tiles
    unions = unions or tile_unions(block_idx, tokens=tiles.tokens, start=start, **where)
    return unions[1:], unions.counts.shape[1]


def _query_constants(
    q: Tensor,
    v: Tensor,
    block_idx: Tensor,
    select_block: int,
    tiles: QueryTiles,
    start: Tensor | None,
    share: int,
) -> Constants:
    shared = share > 1
    packed = shared and start is not None
    return constants(q, v, block_idx, select_block, tiles, shared=shared, packed=packed)


def _row_extent(x: Tensor) -> int:
    """More than any offset of an element ``[B, T, H, ...]`` whose row is told by B * T and H."""
    B, T, H = x.shape[:3]
    return B * T * x.stride(1) + H * x.stride(2) + x.shape[3]
