"""Selection of the ``sdpa`` backend: scores and top-n for a chunk of folded rows at a time.

B batch, R rows of d queries, K key/value heads, M = d*G queries of a row, C rows of a chunk,
S compressed blocks that a chunk sees, J selection blocks, n blocks chosen, D key size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.backends.sdpa.numerics import bmm, heads_first, operand_dtype
from nsa.backends.sdpa.window import Chunk, SlidingWindow, chunks
from nsa.backends.shared.fold_queries import Fold, fold_rows
from nsa.config import NSAConfig
from nsa.core.geometry import num_select_blocks, overlap_weights
from nsa.selection.fp8 import round_rows
from nsa.selection.regions import keys_per_region, searched_blocks
from nsa.selection.rules import choose, width

_CPU_STRETCH = 8
"""A row has d*G queries on every key head: a chunk of the second-level cache would be few rows."""


def top_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    config: NSAConfig,
    shape: Fold,
    window: SlidingWindow,
    number: Tensor,
    longest: int,
) -> Tensor:
    """Blocks of every folded query, each of which sees at least one compressed block.

    Args:
        q: ``[B, T, H, D]``; k_cmp: ``[B, N, K, D]``; lse ``[B, T, H]`` of the compressed branch.
        number: int64 ``[R]``, each row's number within its sequence.
        longest: tokens of the longest sequence.

    Returns:
        int32 ``[B, R*d, K, n]``, ascending, then −1; slots without a query are undefined.
    """
    B, K = k_cmp.shape[0], k_cmp.shape[2]
    R, d, n = shape.rows, shape.stride, width(longest, config)
    M = d * (q.shape[2] // K)
    dtype = operand_dtype(q)
    k_rows = heads_first(k_cmp, dtype)
    q_folded = fold_rows(q, shape, K).transpose(1, 2)
    q_rows = q_folded.to(dtype).reshape(B * K, R * M, q.shape[3])
    lse_rows = fold_rows(lse[..., None], shape, K).transpose(1, 2).reshape(B * K, R * M, 1)
    q_exact, k_exact = q_rows, k_rows
    if config.score_dtype == "fp8":
        q_rows, k_rows = round_rows(q_rows), round_rows(k_rows)
    result = torch.empty(B * K, R * d, n, dtype=torch.int32, device=q.device)
    within = torch.arange(d, device=q.device) + config.compress_block - 1
    stretch = _CPU_STRETCH if q.device.type == "cpu" else 1
    for chunk in chunks(R, window, B * K * M, q.device, stretch):
        C, S = chunk.row_end - chunk.row, chunk.key_end - chunk.key
        rows = slice(chunk.row * M, chunk.row_end * M)
        here = slice(chunk.key, chunk.key_end)

        def log_p(q_: Tensor, k_: Tensor, rows: slice = rows, here: slice = here) -> Tensor:
            return (
                bmm(q_[:, rows], k_[:, here].mT).mul_(config.softmax_scale).sub_(lse_rows[:, rows])
            )

        log_p_here = log_p(q_rows, k_rows)
        # a packed row's number in its sequence is this at most
        last_row = window.first_row + chunk.row_end - 1
        longest_here = min(longest, last_row * d + config.compress_block + d - 1)
        J = num_select_blocks(longest_here, config)
        first = None if window.row_seq is None else _first_columns(chunk, number)
        position = number[chunk.row : chunk.row_end, None] * d + within
        searched = None
        if config.select_regions is not None:
            exact = log_p_here if q_exact is q_rows else log_p(q_exact, k_exact)
            regions = region_scores(exact.view(B * K, C, d, M // d, S), first, J, config)
            searched = searched_blocks(regions, position, J, config)
        p = log_p_here.exp_().view(B * K, C, M, S).masked_fill_(chunk.hidden, 0.0)
        p = p.view(B * K, C, d, M // d, S).sum(3)
        if first is None:
            scores = scores_regular(p, J, config)
        else:
            scores = _scores_packed(p, first, J, config)
        chosen = choose(scores, position, n, config, searched)
        result[:, chunk.row * d : chunk.row_end * d] = chosen.flatten(1, 2)
    return result.view(B, K, R * d, n).transpose(1, 2)


def scores_regular(p: Tensor, J: int, config: NSAConfig) -> Tensor:
    """Scores of blocks 0 … J-1 (Eq. 9), p ``[B*K, C, d, S]`` beginning at compressed block 0."""
    first, weights = overlap_weights(config)
    ratio = config.select_block // config.compress_stride
    padded = F.pad(p, (-first, max(0, J * ratio + len(weights) + first - p.shape[-1])))
    scores = torch.zeros_like(padded[..., : J * ratio : ratio])
    for m, weight in enumerate(weights):
        scores.add_(padded[..., m : m + J * ratio : ratio], alpha=weight)
    return scores


def _first_columns(chunk: Chunk, number: Tensor) -> Tensor:
    """int64 ``[C]``, the column of the first compressed block of each row's sequence."""
    row = torch.arange(chunk.row, chunk.row_end, device=number.device)
    return row - number[chunk.row : chunk.row_end] - chunk.key


def _scores_packed(p: Tensor, first: Tensor, J: int, config: NSAConfig) -> Tensor:
    """The same where every row has its sequence's first compressed block at another column."""
    before, weights = overlap_weights(config)
    ratio = config.select_block // config.compress_stride
    column = first[:, None] + torch.arange(J, device=p.device) * ratio + before
    scores = p.new_zeros(*p.shape[:3], J)
    for m, weight in enumerate(weights):
        here = column + m
        there = (here >= 0) & (here < p.shape[-1])
        index = here.clamp(0, p.shape[-1] - 1)[:, None].expand(scores.shape)
        scores.add_(p.gather(-1, index).mul_(there[:, None]), alpha=weight)
    return scores


def region_scores(log_p: Tensor, first: Tensor | None, J: int, config: NSAConfig) -> Tensor:
    """``[B*K, C, d, W]``: a region's key is a mean, and so is its logarithm of p.

    log_p ``[B*K, C, d, G, S]``; first: see :func:`_first_columns`, None for column 0.
    """
    per, S = keys_per_region(config), log_p.shape[-1]
    if first is None:
        W = S // per
        means = log_p[..., : W * per].unflatten(-1, (W, per)).mean(-1)
    else:
        W = min(S, J * config.select_block // config.compress_stride) // per
        column = first[:, None] + torch.arange(W * per, device=log_p.device)
        index = column.clamp(0, S - 1)[:, None, None].expand(*log_p.shape[:-1], W * per)
        means = log_p.gather(-1, index).unflatten(-1, (W, per)).mean(-1)
    return means.exp().sum(3)
