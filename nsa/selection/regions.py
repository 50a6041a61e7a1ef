"""Selection in two levels: only the best regions are ranked block by block (``select_regions``).

A region is r consecutive selection blocks; its key is the mean of the ``per = r*l'/d`` compressed
keys that begin in it. X batch times key/value heads, C rows of a chunk, d queries of a row, J
selection blocks, R regions, W of them with a score.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.config import NSAConfig
from nsa.core.dtypes import NEG_INF
from nsa.core.packing import block_offsets, counted_offsets, packed_items
from nsa.selection.rules import forced_blocks


def keys_per_region(config: NSAConfig) -> int:
    """Compressed blocks that begin in one region."""
    assert config.select_regions is not None
    return config.select_regions[0] * config.select_block // config.compress_stride


def region_keys(
    k_cmp: Tensor, config: NSAConfig, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """``[B, W, K, D]``, the mean keys of whole regions, from ``[B, N, K, D]``; surplus rows of
    packed sequences are undefined.

    Returns:
        the keys, and when packed int64 ``[n_seq + 1]``, the first region of each sequence.
    """
    per, N = keys_per_region(config), k_cmp.shape[1]
    if cu_seqlens is None:
        rows, offsets = k_cmp[:, : N // per * per].unflatten(1, (N // per, per)), None
    else:
        blocks = block_offsets(cu_seqlens, config)
        offsets = counted_offsets(blocks.diff().div(per, rounding_mode="floor"))
        region = packed_items(offsets, N // per)
        first = blocks[region.seq_id] + region.position * per
        index = first[:, None] + torch.arange(per, device=k_cmp.device)
        rows = k_cmp[:, index.clamp_max(max(0, N - 1))]
    return rows.mean(2, dtype=torch.float32).to(k_cmp.dtype), offsets


def searched_blocks(scores: Tensor, position: Tensor, J: int, config: NSAConfig) -> Tensor:
    """Blocks of the k best regions, of those with a forced block, and of those without a score.

    Args:
        scores: ``[X, C, d, W]``, not negative; what stands in a region that the query does not see
            whole is not read.
        position: int64 ``[C, d]`` or ``[X, C, d]``, of each query in its sequence.

    Returns:
        bool ``[X, C, d, J]``.
    """
    assert config.select_regions is not None
    r, k = config.select_regions
    R, W = -(-J // r), scores.shape[-1]
    _, forced = forced_blocks(position, R * r, config)
    region = torch.arange(R, device=scores.device)
    last = (region + 1) * r * config.select_block - config.compress_stride + config.compress_block
    ranked = (last - 1 <= position[..., None]) & ~forced.unflatten(-1, (R, r)).any(-1)
    scores = F.pad(scores, (0, max(0, R - W)))[..., :R].masked_fill(~ranked, NEG_INF)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    searched = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) | ~ranked
    return searched.repeat_interleave(r, -1)[..., :J]
