"""Selected attention of the ``sdpa`` backend, forward and backward, over the tiles of
:mod:`nsa.backends.shared.block_tiles`.

B batch, T query tokens, S key tokens, C tokens of a chunk, H query heads, K key/value heads,
G heads per group, D key size, V value size, n listed blocks, L tokens of a block, m queries of a
tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.backends.sdpa.numerics import (
    bmm,
    chunk_elements,
    operand_dtype,
)
from nsa.backends.shared.block_tiles import (
    TILE_ROWS,
    Blocks,
    Tiles,
    from_blocks,
    make_tiles,
    number_blocks,
    runs,
    to_blocks,
)
from nsa.config import NSAConfig
from nsa.core import flops
from nsa.core.dtypes import NEG_INF, accumulation_dtype
from nsa.core.operators import config_of, define_attention

EVEN = 16
"""Sizes of a tile's matrices are rounded up to this many elements, 64 bytes of fp32.

Where a tile stands in its run depends on what later tokens chose, and matrix libraries round
differently for matrices that begin off a cache line. Causality is to be exact to the bit.
"""


def _even(blocks: Tensor) -> Tensor:
    """``[blocks, L, D]`` with L widened likewise; the keys added are visible to no query."""
    return F.pad(blocks, (0, 0, 0, -blocks.shape[1] % EVEN)) if blocks.shape[1] % EVEN else blocks


class ChunkPlan(NamedTuple):
    """How the work is split."""

    tokens: int
    """Query tokens of a chunk, whose partial results are held at once."""
    tile: int
    """Queries of a tile, m."""
    tiles: int
    """Tiles whose scores are computed at once."""


def chunk_plan(block_idx: Tensor, blocks: Blocks, G: int, widest: int) -> ChunkPlan:
    """Split the work so that partial results and scores fit the device's chunk."""
    K, n = block_idx.shape[-2:]
    budget = chunk_elements(block_idx.device)
    m = max(1, TILE_ROWS // G)
    per_token = K * n * G * widest
    # partial results pass through once; a longer chunk fills its tiles better
    tokens = max(1, (16 * budget if block_idx.device.type == "cpu" else 2 * budget) // per_token)
    return ChunkPlan(tokens, m, max(1, budget // (m * G * blocks.size)))


def _tile_scores(
    q_t: Tensor, k_t: Tensor, visible: Tensor, scale: float, out: Tensor | None = None
) -> Tensor:
    """``[tiles, m*G, L]``, −inf where the query does not see the key; any in an unused row."""
    scores = bmm(q_t, k_t.mT, out).mul_(scale)
    tiles, m = visible.shape
    L = k_t.shape[1]
    if visible.device.type == "cpu" and not ((visible > 0) & (visible < L)).any():
        return scores
    hidden = torch.arange(L, device=visible.device) >= visible[..., None]
    scores.view(tiles, m, -1, L).masked_fill_(hidden[:, :, None], NEG_INF)
    return scores


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    cu_seqlens: Tensor | None,
    key: str,
    q_start: int,
) -> tuple[Tensor, Tensor]:
    config = config_of(key)
    scale = config.softmax_scale
    B, T, H, D = q.shape
    K, V = k.shape[2], v.shape[3]
    G, dtype, acc = H // K, operand_dtype(q), accumulation_dtype(q.dtype)
    blocks = number_blocks(q, k, config, cu_seqlens, q_start)
    k_blocks, v_blocks = _even(to_blocks(k, blocks, dtype)), _even(to_blocks(v, blocks, dtype))
    q_rows = q.reshape(B * T * K, G * D)
    lists = block_idx.flatten(0, 1)
    plan = chunk_plan(lists, blocks, G, max(D, V))
    out = q.new_empty(B * T * K, G, V)
    lse = q.new_empty(B * T * K, G, dtype=acc)
    for first in range(0, B * T, plan.tokens):
        here = slice(first * K, min(first + plan.tokens, B * T) * K)
        chunk = lists[first : first + plan.tokens]
        tiles = make_tiles(chunk, blocks, first, plan.tile, plan.tiles)
        rows = q_rows[here].to(dtype)
        # no name for the partial results: it would keep them while the next chunk makes its own
        out[here], lse[here] = _merge(
            tiles, *_partials(tiles, rows, k_blocks, v_blocks, plan, scale, G)
        )
    return out.view(B, T, H, V), lse.view(B, T, H)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_idx: Tensor,
    cu_seqlens: Tensor | None,
    key: str,
    q_start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    config = config_of(key)
    scale = config.softmax_scale
    B, T, H, D = q.shape
    K, V = k.shape[2], v.shape[3]
    G, dtype = H // K, operand_dtype(q)
    blocks = number_blocks(q, k, config, cu_seqlens, q_start)
    k_blocks, v_blocks = _even(to_blocks(k, blocks, dtype)), _even(to_blocks(v, blocks, dtype))
    q_rows = q.reshape(B * T * K, G * D)
    dout_rows = dout.reshape(B * T * K, G * V)
    delta = (dout.to(lse.dtype) * out).sum(-1).view(B * T * K, G)
    lse = lse.masked_fill(lse == NEG_INF, 0.0).view(B * T * K, G)
    lists = block_idx.flatten(0, 1)
    plan = chunk_plan(lists, blocks, G, max(D, V))
    dq = q.new_empty(B * T * K, G * D)
    dk = torch.zeros_like(k_blocks, dtype=lse.dtype)
    dv = torch.zeros_like(v_blocks, dtype=lse.dtype)
    for first in range(0, B * T, plan.tokens):
        here = slice(first * K, min(first + plan.tokens, B * T) * K)
        chunk = lists[first : first + plan.tokens]
        tiles = make_tiles(chunk, blocks, first, plan.tile, plan.tiles)
        rows = q_rows[here].to(dtype), dout_rows[here].to(dtype), lse[here], delta[here]
        dq[here] = _merge_gradients(
            tiles, _tile_gradients(tiles, *rows, k_blocks, v_blocks, dk, dv, plan, scale)
        )
    return (
        dq.view(B, T, H, D),
        from_blocks(dk[:, : blocks.size], blocks, k).contiguous(),
        from_blocks(dv[:, : blocks.size], blocks, v).contiguous(),
    )


_SELECTED = define_attention(
    "sdpa_selected",
    "Tensor block_idx, Tensor? cu_seqlens, str config, SymInt q_start",
    _forward,
    _backward,
    flops.selected,
)


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None,
    q_start: int,
) -> tuple[Tensor, Tensor]:
    """The selected branch; shapes as in the protocol, head sizes a multiple of :data:`EVEN`."""
    return _SELECTED(q, k, v, block_idx, cu_seqlens, config.key, q_start)


def _partials(
    tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, plan: ChunkPlan, scale: float, G: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of every tile row to its one block, not yet divided by its sum.

    Returns:
        ``weighted [rows, G, V]``, ``m_i [rows, G]`` (the score subtracted before the
        exponential) and ``l_i [rows, G]``.
    """
    m, D, V, dtype = plan.tile, k.shape[-1], v.shape[-1], k.dtype
    acc = accumulation_dtype(dtype)
    weighted = torch.empty(tiles.total * m + 1, G, V, dtype=acc, device=q.device)
    m_i = torch.empty(tiles.total * m + 1, G, dtype=acc, device=q.device)
    l_i = torch.empty_like(m_i)
    for spare in (weighted, m_i, l_i):
        spare[-1].zero_()
    buffers, scores = _buffers(tiles.run, m * G, q, k, v), None
    if q.device.type == "cpu":
        scores = torch.empty(tiles.run, m * G, k.shape[1], dtype=acc)
    for run in runs(tiles):
        rows = slice(run.start * m, run.stop * m)
        q_t = _take(q, tiles.rows[rows], buffers[0]).view(-1, m * G, D)
        k_t, v_t = _take(k, tiles.block[run], buffers[1]), _take(v, tiles.block[run], buffers[2])
        p = _tile_scores(q_t, k_t, tiles.visible[run], scale, scores)
        top = p.amax(-1, keepdim=True)
        top.masked_fill_(top == NEG_INF, 0.0)
        p.sub_(top).exp_()
        l_i[rows] = p.sum(-1).view(-1, G)
        m_i[rows] = top.view(-1, G)
        weighted[rows] = bmm(p.to(dtype), v_t).view(-1, G, V)
    return weighted, m_i, l_i


def _buffers(run: int, rows: int, *tensors: Tensor) -> list[Tensor | None]:
    """Room for what a run takes of each tensor (the first: queries), on a CPU."""
    if tensors[0].device.type != "cpu":
        return [None] * len(tensors)
    q, *blocks = tensors
    queries = run * rows // (q.shape[1] // blocks[0].shape[-1])
    return [q.new_empty(queries, q.shape[1]), *(x.new_empty(run, *x.shape[1:]) for x in blocks)]


def _take(x: Tensor, index: Tensor, out: Tensor | None) -> Tensor:
    """``x[index]``, into a buffer where there is one."""
    return x.index_select(0, index) if out is None else torch.index_select(x, 0, index, out=out)


def _merge(tiles: Tiles, weighted: Tensor, m_i: Tensor, l_i: Tensor) -> tuple[Tensor, Tensor]:
    """Joins each query's partial results: out ``[C*K, G, V]`` and lse ``[C*K, G]``."""
    queries, n = tiles.slot.shape
    slot = tiles.slot.flatten()
    high = m_i.index_select(0, slot).view(queries, n, -1)
    high.masked_fill_(~tiles.listed[..., None], NEG_INF)
    peak = high.amax(1, keepdim=True)
    peak.masked_fill_(peak == NEG_INF, 0.0)
    weight = high.sub_(peak).exp_()
    sums = (weight * l_i.index_select(0, slot).view_as(weight)).sum(1)
    parts = weighted.index_select(0, slot).view(queries, n, *weighted.shape[1:])
    out = parts.mul_(weight[..., None]).sum(1)
    out = out.div_(sums.masked_fill(sums == 0, 1.0)[..., None])
    return out, sums.log_().add_(peak[:, 0])


def _merge_gradients(tiles: Tiles, partial_dq: Tensor) -> Tensor:
    """Sums each query's parts of dq: ``[C*K, G*D]``."""
    picked = partial_dq.index_select(0, tiles.slot.flatten())
    return picked.view(*tiles.slot.shape, -1).sum(1)


def _tile_gradients(
    tiles: Tiles,
    q: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    k: Tensor,
    v: Tensor,
    dk: Tensor,
    dv: Tensor,
    plan: ChunkPlan,
    scale: float,
) -> Tensor:
    """Adds to dk and dv ``[K * total, L, …]``; returns each row's part of dq ``[rows, G*D]``."""
    m, G, D, V, dtype = plan.tile, lse.shape[1], k.shape[-1], v.shape[-1], k.dtype
    partial_dq = torch.empty(tiles.total * m + 1, G * D, dtype=lse.dtype, device=q.device)
    partial_dq[-1].zero_()
    buffers = _buffers(tiles.run, m * G, q, k, v)
    for run in runs(tiles):
        rows = slice(run.start * m, run.stop * m)
        query, block = tiles.rows[rows], tiles.block[run]
        q_t = _take(q, query, buffers[0]).view(-1, m * G, D)
        do_t = dout.index_select(0, query).view(-1, m * G, V)
        k_t, v_t = _take(k, block, buffers[1]), _take(v, block, buffers[2])
        p = _tile_scores(q_t, k_t, tiles.visible[run], scale)
        lse_t = lse.index_select(0, query)
        lse_t = lse_t.masked_fill_(tiles.visible[run].view(-1, 1) == 0, float("inf"))
        p.sub_(lse_t.view(-1, m * G, 1)).exp_()
        dv.index_add_(0, block, bmm(p.to(dtype).mT, do_t))
        ds = bmm(do_t, v_t.mT).sub_(delta.index_select(0, query).view(-1, m * G, 1))
        ds = ds.mul_(p).mul_(scale).to(dtype)
        partial_dq[rows] = bmm(ds, k_t).view(-1, G * D)
        dk.index_add_(0, block, bmm(ds.mT, q_t))
    return partial_dq
