"""Measures of the selection scores, computed anew from recorded queries and compressed keys.

Everything is of one sequence, a chunk of queries at a time. T tokens, C queries of a chunk,
N compressed blocks, J selection blocks, H query heads, K key/value heads, G heads per group,
D key size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.core.dtypes import NEG_INF, accumulation_dtype
from nsa.core.geometry import num_select_blocks, overlap_weights
from nsa.inspection.lists import NAN
from nsa.inspection.recording import SequenceRecord

CHUNK_ELEMENTS = 1 << 22
"""Probabilities held at once: 16 MiB in fp32, several times."""


class ScoreMeasures(NamedTuple):
    """By query; NaN for one that sees no compressed block."""

    mass_kept: Tensor
    """``[T, K]``, the share of all candidates' score that the list holds."""
    entropy: Tensor
    """``[T, K]``, nats: of the candidates' scores as a distribution. Its exponential is how many
    blocks the score is spread over."""
    sink: Tensor
    """``[T, H]``, what the compressed branch gives to the first compressed block."""


def score_measures(record: SequenceRecord, listed: Tensor) -> ScoreMeasures:
    """Measure the scores (paper Eq. 8-10) behind a sequence's lists; listed bool ``[T, K, J]``."""
    kept, entropy, sinks = [], [], []
    for rows, p_CHN in compressed_probabilities(record):
        scores = block_scores(p_CHN, listed.shape[1], len(listed), record.config)
        total = scores.sum(-1)
        kept.append((scores * listed[rows]).sum(-1) / total)
        share = scores / total[..., None]
        entropy.append(torch.special.entr(share).sum(-1))
        blind = total[:, :1] == 0
        first = p_CHN[..., 0] if p_CHN.shape[-1] else p_CHN.new_zeros(p_CHN.shape[:2])
        sinks.append(first.masked_fill(blind, NAN))
    return ScoreMeasures(torch.cat(kept), torch.cat(entropy), torch.cat(sinks))


def compressed_probabilities(record: SequenceRecord) -> Iterator[tuple[slice, Tensor]]:
    """Yield the compressed branch's probabilities, rows and ``[C, H, N]``, fp32 (fp64 for fp64);
    zeros for a query that sees no block."""
    config, wide = record.config, accumulation_dtype(record.q)
    T, H, D = record.q.shape
    N, K = record.k_compressed.shape[:2]
    k_KND = record.k_compressed.to(wide).transpose(0, 1)
    last = torch.arange(N, device=record.q.device) * config.compress_stride
    last = last + config.compress_block - 1
    size = max(1, CHUNK_ELEMENTS // (H * max(N, 1)))
    for start in range(0, T, size):
        rows = slice(start, min(start + size, T))
        q_KMD = _by_key_head(record.q[rows].to(wide), K)
        scores = (q_KMD @ k_KND.mT).mul_(config.softmax_scale)
        scores = scores.unflatten(1, (-1, H // K)).transpose(0, 1).flatten(1, 2)
        t = torch.arange(rows.start, rows.stop, device=last.device)
        hidden = (last > t[:, None])[:, None]
        p = scores.masked_fill_(hidden, NEG_INF).softmax(-1)
        yield rows, p.masked_fill_(hidden, 0.0)


def block_scores(p_CHN: Tensor, K: int, T: int, config: NSAConfig) -> Tensor:
    """``[C, K, J]``, scores of T tokens' selection blocks, summed over a group (Eq. 9, 10)."""
    C, H, N = p_CHN.shape
    J, (first, weights) = num_select_blocks(T, config), overlap_weights(config)
    ratio = config.select_block // config.compress_stride
    p_CKN = p_CHN.view(C, K, H // K, N).sum(2)
    padded = p_CKN.new_zeros(C, K, -first + J * ratio + len(weights))
    width = min(N, padded.shape[-1] + first)
    padded[..., -first : -first + width] = p_CKN[..., :width]
    scores = p_CKN.new_zeros(C, K, J)
    for m, weight in enumerate(weights):
        scores.add_(padded[..., m : m + J * ratio : ratio], alpha=weight)
    return scores


def _by_key_head(q_CHD: Tensor, K: int) -> Tensor:
    """``[K, C*G, D]``"""
    C, H, D = q_CHD.shape
    return q_CHD.view(C, K, H // K, D).transpose(0, 1).reshape(K, C * (H // K), D)
