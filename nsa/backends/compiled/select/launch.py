"""Selection (paper Eq. 8-12): the launch of :func:`.kernel.nsa_select_topn`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from nsa.backends.compiled.common import LOG2E, positive
from nsa.backends.compiled.select.kernel import nsa_select_topn
from nsa.backends.compiled.select.tiles import Constants, SelectTiles, select_tiles
from nsa.backends.compiled.tiling import launch_options, next_power_of_2, padded


def select_forward(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    start: Tensor | None,
    cmp_start: Tensor | None,
    compress_block: int,
    compress_stride: int,
    select_block: int,
    num_selected: int,
    num_initial: int,
    num_local: int,
    scale: float,
    q_start: int = 0,
    tiles: SelectTiles | None = None,
) -> Tensor:
    """The blocks each query selects; nothing of size T x N or T x J is stored.

    Args:
        q: ``[B, T, H, D]``, fp16, bf16 or fp32; query head h belongs to key head h // G.
        k_cmp: ``[B, N, K, D]``, keys of the compressed branch, same dtype; N may be 0. Rows that
            no query sees are read at most, never used.
        lse: fp32 ``[B, T, H]``, natural log, of the compressed branch; −inf where a query sees
            no block.
        start: None for a fixed-length batch; packed (B = 1): int32 ``[T]``, the first token of
            each token's sequence.
        cmp_start: packed: int32 ``[T]``, the row in k_cmp of that sequence's first block.
        compress_block, compress_stride, select_block: l, d and l' in tokens; d divides both
            others, l <= l'.
        num_selected, num_initial, num_local: n, and the blocks always selected at the start of
            the sequence and up to the query's own; together at most n.
        q_start: position of q's first row in its sequence; 0 when packed.
        tiles: overrides :func:`select_tiles`.

    Returns:
        int32 ``[B, T, K, n]``, strictly ascending, then −1; numbers count from the start of the
        query's own sequence.
    """
    B, T, H, D = q.shape
    N, K = k_cmp.shape[1], k_cmp.shape[2]
    G, n = H // K, num_selected
    block_idx = torch.empty(B, T, K, n, dtype=torch.int32, device=q.device)
    if block_idx.numel() == 0:
        return block_idx
    q, scale, _ = positive(q, scale)
    if tiles is None:
        tiles = select_tiles(q.dtype, G, D, n, triton.cdiv(q_start + T, select_block))
    block_group = next_power_of_2(G)
    C = Constants(
        G=G,
        D=D,
        COMPRESS_BLOCK=compress_block,
        COMPRESS_STRIDE=compress_stride,
        SELECT_BLOCK=select_block,
        NUM_SELECTED=n,
        NUM_INITIAL=num_initial,
        NUM_LOCAL=num_local,
        PACKED=start is not None,
        IEEE=q.dtype == torch.float32,
        TOKENS=max(1, tiles.rows // block_group),
        BLOCK_GROUP=block_group,
        BLOCK_N=max(16, tiles.blocks),
        BLOCK_D=padded(D),
        SLOTS=max(2, next_power_of_2(n)),
    )
    assert tiles.blocks >= C.SLOTS, f"expected at least {C.SLOTS} blocks, got {tiles.blocks}"
    assert (start is None) == (cmp_start is None)
    num_tiles = triton.cdiv(T, C.TOKENS)
    with torch.cuda.device_of(q):
        nsa_select_topn[(num_tiles * B * K,)](
            *(q, k_cmp, lse, block_idx),
            block_idx if start is None else start,  # not read
            block_idx if cmp_start is None else cmp_start,
            *(x.stride() for x in (q, k_cmp, lse)),
            *(T, N, K, num_tiles, q_start, scale if C.IEEE else scale * LOG2E),
            C=C,
            **launch_options(tiles.num_warps, tiles.num_stages, tiles.maxnreg),
        )
    return block_idx
