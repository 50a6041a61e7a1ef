"""Which blocks a query reads: scores from the compressed branch, then the top n (paper §3.3.2).

B batch, T query tokens, N compressed blocks, J selection blocks, H query heads,
K key/value heads, G heads per group, D key size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.config import NSAConfig
from nsa.reference.attend import accumulation_dtype, attend, probabilities
from nsa.reference.masks import compressed_mask
from nsa.reference.packing import spans

FP8_MAX = 448.0
"""The largest number of e4m3."""


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
    p_BTKGN, lse = probabilities(q, k_cmp, mask, config.softmax_scale)
    if config.score_dtype == "fp8":
        p_BTKGN = rounded_probabilities(q, k_cmp, mask, lse, config.softmax_scale)
    p_BTKN = p_BTKGN.sum(3)
    columns = []
    for j in range(J):  # block by block, lowest i first, so that equal blocks get equal sums
        score = p_BTKN.new_zeros(B, T, K)
        for i in range(N):
            if overlap(i, j, config):
                score = score + p_BTKN[..., i] * (overlap(i, j, config) / config.compress_stride)
        columns.append(score)
    return torch.stack(columns, dim=-1) if columns else p_BTKN.new_zeros(B, T, K, 0)


def rounded_probabilities(q: Tensor, k: Tensor, mask: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Probabilities ``[B, T, K, G, S]`` of q and k rounded to e4m3, over the exact log-sum-exp, so
    that they sum to about one."""
    q_BTHD, k_BSKD = fp8_rows(q), fp8_rows(k)
    B, T, H, D = q.shape
    K = k.shape[2]
    q_BTKGD = q_BTHD.reshape(B, T, K, H // K, D)
    scores = scale * torch.einsum("btkgd,bskd->btkgs", q_BTKGD, k_BSKD)
    p = torch.exp(scores - lse.reshape(B, T, K, H // K, 1))
    return p.masked_fill(~mask[..., None, :], 0.0)


def fp8_rows(x: Tensor) -> Tensor:
    """x rounded to e4m3 with one scale per row of the last dimension, in fp32 (fp64
    for fp64)."""
    largest = x.abs().amax(-1, keepdim=True).float() / FP8_MAX
    scale = largest.masked_fill(largest == 0, 1.0)
    rounded = (x.float() / scale).to(torch.float8_e4m3fn).float()
    return (rounded.double() * scale.double()).to(accumulation_dtype(x.dtype))


def region_scores(q: Tensor, k_cmp: Tensor, lse: Tensor, config: NSAConfig) -> Tensor:
    """Scores ``Σ_h exp(scale * q_h·key − lse_h)`` of the regions whose compressed blocks all exist.

    A region's key is the mean of those that begin in it.

    Args:
        lse: ``[B, T, H]`` of the compressed branch.

    Returns:
        ``[B, T, K, W]``, W whole regions.
    """
    assert config.select_regions is not None
    r, _ = config.select_regions
    per = r * config.select_block // config.compress_stride
    B, T, H, D = q.shape
    N, K = k_cmp.shape[1], k_cmp.shape[2]
    dtype = accumulation_dtype(q.dtype)
    keys = k_cmp[:, : N // per * per].to(dtype).reshape(B, N // per, per, K, D).mean(2)
    q_BTKGD = q.to(dtype).reshape(B, T, K, H // K, D)
    dots = config.softmax_scale * torch.einsum("btkgd,brkd->btkgr", q_BTKGD, keys)
    return torch.exp(dots - lse.reshape(B, T, K, H // K, 1)).sum(3)


def searched_regions(scores: Tensor, t: Tensor, forced: Tensor, config: NSAConfig) -> Tensor:
    """The k best regions, those of forced blocks, and those too young to have a score.

    Args:
        scores: ``[B, T, K, W]`` of the first W regions.
        t: int64 ``[T, 1, 1]``, positions.
        forced: bool ``[T, 1, J]``.

    Returns:
        bool ``[B, T, K, R]``, R the regions of J blocks.
    """
    assert config.select_regions is not None
    r, k = config.select_regions
    J = forced.shape[-1]
    R = -(-J // r)
    region = torch.arange(R, device=scores.device)
    last_token = (region + 1) * r * config.select_block - config.compress_stride
    whole = last_token + config.compress_block - 1 <= t
    of_forced = F.pad(forced, (0, R * r - J)).unflatten(-1, (R, r)).any(-1)
    contends = whole & ~of_forced
    scores = F.pad(scores, (0, R))[..., :R].masked_fill(~contends, float("-inf"))
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    best = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
    return (best & contends) | ~contends


def most_blocks(t: Tensor, config: NSAConfig) -> Tensor:
    """How many blocks a query at position t reads at most."""
    most = torch.full_like(t, config.num_selected)
    for end, count in reversed(config.select_schedule or ()):
        most = torch.where(t < end, count, most)
    return most


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
        q_start: the position of q's first row, a multiple of ``select_share``.
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
    if q_start % config.select_share:
        raise ValueError(f"q_start: expected a multiple of {config.select_share}, got {q_start}")
    T, n = q.shape[1], config.num_selected
    scores = selection_scores(q, k_cmp, config, q_start=q_start)
    J = scores.shape[3]
    t = torch.arange(q_start, q_start + T, device=q.device)[:, None, None]
    j = torch.arange(J, device=q.device)
    own = t // config.select_block
    candidate = j <= own
    forced = candidate & ((j < config.num_initial) | (j > own - config.num_local))
    searched = candidate.expand_as(scores)
    if config.select_regions is not None and J:
        mask = compressed_mask(T, k_cmp.shape[1], config, q_start, q.device)
        _, lse = attend(q, k_cmp, k_cmp, mask, config.softmax_scale)
        regions = searched_regions(region_scores(q, k_cmp, lse, config), t, forced, config)
        searched = searched & regions.repeat_interleave(config.select_regions[0], -1)[..., :J]
    ranked = scores.masked_fill(forced, float("inf")).masked_fill(~searched, float("-inf"))
    order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    listed = torch.take_along_dim(searched, order, dim=-1)
    listed &= torch.arange(order.shape[-1], device=q.device) < most_blocks(t, config)
    if config.select_mass is not None and config.select_mass < 1:
        mass = torch.take_along_dim(scores, order, dim=-1)
        before = mass.cumsum(-1) - mass
        enough = config.select_mass * config.group * config.compress_block / config.compress_stride
        listed &= (before < enough) | torch.take_along_dim(forced.expand_as(scores), order, dim=-1)
    ascending = order.masked_fill(~listed, J).sort(dim=-1).values
    blocks = ascending.masked_fill(ascending == J, -1)
    blocks = F.pad(blocks, (0, n - blocks.shape[-1]), value=-1).to(torch.int32)
    first = t.flatten() // config.select_share * config.select_share - q_start
    return blocks[:, first]
