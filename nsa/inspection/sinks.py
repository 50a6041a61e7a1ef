"""The attention that each branch gives to the first tokens of a sequence, the "sink".

The first tokens are l, since the compressed branch tells no smaller part apart. T tokens, H query
heads, K key/value heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsa.inspection.dense import DenseMeasures, dense_probabilities
from nsa.inspection.recording import SequenceRecord
from nsa.inspection.scores import ScoreMeasures


class Sink(NamedTuple):
    """By query; NaN where every key is a first token, or none is visible."""

    mass: Tensor
    """``[T, H]``, on the first l tokens."""
    uniform: Tensor
    """``[T, H]``, what they would get if every visible key got the same."""


def sinks(
    record: SequenceRecord, listed: Tensor, scores: ScoreMeasures, dense: DenseMeasures
) -> dict[str, Sink]:
    """Measure the sinks by branch, and dense attention's; listed bool ``[T, K, J]``."""
    config, (T, K, _) = record.config, listed.shape
    first, H = config.compress_block, record.q.shape[1]
    t = torch.arange(T, device=listed.device)
    blocks = ((t + 1 - first + config.compress_stride) // config.compress_stride).clamp_min(0)
    # every block is read whole, but for the query's own
    tokens = listed.sum(-1) * config.select_block
    own = listed.gather(-1, (t // config.select_block)[:, None, None].expand(T, K, 1))[..., 0]
    tokens = tokens - own * (config.select_block - 1 - t % config.select_block)[:, None]
    tokens = tokens.repeat_interleave(H // K, 1)
    first_listed = first * listed[..., 0].repeat_interleave(H // K, 1)
    found = {
        "compressed": Sink(scores.sink, (1 / blocks)[:, None].expand(T, H)),
        "selected": Sink(dense.sink_selected, first_listed / tokens),
        "window": window_sink(record),
        "dense": Sink(dense.sink, (first / (t + 1))[:, None].expand(T, H)),
    }
    alone = (t < first + config.compress_stride)[:, None]
    return {
        branch: Sink(*(x.masked_fill(alone, float("nan")) for x in sink))
        for branch, sink in found.items()
    }


def window_sink(record: SequenceRecord) -> Sink:
    """Measure the queries whose window holds the whole sequence; the others see no first token, and
    get NaN."""
    config, T, H = record.config, *record.q.shape[:2]
    near, first = min(T, config.window), config.compress_block
    mass = record.q.new_full((T, H), float("nan"), dtype=torch.float32)
    for rows, p_CHS in dense_probabilities(record.q[:near], record.k_window[:near], config):
        mass[rows] = p_CHS[..., :first].sum(-1).to(mass.dtype)
    seen = torch.arange(1, T + 1, device=mass.device)[:, None].expand(T, H)
    return Sink(mass, (first / seen).masked_fill(mass.isnan(), float("nan")))
