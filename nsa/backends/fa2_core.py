"""What both FlashAttention-2 backends compute with: a differentiable call, and the selected branch.

B batch, T tokens, H query heads, K key/value heads, G heads per group, P head size after padding,
n listed blocks, L tokens of a block, m queries of a tile.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa.backends.contract import Problem
from nsa.backends.fa2_providers import NEG_INF, Call, Provider, provider
from nsa.backends.tiles import (
    Blocks,
    from_blocks,
    make_tiles,
    number_blocks,
    runs,
    to_blocks,
)
from nsa.config import NSAConfig
from nsa.errors import BackendUnavailable
from nsa.settings import Settings
from nsa.varlen import select_members

MAX_HEAD = 256
MAX_BATCH = 65_535
"""CUDA's limit on the grid dimension in which FA-2 puts the batch."""
CHUNK_TOKENS = 2048
"""Query tokens of a chunk at least; launches grow with the number of chunks."""
CHUNK_ELEMENTS = 2**27
"""Partial results of a chunk, 256 MiB of bf16, if it is longer than the least."""
TILE_ROWS = 128
"""Query rows that one FA-2 program takes."""
MAX_TILE = 32
"""Queries of a tile at most: more are rarely found on one block within a chunk."""


def why_not(problem: Problem, settings: Settings) -> str | None:
    """Why FlashAttention-2 cannot run a problem, as far as the two backends agree."""
    config = problem.config
    if max(config.head_dim, config.dv) > MAX_HEAD:
        size = max(config.head_dim, config.dv)
        return f"FlashAttention-2 takes head sizes up to {MAX_HEAD}, got {size}"
    try:
        provider(settings.fa2_provider, problem.device)
    except BackendUnavailable as error:
        return str(error)
    math = settings.fa2_provider == "math"
    if not math and problem.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention-2 takes float16 and bfloat16, got {problem.dtype}"
    return None


def pad_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Widens head sizes with zeros, which add nothing, to one multiple of 8."""
    size = max(-(-x.shape[-1] // 8) * 8 for x in tensors)
    return tuple(F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] != size else x for x in tensors)


class FlashAttention(torch.autograd.Function):
    """``(q, k, v, call, provider) -> out, lse``, one call of the provider each way."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call, source: Provider
    ) -> tuple[Tensor, Tensor]:
        out, lse = source.forward(q, k, v, call)
        ctx.save_for_backward(q, k, v, out, lse, call.cu_q, call.cu_k)
        ctx.call, ctx.source = replace(call, cu_q=None, cu_k=None), source
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
        call = replace(ctx.call, cu_q=cu_q, cu_k=cu_k)
        return (*ctx.source.backward(dout, q, k, v, out, lse, call), None, None)


class Own(NamedTuple):
    """The blocks that queries stand in, as causal attention of each block to itself."""

    call: Call
    lead: int
    """Empty places in front of the first query (regular)."""
    tail: int
    """Empty places behind the last (regular)."""
    first: int
    """The first key token (regular)."""

    def fold(self, x: Tensor, *, keys: bool = False) -> Tensor:
        """``[B, T, H, P]`` -> ``[B*J, L, H, P]``, or packed ``[T, H, P]``."""
        if self.call.cu_q is not None:
            return x[0]
        x = x[:, self.first :] if keys else x
        x = F.pad(x, (0, 0, 0, 0, 0 if keys else self.lead, self.tail)) if self._pads(keys) else x
        B, _, H, P = x.shape
        return x.reshape(-1, self.call.max_q, H, P) if x.numel() else x.reshape(0, 1, H, P)

    def _pads(self, keys: bool) -> bool:
        return self.tail > 0 or (self.lead > 0 and not keys)

    def unfold(self, x: Tensor, B: int, T: int, *, keys: bool = False) -> Tensor:
        """The inverse: ``[B, T, H, …]``; for keys, of those from ``first`` on."""
        if self.call.cu_q is not None:
            return x[None]
        x = x.reshape(B, x.shape[0] * x.shape[1] // B, *x.shape[2:])
        lead = 0 if keys else self.lead
        return x[:, lead : x.shape[1] - self.tail]


def own_blocks(
    q: Tensor, k: Tensor, config: NSAConfig, cu_seqlens: Tensor | None, q_start: int
) -> Own:
    """How the queries' own blocks are laid out."""
    size, scale = config.select_block, config.softmax_scale
    T = q.shape[1]
    if cu_seqlens is None:
        lead = q_start % size
        tail = -(lead + T) % size
        call = Call(scale=scale, causal=True, max_q=size, max_k=size)
        return Own(call, lead, tail, q_start - lead)
    block = select_members(cu_seqlens, T, config)
    starts = cu_seqlens.long()
    last = starts[(block.seq + 1).clamp_max(starts.numel() - 1)]
    ends = torch.minimum(starts[block.seq] + (block.rank + 1) * size, last)
    cu = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    return Own(Call(scale=scale, causal=True, cu_q=cu, cu_k=cu, max_q=size, max_k=size), 0, 0, 0)


class SelectedAttention(torch.autograd.Function):
    """``(q, k, v, block_idx, config, cu_seqlens, q_start, provider) -> out, lse``.

    The own block is one causal call over all blocks at once; earlier blocks, which a query sees
    whole, are tiles of queries against one block, without masks. All parts are merged by their
    log-sum-exp, and the backward runs each part with the merged output and log-sum-exp, which is
    exact: FA-2's own log-sum-exp carries no gradient. q, k and v have one head size, P.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_idx: Tensor,
        config: NSAConfig,
        cu_seqlens: Tensor | None,
        q_start: int,
        source: Provider,
    ) -> tuple[Tensor, Tensor]:
        B, T, H, P = q.shape
        K = k.shape[2]
        G = H // K
        blocks = number_blocks(q, k, config, cu_seqlens, q_start)
        lists = block_idx.flatten(0, 1)
        own = own_blocks(q, k, config, cu_seqlens, q_start)
        k_end = k[:, : q_start + T] if cu_seqlens is None else k
        v_end = v[:, : q_start + T] if cu_seqlens is None else v
        near, near_lse = source.forward(
            own.fold(q), own.fold(k_end, keys=True), own.fold(v_end, keys=True), own.call
        )
        near = own.unfold(near, B, T).reshape(B * T * K, G, P)
        near_lse = own.unfold(near_lse, B, T).reshape(B * T * K, G)
        near_lse = near_lse.masked_fill(~_lists_own(lists, blocks)[:, None], NEG_INF)
        k_blocks, v_blocks = to_blocks(k, blocks, k.dtype), to_blocks(v, blocks, v.dtype)
        q_rows = q.reshape(B * T * K, G * P)
        out, lse = torch.empty_like(near), torch.empty_like(near_lse)
        m, size = tile_queries(G), chunk_tokens(lists, G * P)
        for first in range(0, B * T, size):
            here = slice(first * K, min(first + size, B * T) * K)
            tiles = make_tiles(
                lists[first : first + size], blocks, first, m, MAX_BATCH, earlier_only=True
            )
            parts = near.new_zeros(tiles.total * m + 1, G, P)
            parts_lse = near_lse.new_full((tiles.total * m + 1, G), NEG_INF)
            for run in runs(tiles):
                rows = slice(run.start * m, run.stop * m)
                q_t = q_rows[here].index_select(0, tiles.rows[rows]).view(-1, m * G, 1, P)
                k_t = k_blocks.index_select(0, tiles.block[run])[:, :, None]
                v_t = v_blocks.index_select(0, tiles.block[run])[:, :, None]
                out_t, lse_t = source.forward(q_t, k_t, v_t, tile_call(config, m * G))
                parts[rows], parts_lse[rows] = out_t.view(-1, G, P), lse_t.view(-1, G)
            slot = tiles.slot.flatten()
            far_lse = parts_lse.index_select(0, slot).view(*tiles.slot.shape, G)
            lse[here] = torch.cat([far_lse, near_lse[here, None]], 1).logsumexp(1)
            whole = lse[here].masked_fill(lse[here] == NEG_INF, 0.0)
            far = parts.index_select(0, slot).view(*tiles.slot.shape, G, P)
            weighted = (far_lse - whole[:, None]).exp()[..., None] * far
            near_weight = (near_lse[here] - whole).exp()[..., None]
            out[here] = (weighted.sum(1) + near_weight * near[here]).to(out.dtype)
        out, lse = out.view(B, T, H, P), lse.view(B, T, H)
        ctx.save_for_backward(q, k, v, block_idx, cu_seqlens, out, lse)
        ctx.config, ctx.q_start, ctx.source = config, q_start, source
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, block_idx, cu_seqlens, out, lse = ctx.saved_tensors
        config, q_start, source = ctx.config, ctx.q_start, ctx.source
        B, T, H, P = q.shape
        K = k.shape[2]
        G = H // K
        dout = dout.contiguous()
        blocks = number_blocks(q, k, config, cu_seqlens, q_start)
        lists = block_idx.flatten(0, 1)
        own = own_blocks(q, k, config, cu_seqlens, q_start)
        k_end = k[:, : q_start + T] if cu_seqlens is None else k
        v_end = v[:, : q_start + T] if cu_seqlens is None else v
        near_lse = lse.view(B * T * K, G)
        near_lse = near_lse.masked_fill(~_lists_own(lists, blocks)[:, None], NEG_INF)
        dq_near, dk_near, dv_near = source.backward(
            own.fold(dout),
            own.fold(q),
            own.fold(k_end, keys=True),
            own.fold(v_end, keys=True),
            own.fold(out),
            _fold_lse(own, near_lse.view(B, T, H)),
            own.call,
        )
        dq = own.unfold(dq_near, B, T).reshape(B * T * K, G * P).to(lse.dtype)
        k_blocks, v_blocks = to_blocks(k, blocks, k.dtype), to_blocks(v, blocks, v.dtype)
        dk = torch.zeros_like(k_blocks, dtype=lse.dtype)
        dv = torch.zeros_like(v_blocks, dtype=lse.dtype)
        q_rows, dout_rows, out_rows = (x.reshape(B * T * K, G * P) for x in (q, dout, out))
        lse_rows = lse.view(B * T * K, G)
        m, size = tile_queries(G), chunk_tokens(lists, G * P)
        for first in range(0, B * T, size):
            here = slice(first * K, min(first + size, B * T) * K)
            tiles = make_tiles(
                lists[first : first + size], blocks, first, m, MAX_BATCH, earlier_only=True
            )
            shares = q.new_zeros(tiles.total * m + 1, G * P)
            for run in runs(tiles):
                rows = slice(run.start * m, run.stop * m)
                query, block = tiles.rows[rows], tiles.block[run]
                q_t, dout_t, out_t = (
                    x[here].index_select(0, query).view(-1, m * G, 1, P)
                    for x in (q_rows, dout_rows, out_rows)
                )
                lse_t = lse_rows[here].index_select(0, query)
                lse_t = lse_t.masked_fill(tiles.visible[run].reshape(-1, 1) == 0, NEG_INF)
                k_t = k_blocks.index_select(0, block)[:, :, None]
                v_t = v_blocks.index_select(0, block)[:, :, None]
                dq_t, dk_t, dv_t = source.backward(
                    dout_t,
                    q_t,
                    k_t,
                    v_t,
                    out_t,
                    lse_t.view(-1, m * G, 1),
                    tile_call(config, m * G),
                )
                shares[rows] = dq_t.view(-1, G * P)
                dk.index_add_(0, block, dk_t[:, :, 0].to(dk.dtype))
                dv.index_add_(0, block, dv_t[:, :, 0].to(dv.dtype))
            picked = shares.index_select(0, tiles.slot.flatten()).view(*tiles.slot.shape, G * P)
            dq[here] += picked.sum(1, dtype=dq.dtype)
        dk, dv = (
            from_blocks(dk, blocks, dk.new_empty(k.shape)),
            from_blocks(dv, blocks, dv.new_empty(v.shape)),
        )
        there = slice(own.first, q_start + T) if cu_seqlens is None else slice(None)
        dk, dv = dk.contiguous(), dv.contiguous()
        dk[:, there] += own.unfold(dk_near, B, T, keys=True)
        dv[:, there] += own.unfold(dv_near, B, T, keys=True)
        return dq.view(B, T, H, P).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *(None,) * 5


def chunk_tokens(lists: Tensor, per_pair: int) -> int:
    """Query tokens whose partial results are held at once; lists ``[B*T, K, n]``."""
    return max(CHUNK_TOKENS, CHUNK_ELEMENTS // (lists.shape[1] * lists.shape[2] * per_pair))


def tile_queries(G: int) -> int:
    """Queries of a tile, m."""
    return max(1, min(MAX_TILE, TILE_ROWS // G))


def tile_call(config: NSAConfig, rows: int) -> Call:
    """A tile of query rows against one whole block."""
    return Call(scale=config.softmax_scale, causal=False, max_q=rows, max_k=config.select_block)


def _fold_lse(own: Own, lse: Tensor) -> Tensor:
    """lse ``[B, T, H]`` like q; −inf in empty places."""
    if own.call.cu_q is not None:
        return lse[0]
    lse = F.pad(lse, (0, 0, own.lead, own.tail), value=NEG_INF)
    return lse.reshape(-1, own.call.max_q, lse.shape[-1])


def _lists_own(lists: Tensor, blocks: Blocks) -> Tensor:
    """bool ``[B*T*K]``: whether each query and key head lists the block it stands in."""
    own = (blocks.position // blocks.size)[:, None, None]
    return (lists == own).any(-1).flatten()
