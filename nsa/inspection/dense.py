"""What dense attention would read, beside what the lists read: mass, recall, sinks, best lists.

Dense attention is causal attention of the layer's own queries on the selected branch's keys.
Everything is of one sequence, a chunk of queries at a time. T tokens, C queries of a chunk, S keys
that it sees, J selection blocks, H query heads, K key/value heads, G heads per group, D key size,
n listed blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.config import NSAConfig
from nsa.core.dtypes import NEG_INF, accumulation_dtype
from nsa.core.geometry import num_select_blocks
from nsa.inspection.lists import (
    candidate_and_forced,
    chance_of_block,
    listed_blocks,
    ranked_blocks,
    shared_part,
)
from nsa.inspection.recording import SequenceRecord
from nsa.inspection.scores import CHUNK_ELEMENTS
from nsa.selection.rules import choose


class DenseMeasures(NamedTuple):
    """By query; shares of dense attention's mass, of each head, from 0 to 1."""

    in_list: Tensor
    """``[T, H]``, inside the blocks listed."""
    read: Tensor
    """``[T, H]``, inside the blocks listed or the window."""
    best: Tensor
    """``[T, H]``, inside the oracle's list."""
    random: Tensor
    """``[T, H]``, inside a list as long that ranks at random, on average."""
    oracle: Tensor
    """int32 ``[T, K, n]``, the list that selection would make if a block's score were its mass."""
    recall: Tensor
    """``[T, K]``, the share of the oracle's ranked (not forced) blocks that the list has; NaN where
    it ranked none."""
    sink: Tensor
    """``[T, H]``, on the first l tokens."""
    sink_selected: Tensor
    """``[T, H]``, what the selected branch gives to the first l tokens."""


def dense_measures(record: SequenceRecord, listed: Tensor) -> DenseMeasures:
    """Measure a sequence's lists against dense attention; listed bool ``[T, K, J]``."""
    config = record.config
    T, K, J = listed.shape
    G, block = config.group, config.select_block
    _, forced = candidate_and_forced(T, config, listed.device)
    chance = chance_of_block(listed, config)
    parts: list[tuple[Tensor, ...]] = []
    for rows, p_CHS in dense_probabilities(record.q, record.k_selected, config):
        S = p_CHS.shape[-1]
        mass_CHJ = block_mass(p_CHS, J, config)
        oracle = _ranked(_group_sum(mass_CHJ, K), rows, config)
        best = listed_blocks(oracle, J).repeat_interleave(G, 1)
        here = listed[rows].repeat_interleave(G, 1)
        in_list = (mass_CHJ * here).sum(-1)
        in_forced = (mass_CHJ * forced[rows, None]).sum(-1)
        tokens = here.repeat_interleave(block, -1)[..., :S]
        t = torch.arange(rows.start, rows.stop, device=p_CHS.device)[:, None, None]
        inside = tokens | (torch.arange(S, device=t.device) > t - config.window)
        first = slice(0, config.compress_block)
        parts.append(
            (
                in_list,
                (p_CHS * inside).sum(-1),
                (mass_CHJ * best).sum(-1),
                in_forced + (1 - in_forced) * chance[rows].repeat_interleave(G, 1),
                oracle,
                p_CHS[..., first].sum(-1),
                (p_CHS[..., first] * tokens[..., first]).sum(-1) / in_list,
            )
        )
    columns = map(torch.cat, zip(*parts, strict=True))
    in_list, read, best, random, oracle, sink, sink_selected = columns
    recall = shared_part(ranked_blocks(listed_blocks(oracle, J), config), listed)
    return DenseMeasures(in_list, read, best, random, oracle, recall, sink, sink_selected)


def oracle_lists(q: Tensor, k: Tensor, config: NSAConfig) -> Tensor:
    """The lists that selection would make if a block's score were dense attention's mass on it.

    Forced blocks and the options of selection count as they do for the layer; the group's heads
    are summed.

    Args:
        q: ``[T, H, D]``, of one sequence; k: ``[T, K, D]``, the selected branch's.

    Returns:
        int32 ``[T, K, n]``.
    """
    K, J = k.shape[1], num_select_blocks(len(q), config)
    return torch.cat(
        [
            _ranked(_group_sum(block_mass(p, J, config), K), rows, config)
            for rows, p in dense_probabilities(q, k, config)
        ]
    )


def random_lists(T: int, K: int, config: NSAConfig, generator: torch.Generator) -> Tensor:
    """Lists as selection would make them of random scores, int32 ``[T, K, n]``, on the generator's
    device: forced blocks, and others at random."""
    candidate, _ = candidate_and_forced(T, config, generator.device)
    scores = torch.rand(T, K, candidate.shape[1], generator=generator, device=generator.device)
    scores = scores.masked_fill(~candidate[:, None], 0.0)
    return _ranked(scores / scores.sum(-1, keepdim=True), slice(0, T), config)


def dense_probabilities(q: Tensor, k: Tensor, config: NSAConfig) -> Iterator[tuple[slice, Tensor]]:
    """Yield causal attention's probabilities, rows and ``[C, H, S]``, fp32 (fp64 for fp64).

    Chunks begin at multiples of l', and S is as many tokens as the last of them sees.
    """
    wide, block = accumulation_dtype(q), config.select_block
    T, H, D = q.shape
    K = k.shape[1]
    G = H // K
    k_KSD = k.to(wide).transpose(0, 1)
    start = 0
    while start < T:
        # the most rows r with H * r * (start + r) <= CHUNK_ELEMENTS
        size = int((math.sqrt(start**2 + 4 * CHUNK_ELEMENTS / H) - start) / 2)
        rows = slice(start, min(T, start + max(1, size // block) * block))
        S = rows.stop
        q_KMD = q[rows].to(wide).view(-1, K, G, D).transpose(0, 1).reshape(K, -1, D)
        scores = (q_KMD @ k_KSD[:, :S].mT).mul_(config.softmax_scale)
        scores = scores.unflatten(1, (-1, G)).transpose(0, 1).flatten(1, 2)
        t = torch.arange(rows.start, rows.stop, device=q.device)
        later = torch.arange(S, device=q.device) > t[:, None]
        yield rows, scores.masked_fill_(later[:, None], NEG_INF).softmax(-1)
        start = rows.stop


def block_mass(p_CHS: Tensor, J: int, config: NSAConfig) -> Tensor:
    """``[C, H, J]``, the sum over the tokens of each selection block."""
    padding = J * config.select_block - p_CHS.shape[-1]
    return F.pad(p_CHS, (0, padding)).unflatten(-1, (J, config.select_block)).sum(-1)


def _group_sum(mass_CHJ: Tensor, K: int) -> Tensor:
    """``[C, K, J]``, of every group's heads, of each query 1 in all."""
    return mass_CHJ.unflatten(1, (K, -1)).mean(2)


def _ranked(share_CKJ: Tensor, rows: slice, config: NSAConfig) -> Tensor:
    """Rank scores that sum to 1 as the layer ranks its own, which sum to G·l/d; rows begin at a
    multiple of l', which ``select_share`` divides."""
    scores = share_CKJ * (config.group * config.compress_block / config.compress_stride)
    row = torch.arange(rows.start, rows.stop, device=scores.device)
    ranked = scores.transpose(0, 1)[:, :, None]
    chosen = choose(ranked, row[:, None], config.num_selected, config)
    first = row - row % config.select_share - rows.start
    return chosen[:, :, 0].transpose(0, 1)[first]
