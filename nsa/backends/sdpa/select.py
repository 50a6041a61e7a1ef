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
from nsa.selection.rules import rule_of

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
    R, d, rule = shape.rows, shape.stride, rule_of(config)
    n = rule.width(longest, config)
    M = d * (q.shape[2] // K)
    dtype = operand_dtype(q)
    q_rows = fold_rows(q, shape, K).transpose(1, 2).to(dtype).reshape(B * K, R * M, q.shape[3])
    lse_rows = fold_rows(lse[..., None], shape, K).transpose(1, 2).reshape(B * K, R * M, 1)
    k_rows = heads_first(k_cmp, dtype)
    result = torch.empty(B * K, R * d, n, dtype=torch.int32, device=q.device)
    within = torch.arange(d, device=q.device) + config.compress_block - 1
    stretch = _CPU_STRETCH if q.device.type == "cpu" else 1
    for chunk in chunks(R, window, B * K * M, q.device, stretch):
        C, S = chunk.row_end - chunk.row, chunk.key_end - chunk.key
        rows = slice(chunk.row * M, chunk.row_end * M)
        p = bmm(q_rows[:, rows], k_rows[:, chunk.key : chunk.key_end].mT)
        p.mul_(config.softmax_scale).sub_(lse_rows[:, rows]).exp_()
        p = p.view(B * K, C, M, S).masked_fill_(chunk.hidden, 0.0)
        p = p.view(B * K, C, d, M // d, S).sum(3)
        if window.row_seq is None:
            last_row = window.first_row + chunk.row_end - 1
            reach = min(longest, last_row * d + config.compress_block + d - 1)
            scores = _scores_regular(p, num_select_blocks(reach, config), config)
        else:
            scores = _scores_packed(p, chunk, number, num_select_blocks(longest, config), config)
        own = (number[chunk.row : chunk.row_end, None] * d + within) // config.select_block
        chosen = rule.choose(scores, own, n, config)
        result[:, chunk.row * d : chunk.row_end * d] = chosen.flatten(1, 2)
    return result.view(B, K, R * d, n).transpose(1, 2)


def _scores_regular(p: Tensor, J: int, config: NSAConfig) -> Tensor:
    """Scores of blocks 0 … J-1 (Eq. 9), p ``[B*K, C, d, S]`` beginning at compressed block 0."""
    first, weights = overlap_weights(config)
    ratio = config.select_block // config.compress_stride
    padded = F.pad(p, (-first, max(0, J * ratio + len(weights) + first - p.shape[-1])))
    scores = torch.zeros_like(padded[..., : J * ratio : ratio])
    for m, weight in enumerate(weights):
        scores.add_(padded[..., m : m + J * ratio : ratio], alpha=weight)
    return scores


def _scores_packed(p: Tensor, chunk: Chunk, number: Tensor, J: int, config: NSAConfig) -> Tensor:
    """The same where every row has its sequence's first compressed block at another column."""
    first, weights = overlap_weights(config)
    ratio = config.select_block // config.compress_stride
    row = torch.arange(chunk.row, chunk.row_end, device=p.device)
    start = row - number[chunk.row : chunk.row_end] - chunk.key
    column = start[:, None] + torch.arange(J, device=p.device) * ratio + first
    scores = p.new_zeros(*p.shape[:3], J)
    for m, weight in enumerate(weights):
        here = column + m
        there = (here >= 0) & (here < p.shape[-1])
        index = here.clamp(0, p.shape[-1] - 1)[:, None].expand(scores.shape)
        scores.add_(p.gather(-1, index).mul_(there[:, None]), alpha=weight)
    return scores
