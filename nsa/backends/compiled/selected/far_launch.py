"""The forward and the dq of the selected branch where far blocks are taken key-stationary: launches
of :mod:`.far`, and of :mod:`.fwd` and :mod:`.bwd_dq` after it.

B batch, T query tokens, S key tokens, H query heads, K key/value heads, G heads per group, D key
size, V value size, n selected blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa.backends.compiled.common import LOG2E
from nsa.backends.compiled.selected.bwd_dq import nsa_selected_bwd_dq
from nsa.backends.compiled.selected.far import (
    Parts,
    nsa_selected_bwd_dq_far,
    nsa_selected_fwd_far,
)
from nsa.backends.compiled.selected.fwd import nsa_selected_fwd
from nsa.backends.compiled.selected.inverse_index import InverseIndex, inverse_index
from nsa.backends.compiled.selected.tiles import (
    QueryTiles,
    constants,
    part_bytes,
    part_slices,
)
from nsa.backends.compiled.selected.union import tile_unions
from nsa.backends.compiled.tiling import launch_options
from nsa.core.operators import BUILDING


class _Slice(NamedTuple):
    """Tokens of some batch rows, whose heads are taken so many at a time."""

    rows: tuple[slice, slice]
    """Of the batch, and tokens."""
    q_start: int
    heads: list[tuple[int, int]]
    """The first (``b*K + kv_head``) and how many."""
    inverse: InverseIndex | None
    """None: no block is far."""
    unions: tuple[Any, ...]
    num_tiles: int
    parts: Parts


def _slices(
    q: Tensor,
    block_idx: Tensor,
    *,
    size: int,
    key_rows: int,
    start: Tensor | None,
    select_block: int,
    q_start: int,
    sequences: int | None,
    tiles: QueryTiles,
    with_lse: bool,
) -> Iterator[_Slice]:
    """As many heads at a time as parts of ``size`` have room for, or as many tokens of one."""
    far = tiles.far
    assert far is not None
    (B, T, K, n), G = block_idx.shape, q.shape[2] // block_idx.shape[2]
    num_tokens, num_heads = T, B * K
    # a rehearsal stands for somewhat longer sequences, too
    beyond = far.since - BUILDING.get()
    if q_start + T > beyond:  # else no block is far
        token = part_bytes(n, G, size, q.itemsize)
        num_tokens, num_heads = part_slices(B, T, K, token=token, width=n, room=far.room)
    for b in [slice(b, b + 1) for b in range(B)] if num_tokens < T else [slice(0, B)]:
        for first in range(0, T, num_tokens):
            t = slice(first, first + num_tokens)
            lists = block_idx[b, t].contiguous()
            where: dict[str, Any] = {
                "start": None if start is None else start[t],
                "select_block": select_block,
                "q_start": q_start + first,
                "key_rows": key_rows,
                "since": far.since,
            }
            unions = tile_unions(lists, tokens=tiles.tokens, **where)
            index = None
            shape = 0, lists.shape[1], n, G
            if q_start + first + lists.shape[1] > beyond:
                shape = num_heads, *shape[1:]
                index = inverse_index(
                    lists, chunk=far.chunk, sequences=sequences, heads=num_heads, **where
                )
            lse = torch.empty(shape, dtype=torch.float32, device=q.device) if with_lse else None
            sums = torch.empty(*shape, size, dtype=q.dtype, device=q.device)
            count = lists.shape[0] * K
            yield _Slice(
                (b, t),
                q_start + first,
                [(head, min(num_heads, count - head)) for head in range(0, count, num_heads)],
                index,
                unions[1:],
                unions.counts.shape[1],
                Parts(sums, lse, lists, where["start"]),
            )


def forward_with_far_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    tiles: QueryTiles,
    **where: Any,
) -> None:
    """Writes out and lse, arguments and results of :func:`.launch.selected_forward`; q, k and v
    have contiguous rows."""
    S, K, V = v.shape[1:]
    far, block = tiles.far, where["select_block"]
    assert far is not None
    common: dict[str, Any] = {"size": V, "key_rows": S, "tiles": tiles, "with_lse": True}
    for x in _slices(q, block_idx, **common, **where):
        rows, b = x.rows, x.rows[0]
        tensors = q[rows], k[b], v[b]
        T, strides = tensors[0].shape[1], [y.stride() for y in tensors]
        for first, heads in x.heads:
            if x.inverse is not None:
                nsa_selected_fwd_far[(x.inverse.max_chunks,)](
                    *(*tensors, x.parts.sums, x.parts.lse, _lists(x.inverse)),
                    *strides,
                    *(T, S, first, heads, K, x.inverse.num_blocks, scale * LOG2E),
                    BLOCK_PITCH=x.inverse.block_pitch,
                    C=constants(q, v, block_idx, block, far),
                    **launch_options(far.num_warps, far.num_stages, far.maxnreg),
                )
            nsa_selected_fwd[(heads * x.num_tiles,)](
                *(*tensors, out[rows], lse[rows], x.unions, tuple(x.parts)),
                *strides,
                *(T, x.num_tiles, S, x.q_start, first, K, scale * LOG2E),
                SINCE=far.since,
                C=constants(q, v, block_idx, block, tiles),
                **launch_options(tiles.num_warps, tiles.num_stages),
            )


def dq_with_far_blocks(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    weight: Tensor | None,
    dq: Tensor,
    block_idx: Tensor,
    *,
    scale: float,
    tiles: QueryTiles,
    **where: Any,
) -> None:
    """Adds to dq, arguments as of :func:`.launch.selected_dq`; those of rows have contiguous
    ones."""
    S, K = v.shape[1:3]
    far, block = tiles.far, where["select_block"]
    assert far is not None
    common: dict[str, Any] = {"size": q.shape[3], "key_rows": S, "tiles": tiles}
    common["with_lse"] = False
    weighted = {"WEIGHTED": weight is not None}
    for x in _slices(q, block_idx, **common, **where):
        rows, b = x.rows, x.rows[0]
        tensors = q[rows], k[b], v[b], dout[rows]
        of_rows = [lse[rows], delta[rows], (delta if weight is None else weight)[rows]]
        T, strides = tensors[0].shape[1], [y.stride() for y in tensors]
        for first, heads in x.heads:
            if x.inverse is not None:
                nsa_selected_bwd_dq_far[(x.inverse.max_chunks,)](
                    *(*tensors, tuple(of_rows), x.parts.sums, _lists(x.inverse)),
                    *strides,
                    *(T, S, first, heads, K, x.inverse.num_blocks, scale * LOG2E, scale),
                    BLOCK_PITCH=x.inverse.block_pitch,
                    **weighted,
                    C=constants(q, v, block_idx, block, far),
                    **launch_options(far.num_warps, far.num_stages, far.maxnreg),
                )
            nsa_selected_bwd_dq[(heads * x.num_tiles,)](
                *(*tensors, dq[rows], *of_rows, dq[rows], x.unions, tuple(x.parts)),
                *strides,
                *(T, x.num_tiles, S, x.q_start, first, K, scale * LOG2E, scale),
                ACCUMULATE=True,
                **weighted,
                SINCE=far.since,
                C=constants(q, v, block_idx, block, tiles),
                **launch_options(tiles.num_warps, tiles.num_stages),
            )


def _lists(index: InverseIndex) -> tuple[Tensor | None, ...]:
    return index.block_ids, index.offsets, index.head_chunks, index.tokens
