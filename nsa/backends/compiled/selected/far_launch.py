"""The forward of the selected branch where far blocks are taken key-stationary: launches of
:mod:`.far` and :mod:`.fwd`.

B batch, T query tokens, S key tokens, H query heads, K key/value heads, G heads per group, D key
size, V value size, n selected blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa.backends.compiled.common import LOG2E
from nsa.backends.compiled.selected.far import Parts, nsa_selected_fwd_far
from nsa.backends.compiled.selected.fwd import nsa_selected_fwd
from nsa.backends.compiled.selected.inverse_index import inverse_index
from nsa.backends.compiled.selected.tiles import (
    FarTiles,
    QueryTiles,
    constants,
    part_bytes,
    part_slices,
)
from nsa.backends.compiled.selected.union import tile_unions
from nsa.backends.compiled.tiling import launch_options


def forward_with_far_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    start: Tensor | None,
    q_start: int,
    tiles: QueryTiles,
    far: FarTiles,
    **call: Any,
) -> None:
    """Writes out and lse, arguments and results of :func:`.launch.selected_forward`; q, k and v
    have contiguous rows.

    Parts have room for so many heads, or for so many tokens of one head, at a time.
    """
    B, T = q.shape[:2]
    K, V, n = *v.shape[2:], block_idx.shape[3]
    token = part_bytes(n, q.shape[2] // K, V, q.itemsize)
    num_tokens, num_heads = T, B * K
    if q_start + T > far.since:  # else no block is far
        num_tokens, num_heads = part_slices(B, T, K, token=token, width=n, room=far.room)
    batch_rows = [slice(b, b + 1) for b in range(B)] if num_tokens < T else [slice(0, B)]
    for b in batch_rows:
        for first in range(0, T, num_tokens):
            t = slice(first, first + num_tokens)
            _forward(
                *(q[b, t], k[b], v[b], block_idx[b, t].contiguous(), out[b, t], lse[b, t]),
                start=None if start is None else start[t],
                q_start=q_start + first,
                num_heads=num_heads,
                tiles=tiles,
                far=far,
                **call,
            )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    start: Tensor | None,
    select_block: int,
    scale: float,
    q_start: int,
    sequences: int | None,
    num_heads: int,
    tiles: QueryTiles,
    far: FarTiles,
) -> None:
    """So many batch rows times key/value heads at a time."""
    (B, T), S, (K, V) = q.shape[:2], k.shape[1], v.shape[2:]
    G, n = q.shape[2] // K, block_idx.shape[3]
    where: dict[str, Any] = {"start": start, "select_block": select_block, "q_start": q_start}
    where |= {"key_rows": S, "since": far.since}
    unions = tile_unions(block_idx, tokens=tiles.tokens, **where)
    num_tiles = unions.counts.shape[1]
    strides = [x.stride() for x in (q, k, v)]
    index = None
    if q_start + T > far.since:
        where |= {"chunk": far.chunk, "sequences": sequences, "heads": num_heads}
        index = inverse_index(block_idx, **where)
    shape = (num_heads if index else 0), T, n, G
    parts = Parts(
        torch.empty(*shape, V, dtype=q.dtype, device=q.device),
        torch.empty(shape, dtype=torch.float32, device=q.device),
        *(block_idx, start),
    )
    for first in range(0, B * K, num_heads):
        heads = min(num_heads, B * K - first)
        if index is not None:
            nsa_selected_fwd_far[(index.max_chunks,)](
                *(q, k, v, parts.out, parts.lse),
                (index.block_ids, index.offsets, index.head_chunks, index.tokens),
                *strides,
                *(T, S, first, heads, K, index.num_blocks, scale * LOG2E),
                BLOCK_PITCH=index.block_pitch,
                C=constants(q, v, block_idx, select_block, far),
                **launch_options(far.num_warps, far.num_stages, far.maxnreg),
            )
        nsa_selected_fwd[(heads * num_tiles,)](
            *(q, k, v, out, lse),
            *(unions[1:], parts),
            *strides,
            *(T, num_tiles, S, q_start, first, K, scale * LOG2E),
            SINCE=far.since,
            C=constants(q, v, block_idx, select_block, tiles),
            **launch_options(tiles.num_warps, tiles.num_stages),
        )
