"""The selected branch of the FlashAttention-2 backends.

The own block of every query is one causal call over all blocks at once. Earlier blocks, which a
query sees whole, are tiles of queries against one block, without masks (:mod:`.tiles`). All parts
are merged by their log-sum-exp, and the backward runs each part with the merged output and
log-sum-exp, which is exact: FA-2's own log-sum-exp carries no gradient.

B batch, T tokens, H query heads, K key/value heads, G heads per group, P head size (one for keys
and values), n listed blocks, L tokens of a block, m queries of a tile, C queries of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.backends.fa2.calls import Call, readable
from nsa.backends.fa2.providers import provider
from nsa.backends.shared.block_tiles import (
    Blocks,
    Tiles,
    from_blocks,
    make_tiles,
    number_blocks,
    runs,
    to_blocks,
)
from nsa.backends.shared.workspace import Kind, Space, Store
from nsa.config import NSAConfig
from nsa.core import flops
from nsa.core.dtypes import NEG_INF
from nsa.core.geometry import block_size
from nsa.core.operators import config_of, define_attention
from nsa.core.packing import packed_select_blocks

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


class Packing(NamedTuple):
    """What forward and backward pack alike."""

    blocks: Blocks
    lists: Tensor
    """int32 ``[B*T, K, n]``"""
    k_blocks: Tensor
    """``[K * total, L, P]``"""
    v_blocks: Tensor
    m: int
    """Queries of a tile."""
    space: Space

    def chunks(self, G: int) -> Iterator[tuple[slice, Tiles]]:
        """Rows ``[B*T*K]`` of each chunk of queries, and its tiles."""
        total, K, n = self.lists.shape
        size = chunk_tokens(self.lists, G * self.k_blocks.shape[-1])
        for first in range(0, total, size):
            end = min(first + size, total)
            tiles = make_tiles(
                self.lists[first:end],
                self.blocks,
                first,
                self.m,
                MAX_BATCH,
                earlier_only=True,
                space=self.space,
            )
            yield slice(first * K, end * K), tiles

    def take(self, name: str, x: Tensor, index: Tensor, kind: Kind = "rows") -> Tensor:
        """``x[index]`` in the workspace; of blocks, each token counts as a key."""
        unit = x.shape[1] if kind == "keys" else 1
        lead = (index.numel() * unit, x[0].numel() // unit if x.shape[0] else 0)
        room = self.space.take(name, lead, x.dtype, x.device, kind)
        room = room.view(index.numel(), *x.shape[1:])
        return torch.index_select(x, 0, index, out=room)

    def room(self, name: str, rows: int, *shape: int, dtype: torch.dtype) -> Tensor:
        """An empty buffer of that many rows."""
        return self.space.take(name, (rows, *shape), dtype, self.lists.device, "rows")


def pack(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None,
    q_start: int,
    space: Space,
) -> Packing:
    """Numbers the blocks and lays keys and values out in them."""
    blocks = number_blocks(q, k, config, cu_seqlens, q_start)
    return Packing(
        blocks,
        block_idx.flatten(0, 1),
        to_blocks(k, blocks, k.dtype, space, "k_blocks"),
        to_blocks(v, blocks, v.dtype, space, "v_blocks"),
        tile_queries(q.shape[2] // k.shape[2]),
        space,
    )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    cu_seqlens: Tensor | None,
    key: str,
    q_start: int,
    source: str,
    workspace: list[int],
) -> tuple[Tensor, Tensor]:
    """q ``[B, T, H, P]``, k and v ``[B, S, K, P]`` -> out ``[B, T, H, P]``, lse ``[B, T, H]``."""
    config, fa2 = config_of(key), provider(source, q.device)
    B, T, H, P = q.shape
    K = k.shape[2]
    G = H // K
    q, k, v = map(readable, (q, k, v))
    with Store.of(workspace).lease(q.device) as space:
        packing = pack(q, k, v, block_idx, config, cu_seqlens, q_start, space)
        own = diagonal_blocks(q, k, config, cu_seqlens, q_start)
        diag, diag_lse = fa2.forward(*own.fold_all(q, k, v), own.call)
        diag = own.unfold(diag, B, T).reshape(B * T * K, G, P)
        diag_lse = own.unfold(diag_lse, B, T).reshape(B * T * K, G)
        diag_lse = diag_lse.masked_fill(~_lists_own(packing)[:, None], NEG_INF)
        q_rows = q.reshape(B * T * K, G * P)
        out, lse = torch.empty_like(diag), torch.empty_like(diag_lse)
        m = packing.m
        call = tile_call(config, m * G, packing.blocks.size)
        for here, tiles in packing.chunks(G):
            parts = packing.room("parts", tiles.total * m + 1, G, P, dtype=q.dtype)
            parts_lse = packing.room("parts_lse", tiles.total * m + 1, G, dtype=lse.dtype)
            parts[-1:].zero_()
            parts_lse[-1:].fill_(NEG_INF)
            for run in runs(tiles):
                rows, block = slice(run.start * m, run.stop * m), tiles.block[run]
                q_t = packing.take("q", q_rows[here], tiles.rows[rows]).view(-1, m * G, 1, P)
                k_t = packing.take("k", packing.k_blocks, block, "keys")[:, :, None]
                v_t = packing.take("v", packing.v_blocks, block, "keys")[:, :, None]
                out_t, lse_t = fa2.forward(q_t, k_t, v_t, call)
                parts[rows], parts_lse[rows] = out_t.view(-1, G, P), lse_t.view(-1, G)
            slot = tiles.slot.flatten()
            off_diag = packing.take("far", parts, slot).view(*tiles.slot.shape, G, P)
            off_diag_lse = packing.take("far_lse", parts_lse, slot).view(*tiles.slot.shape, G)
            lse[here] = torch.cat([off_diag_lse, diag_lse[here, None]], 1).logsumexp(1)
            whole = lse[here].masked_fill(lse[here] == NEG_INF, 0.0)
            weighted = (off_diag_lse - whole[:, None]).exp()[..., None] * off_diag
            diag_weight = (diag_lse[here] - whole).exp()[..., None]
            out[here] = (weighted.sum(1) + diag_weight * diag[here]).to(out.dtype)
    return out.view(B, T, H, P), lse.view(B, T, H)


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
    source: str,
    workspace: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes and dtypes of q, k, v."""
    config, fa2 = config_of(key), provider(source, q.device)
    B, T, H, P = q.shape
    K = k.shape[2]
    G = H // K
    dout, q, k, v = map(readable, (dout, q, k, v))
    with Store.of(workspace).lease(q.device) as space:
        packing = pack(q, k, v, block_idx, config, cu_seqlens, q_start, space)
        own = diagonal_blocks(q, k, config, cu_seqlens, q_start)
        diag_lse = lse.view(B * T * K, G)
        diag_lse = diag_lse.masked_fill(~_lists_own(packing)[:, None], NEG_INF)
        dq_diag, dk_diag, dv_diag = fa2.backward(
            own.fold(dout),
            *own.fold_all(q, k, v),
            own.fold(out),
            _fold_lse(own, diag_lse.view(B, T, H)),
            own.call,
        )
        dq = own.unfold(dq_diag, B, T).reshape(B * T * K, G * P).to(lse.dtype)
        dk = torch.zeros_like(packing.k_blocks, dtype=lse.dtype)
        dv = torch.zeros_like(packing.v_blocks, dtype=lse.dtype)
        q_rows, dout_rows, out_rows = (x.reshape(B * T * K, G * P) for x in (q, dout, out))
        lse_rows = lse.view(B * T * K, G)
        m = packing.m
        call = tile_call(config, m * G, packing.blocks.size)
        for here, tiles in packing.chunks(G):
            partial_dq = packing.room("parts", tiles.total * m + 1, G * P, dtype=q.dtype)
            partial_dq[-1:].zero_()
            for run in runs(tiles):
                rows, block = slice(run.start * m, run.stop * m), tiles.block[run]
                query = tiles.rows[rows]
                q_t, dout_t, out_t = (
                    packing.take(name, x[here], query).view(-1, m * G, 1, P)
                    for name, x in (("q", q_rows), ("dout", dout_rows), ("out", out_rows))
                )
                lse_t = packing.take("lse", lse_rows[here], query)
                lse_t.masked_fill_(tiles.visible[run].reshape(-1, 1) == 0, NEG_INF)
                k_t = packing.take("k", packing.k_blocks, block, "keys")[:, :, None]
                v_t = packing.take("v", packing.v_blocks, block, "keys")[:, :, None]
                lse_t = lse_t.view(-1, m * G, 1)
                dq_t, dk_t, dv_t = fa2.backward(dout_t, q_t, k_t, v_t, out_t, lse_t, call)
                partial_dq[rows] = dq_t.view(-1, G * P)
                dk.index_add_(0, block, dk_t[:, :, 0].to(dk.dtype))
                dv.index_add_(0, block, dv_t[:, :, 0].to(dv.dtype))
            picked = packing.take("far", partial_dq, tiles.slot.flatten())
            dq[here] += picked.view(*tiles.slot.shape, G * P).sum(1, dtype=dq.dtype)
        dk = from_blocks(dk, packing.blocks, dk.new_empty(k.shape)).contiguous()
        dv = from_blocks(dv, packing.blocks, dv.new_empty(v.shape)).contiguous()
        there = slice(own.first, q_start + T) if cu_seqlens is None else slice(None)
        dk[:, there] += own.unfold(dk_diag, B, T, keys=True)
        dv[:, there] += own.unfold(dv_diag, B, T, keys=True)
    return dq.view(B, T, H, P).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


_SELECTED = define_attention(
    "fa2_selected",
    "Tensor block_idx, Tensor? cu_seqlens, str config, SymInt q_start, str source, int[] workspace",
    _forward,
    _backward,
    flops.selected,
)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None,
    q_start: int,
    source: str,
    store: Store,
) -> tuple[Tensor, Tensor]:
    """The selected branch by the provider of that name; q, k and v have one head size."""
    call = (block_idx, cu_seqlens, config.key, q_start, source, store.numbers)
    return _SELECTED(q, k, v, *call)


def chunk_tokens(lists: Tensor, per_pair: int) -> int:
    """Query tokens whose partial results are held at once; lists ``[B*T, K, n]``."""
    return max(CHUNK_TOKENS, CHUNK_ELEMENTS // (lists.shape[1] * lists.shape[2] * per_pair))


def tile_queries(G: int) -> int:
    """Queries of a tile, m."""
    return max(1, min(MAX_TILE, TILE_ROWS // G))


def tile_call(config: NSAConfig, rows: int, keys: int) -> Call:
    """A tile of query rows against the keys of one whole block."""
    return Call(scale=config.softmax_scale, causal=False, max_q=rows, max_k=keys)


class DiagonalBlocks(NamedTuple):
    """The blocks that queries stand in, as causal attention of each block to itself."""

    call: Call
    lead: int
    """Empty slots in front of the first query (regular)."""
    tail: int
    """Empty slots behind the last (regular)."""
    first: int
    """The first key token (regular)."""
    last: int
    """The token past the last key (regular)."""

    def fold_all(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, and the keys and values of the blocks that queries stand in."""
        return self.fold(q), self.fold(k, keys=True), self.fold(v, keys=True)

    def fold(self, x: Tensor, *, keys: bool = False) -> Tensor:
        """``[B, T, H, P]`` -> ``[B*J, L, H, P]``, or packed ``[T, H, P]``."""
        if self.call.cu_q is not None:
            return x[0]
        x = x[:, self.first : self.last] if keys else x
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


def diagonal_blocks(
    q: Tensor, k: Tensor, config: NSAConfig, cu_seqlens: Tensor | None, q_start: int
) -> DiagonalBlocks:
    """How the queries' own blocks are laid out."""
    T, scale = q.shape[1], config.softmax_scale
    size = block_size(k.shape[1], config)
    if cu_seqlens is None:
        lead = q_start % size
        tail = -(lead + T) % size
        call = Call(scale=scale, causal=True, max_q=size, max_k=size)
        return DiagonalBlocks(call, lead, tail, q_start - lead, q_start + T)
    block = packed_select_blocks(cu_seqlens, T, size)
    starts = cu_seqlens.long()
    last = starts[(block.seq_id + 1).clamp_max(starts.numel() - 1)]
    ends = torch.minimum(starts[block.seq_id] + (block.position + 1) * size, last)
    cu = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    call = Call(scale=scale, causal=True, cu_q=cu, cu_k=cu, max_q=size, max_k=size)
    return DiagonalBlocks(call, 0, 0, 0, T)


def _fold_lse(own: DiagonalBlocks, lse: Tensor) -> Tensor:
    """lse ``[B, T, H]`` like q; −inf in empty slots."""
    if own.call.cu_q is not None:
        return lse[0]
    lse = F.pad(lse, (0, 0, own.lead, own.tail), value=NEG_INF)
    return lse.reshape(-1, own.call.max_q, lse.shape[-1])


def _lists_own(packing: Packing) -> Tensor:
    """bool ``[B*T*K]``: whether each query and key head lists the block it stands in."""
    own = (packing.blocks.position // packing.blocks.size)[:, None, None]
    return (packing.lists == own).any(-1).flatten()
