"""Which blocks a query reads: scores from the compressed branch, then the top n (paper §3.3.2).

B batch, T query tokens, N compressed blocks, J selection blocks, H query heads,
K key/value heads, G heads per group, D key size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.config import NSAConfig
from nsa.reference.attend import probabilities
from nsa.reference.masks import compressed_mask
from nsa.reference.packing import spans


def overlap(i: int, j: int, config: NSAConfig) -> int:
    """Tokens that compressed block i and selection block j share."""
    start = max(i * config.compress_stride, j * config.select_block)
    end = min(i * config.compress_stride + config.compress_block, (j + 1) * config.select_block)
    return max(0, end - start)


def overlap_matrix(N: int, J: int, config: NSAConfig) -> Tensor:
    """``[N, J]``, the tokens that each compressed block shares with each selection block."""
    rows = [[overlap(i, j, config) for j in range(J)] for i in range(N)]
    return torch.tensor(rows, dtype=torch.int64).reshape(N, J)


def selection_scores(q: Tensor, k_cmp: Tensor, config: NSAConfig, *, q_start: int = 0) -> Tensor:
    """Scores of one regular batch, summed over the heads of a group (Eq. 8–10).

    Args:
        q: ``[B, T, H, D]``; k_cmp: ``[B, N, K, D]``.

    Returns:
        ``[B, T, K, J]`` with J the number of blocks up to the last query's own, in fp32 (fp64 for
        fp64 input).
    """
    B, T, _, _ = q.shape
    N, K = k_cmp.shape[1], k_cmp.shape[2]
    J = -(-(q_start + T) // config.select_block)
    mask = compressed_mask(T, N, config, q_start, q.device)
    if N == 0:
        k_cmp, mask = F.pad(k_cmp, (0, 0, 0, 0, 0, 1)), mask.new_zeros(1, T, 1, 1)
    p_BTKGN, _ = probabilities(q, k_cmp, mask, config.softmax_scale)
    p_BTKN = p_BTKGN.sum(3)
    columns = []
    for j in range(J):  # block by block, lowest i first, so that equal blocks get equal sums
        score = p_BTKN.new_zeros(B, T, K)
        for i in range(N):
            if overlap(i, j, config):
                score = score + p_BTKN[..., i] * (overlap(i, j, config) / config.compress_stride)
        columns.append(score)
    return torch.stack(columns, dim=-1) if columns else p_BTKN.new_zeros(B, T, K, 0)


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None = None,
    *,
    max_seqlen: int | None = None,
    q_start: int = 0,
    lse: Tensor | None = None,
) -> Tensor:
    """The blocks each query reads: forced ones first, then by score, ties to the lower index.

    Args:
        q: ``[B, T, H, D]``; k_cmp: ``[B, N, K, D]``, φ's keys.
        lse, max_seqlen: no use to the oracle; every backend has one signature.

    Returns:
        int32 ``[B, T, K, n]``, strictly ascending, then −1; numbers count from the start of the
        query's own sequence.
    """
    if cu_seqlens is not None:
        parts = [
            select_blocks(q[:, seq.tokens], k_cmp[:, seq.blocks], config)
            for seq in spans(cu_seqlens, config)
        ]
        return torch.cat(parts, dim=1)
    scores = selection_scores(q, k_cmp, config, q_start=q_start)
    T, J, n = scores.shape[1], scores.shape[3], config.num_selected
    t = torch.arange(q_start, q_start + T, device=q.device)[:, None, None]
    j = torch.arange(J, device=q.device)
    own = t // config.select_block
    candidate = j <= own
    forced = candidate & ((j < config.num_initial) | (j > own - config.num_local))
    scores = scores.masked_fill(forced, float("inf")).masked_fill(~candidate, float("-inf"))
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    listed = torch.take_along_dim(candidate.expand_as(scores), order, dim=-1)
    ascending = order.masked_fill(~listed, J).sort(dim=-1).values
    blocks = ascending.masked_fill(ascending == J, -1)
    return F.pad(blocks, (0, n - blocks.shape[-1]), value=-1).to(torch.int32)
