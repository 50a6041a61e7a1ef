"""Selected attention (paper Eq. 11-12), forward and backward: launches of the kernels of
:mod:`.selected_rows` (forward and dq) and :mod:`.selected_kv` (dk, dv and dq).

B batch, T query tokens, S key tokens, H query heads, K key/value heads, G heads per group, D key
size, V value size, n listed blocks, W entries of a union list.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from nsa.backends.compiled.common import row_sums, rows_contiguous
from nsa.backends.compiled.selected.bwd_dkv import selected_dkv
from nsa.backends.compiled.selected.fwd import dq_kernel, forward_kernel
from nsa.backends.compiled.selected.lists import UnionLists, union_lists
from nsa.backends.compiled.selected.tiles import (
    QueryTiles,
    SelectedTiles,
    default_tiles,
    padded,
    padded_rows,
)
from nsa.backends.compiled.window.bounds import LOG2E


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
    tiles: QueryTiles | None = None,
    lists: UnionLists | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens ``s <= t`` of the listed blocks.

    Args:
        q: ``[B, T, H, D]``, fp32, fp16 or bf16.
        k, v: ``[B, S, K, D]`` and ``[B, S, K, V]``, of q's dtype.
        block_idx: int32 ``[B, T, K, n]``, strictly ascending, then −1; block j covers the
            positions ``j*l' … j*l' + l' - 1`` of the query's own sequence.
        start: None for a regular batch; when packed (B = 1), int32 ``[T]``, the first row of k
            and v of each token's sequence.
        select_block: l', in tokens.
        scale: of the scores.
        q_start: position of q's first row; 0 when packed.
        tiles: how to cut the launch; None takes :func:`default_tiles`.
        lists: made by :func:`union_lists` for as many tokens a tile as ``tiles`` has, or None.

    Returns:
        out ``[B, T, H, V]`` in q's dtype and lse ``[B, T, H]``, fp32, natural log; 0 and −inf
        where nothing is visible.
    """
    B, T, H, D = q.shape
    K, V = v.shape[2:]
    out = torch.empty(B, T, H, V, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    tiles = tiles or default_tiles(q, v, block_idx, select_block).forward
    q, k, v = map(rows_contiguous, (q, k, v))
    with torch.cuda.device_of(q):
        if lists is None:
            lists = _lists(k, block_idx, tiles, start, select_block, q_start)
        forward_kernel[(lists.counts.numel(),)](
            q,
            k,
            v,
            out,
            lse,
            lists.rows,
            lists.masks,
            lists.counts,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            T,
            lists.counts.shape[1],
            k.shape[1],
            q_start,
            K,
            scale * LOG2E,
            **_constants(q, v, block_idx, select_block, tiles),
        )
    return out, lse


def selected_dq(
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
    tiles: QueryTiles | None = None,
    lists: UnionLists | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of q, and what :func:`selected_dkv` needs of out.

    Arguments as of :func:`selected_forward`, with its results and the gradient ``dout`` of out.

    Returns:
        dq ``[B, T, H, D]`` in q's dtype, and delta ``[B, T, H]``, fp32, the sum of ``dout * out``.
    """
    B, T, H, D = q.shape
    dq = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    delta = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    call = (block_idx, start, select_block, scale, q_start, tiles, lists)
    _launch_dq(dout, q, k, v, out.contiguous(), lse.contiguous(), delta, None, dq, *call)
    return dq, delta


def add_selected_dq(
    dq: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    weight: Tensor | None,
    block_idx: Tensor,
    *,
    start: Tensor | None,
    select_block: int,
    scale: float,
) -> None:
    """Adds the gradient of q to ``dq``, contiguous and of any dtype.

    Arguments as of :func:`selected_dkv`.
    """
    call = (block_idx, start, select_block, scale, 0, None, None)
    _launch_dq(dout, q, k, v, None, lse, delta, weight, dq, *call)


def _launch_dq(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    weight: Tensor | None,
    dq: Tensor,
    block_idx: Tensor,
    start: Tensor | None,
    select_block: int,
    scale: float,
    q_start: int,
    tiles: QueryTiles | None,
    lists: UnionLists | None,
) -> None:
    """Without out: delta is given, and dq is added to."""
    if lse.numel() == 0:
        return
    tiles = tiles or default_tiles(q, v, block_idx, select_block).dq
    q, k, v, dout = map(rows_contiguous, (q, k, v, dout))
    with torch.cuda.device_of(q):
        if lists is None:
            lists = _lists(k, block_idx, tiles, start, select_block, q_start)
        dq_kernel[(lists.counts.numel(),)](
            q,
            k,
            v,
            dout,
            dq if out is None else out,
            lse,
            delta,
            lse if weight is None else weight,
            dq,
            lists.rows,
            lists.masks,
            lists.counts,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *dout.stride()[:3],
            q.shape[1],
            lists.counts.shape[1],
            k.shape[1],
            q_start,
            k.shape[2],
            scale * LOG2E,
            scale,
            MORE=out is None,
            WEIGHTED=weight is not None,
            **_constants(q, v, block_idx, select_block, tiles),
        )


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
    sequences: int | None = None,
    tiles: SelectedTiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients ``(dq, dk, dv)``, each in q's dtype and the shape of its input.

    Arguments as of :func:`selected_forward`, with its results and the gradient ``dout`` of out.
    ``sequences``, as of :func:`selected_dkv`, saves idle programs in a packed batch.
    dk and dv, and dq where the tiles say so, are summed by atomic adds in fp32, so that their last
    bits may differ between runs.
    """
    tiles = tiles or default_tiles(q, v, block_idx, select_block)
    call: dict[str, Any] = {
        "start": start,
        "select_block": select_block,
        "scale": scale,
        "q_start": q_start,
    }
    dout = rows_contiguous(dout)
    summed = None
    if tiles.dkv.with_dq:
        dq = summed = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        delta = row_sums(dout, out)
    else:
        dq, delta = selected_dq(dout, q, k, v, out, lse, block_idx, **call, tiles=tiles.dq)
    dk, dv = selected_dkv(
        dout,
        q,
        k,
        v,
        lse,
        delta,
        block_idx,
        **call,
        sequences=sequences,
        dq=summed,
        tiles=tiles.dkv,
    )
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _lists(
    k: Tensor,
    block_idx: Tensor,
    tiles: QueryTiles,
    start: Tensor | None,
    select_block: int,
    q_start: int,
) -> UnionLists:
    return union_lists(
        block_idx,
        tokens=tiles.tokens,
        key_rows=k.shape[1],
        start=start,
        select_block=select_block,
        q_start=q_start,
    )


def _constants(
    q: Tensor, v: Tensor, block_idx: Tensor, select_block: int, tiles: QueryTiles
) -> dict[str, int | str]:
    D, V, G = q.shape[3], v.shape[3], q.shape[2] // v.shape[2]
    return {
        "G": G,
        "D": D,
        "V": V,
        "SELECT": select_block,
        "WIDTH": block_idx.shape[3],
        "TOKENS": tiles.tokens,
        "ROWS": padded_rows(tiles.tokens, G),
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": padded(D),
        "BLOCK_V": padded(V),
        "PARTS": triton.cdiv(select_block, tiles.block_n),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
