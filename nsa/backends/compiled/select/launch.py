"""Selection (paper Eq. 8-12): the launches of :func:`.kernel.nsa_select_topn`, and with regions of
:func:`.regions.nsa_select_in_regions`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from nsa.backends.compiled.common import LOG2E, positive
from nsa.backends.compiled.select.kernel import nsa_select_topn
from nsa.backends.compiled.select.regions import nsa_select_in_regions
from nsa.backends.compiled.select.tiles import (
    Constants,
    SearchTiles,
    SelectTiles,
    search_tiles,
    select_tiles,
)
from nsa.backends.compiled.tiling import (
    capability_of,
    head_columns,
    launch_options,
    next_power_of_2,
)
from nsa.config import NSAConfig
from nsa.core.packing import block_offsets, packed_tokens, sequence_starts
from nsa.selection.fp8 import quantize
from nsa.selection.regions import region_keys
from nsa.selection.rules import least_mass, width
from nsa.selection.share import leading_tokens


class Queries(NamedTuple):
    """The rows of a launch."""

    q: Tensor
    lse: Tensor
    scale: float
    q_start: int
    leaders: int
    """Tokens that lead, L; packed: at most so many."""
    leader: Tensor | None
    """Packed, with ``select_share``: int32 ``[L + 1]``, those tokens, then T."""
    start: Tensor | None
    """Packed: int32 ``[T]``, the first token of each token's sequence."""
    seq_id: Tensor | None
    """Packed: int64 ``[T]``."""


class Keys(NamedTuple):
    """The keys of a launch: of compressed blocks, or of regions."""

    k: Tensor
    offsets: Tensor | None
    """Packed: int64 ``[n_seq + 1]``, the first row of each sequence."""
    scale: Tensor | None = None
    """fp32 ``[B, N, K]``, of e4m3 keys."""


_FP8_HEAD = 32
"""A matrix product of e4m3 takes at least so many columns."""


def select_forward(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None = None,
    *,
    q_start: int = 0,
    longest: int | None = None,
    tiles: SelectTiles | None = None,
    search: SearchTiles | None = None,
) -> Tensor:
    """The blocks each query selects; nothing of size T x N or T x J is stored.

    Args:
        q: ``[B, T, H, D]``, fp16, bf16 or fp32; query head h belongs to key head h // G.
        k_cmp: ``[B, N, K, D]``, keys of the compressed branch, same dtype; N may be 0. Rows that
            no query sees are read at most, never used.
        lse: fp32 ``[B, T, H]``, natural log, of the compressed branch; −inf where a query sees
            no block.
        config: the geometry and the options of selection.
        cu_seqlens: None for a fixed-length batch; packed (B = 1): int32 ``[n_seq + 1]``.
        q_start: position of q's first row in its sequence, a multiple of ``select_share``; 0 when
            packed.
        longest: bounds the position past the last query of any sequence; None: ``q_start + T``.
        tiles, search: override :func:`select_tiles` and :func:`search_tiles`.

    Returns:
        int32 ``[B, T, K, n]``, strictly ascending, then −1; numbers count from the start of the
        query's own sequence.
    """
    B, T = q.shape[:2]
    longest = q_start + T if longest is None else longest
    K, n = k_cmp.shape[2], width(longest, config)
    block_idx = torch.empty(B, T, K, n, dtype=torch.int32, device=q.device)
    if block_idx.numel() == 0:
        return block_idx
    q, scale, _ = positive(q, config.softmax_scale)
    queries = _queries(q, lse, scale, config, cu_seqlens, q_start)
    offsets = None if cu_seqlens is None else block_offsets(cu_seqlens, config)
    keys = Keys(k_cmp, offsets)
    C = _constants(q, K, n, config, packed=cu_seqlens is not None)
    of_regions = None
    if config.select_regions is not None:
        of_regions = Keys(*region_keys(k_cmp, config, cu_seqlens))
    if config.score_dtype == "fp8":
        k, scales = quantize(k_cmp)
        keys = keys._replace(k=k, scale=scales.contiguous())
    with torch.cuda.device_of(q):
        if of_regions is None:
            _launch_topn(queries, keys, block_idx, C, tiles)
        else:
            shape = B, queries.leaders, K, C.NUM_REGIONS
            regions = torch.empty(shape, dtype=torch.int32, device=q.device)
            _launch_topn(queries, of_regions, regions, _of_regions(C), tiles)
            _launch_search(queries, keys, regions, block_idx, C, search)
    return block_idx


def _launch_topn(
    queries: Queries, keys: Keys, lists: Tensor, C: Constants, tiles: SelectTiles | None
) -> None:
    if tiles is None:
        blocks = triton.cdiv(queries.q_start + queries.q.shape[1], C.SELECT_BLOCK)
        sizes = C.G, C.D, C.NUM_SELECTED, blocks
        capability = capability_of(queries.q.device)
        tiles = select_tiles(queries.q.dtype, *sizes, fp8=C.FP8, capability=capability)
    assert tiles.blocks >= C.SLOTS, f"expected at least {C.SLOTS} blocks, got {tiles.blocks}"
    C = replace(C, TOKENS=max(1, tiles.rows // C.BLOCK_GROUP), BLOCK_N=max(16, tiles.blocks))
    num_tiles = triton.cdiv(queries.leaders, C.TOKENS)
    grid = (num_tiles * keys.k.shape[0] * keys.k.shape[2],)
    nsa_select_topn[grid](
        *_arguments(queries, keys, C),
        *(num_tiles, lists),
        C=C,
        **launch_options(tiles.num_warps, tiles.num_stages, tiles.maxnreg),
    )


def _launch_search(
    queries: Queries,
    keys: Keys,
    regions: Tensor,
    block_idx: Tensor,
    C: Constants,
    tiles: SearchTiles | None,
) -> None:
    tiles = tiles or search_tiles(queries.q.dtype)
    chunk = max(tiles.keys, tiles.chunk, next_power_of_2(C.keys_of(1)))
    C = replace(C, BLOCK_GROUP=max(16, C.BLOCK_GROUP), BLOCK_N=tiles.keys, CHUNK=chunk)
    nsa_select_in_regions[(regions.shape[:3].numel(),)](
        *_arguments(queries, keys, C),
        *(regions, block_idx),
        C=C,
        **launch_options(tiles.num_warps, tiles.num_stages, tiles.maxnreg),
    )


def _arguments(queries: Queries, keys: Keys, C: Constants) -> tuple[Any, ...]:
    """What both kernels begin with."""
    q, lse, k = queries.q, queries.lse.contiguous(), keys.k
    cmp_start = None
    if keys.offsets is not None:
        cmp_start = keys.offsets[queries.seq_id].to(torch.int32)
    scale = queries.scale if C.IEEE else queries.scale * LOG2E
    return (
        *(q, lse, k, keys.scale, queries.leader, queries.start, cmp_start),
        *(x.stride() for x in (q, k)),
        *(q.shape[1], queries.leaders, k.shape[1], k.shape[2], queries.q_start, scale),
    )


def _queries(
    q: Tensor,
    lse: Tensor,
    scale: float,
    config: NSAConfig,
    cu_seqlens: Tensor | None,
    q_start: int,
) -> Queries:
    T = q.shape[1]
    leaders = triton.cdiv(T, config.select_share)
    if cu_seqlens is None:
        return Queries(q, lse, scale, q_start, leaders, None, None, None)
    token, leader = packed_tokens(cu_seqlens, T), None
    if config.select_share > 1:
        leader = leading_tokens(T, config, cu_seqlens).to(torch.int32)
        leaders = leader.shape[0] - 1
    start = sequence_starts(cu_seqlens, T)
    return Queries(q, lse, scale, q_start, leaders, leader, start, token.seq_id)


def _constants(q: Tensor, K: int, n: int, config: NSAConfig, *, packed: bool) -> Constants:
    """Those of the exact pass, but for its tiles."""
    G, D = q.shape[2] // K, q.shape[3]
    r, count = config.select_regions or (0, 0)
    ieee, fp8 = q.dtype == torch.float32, config.score_dtype == "fp8"
    return Constants(
        G=G,
        D=D,
        COMPRESS_BLOCK=config.compress_block,
        COMPRESS_STRIDE=config.compress_stride,
        SELECT_BLOCK=config.select_block,
        NUM_SELECTED=n,
        NUM_INITIAL=config.num_initial,
        NUM_LOCAL=config.num_local,
        PACKED=packed,
        IEEE=ieee,
        TOKENS=1,
        BLOCK_GROUP=next_power_of_2(G),
        BLOCK_N=16,
        BLOCK_D=head_columns(D, least=_FP8_HEAD) if fp8 else head_columns(D),
        SLOTS=max(2, next_power_of_2(n)),
        SHARE=config.select_share,
        SCHEDULE=tuple(reversed(config.select_schedule or ())),
        ENOUGH=least_mass(config),
        FP8=fp8,
        REGION=r,
        NUM_REGIONS=count,
    )


def _of_regions(C: Constants) -> Constants:
    """Those of the pass that ranks regions, one key each, which is seen late."""
    size = C.REGION * C.SELECT_BLOCK
    return replace(
        C,
        COMPRESS_BLOCK=size + C.COMPRESS_BLOCK - C.COMPRESS_STRIDE,
        COMPRESS_STRIDE=size,
        SELECT_BLOCK=size,
        NUM_SELECTED=C.NUM_REGIONS,
        NUM_INITIAL=triton.cdiv(C.NUM_INITIAL, C.REGION),
        BLOCK_D=head_columns(C.D),
        SLOTS=max(2, next_power_of_2(C.NUM_REGIONS)),
        SCHEDULE=(),
        ENOUGH=None,
        FP8=False,
    )
