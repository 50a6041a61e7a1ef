"""Which blocks a query reads, of those that are scored (paper §3.2.2, Eq. 8-12).

The options of selection stand here and in :mod:`.regions`, :mod:`.fp8` and :mod:`.share`, each
beside its oracle in ``nsa/reference/selection.py``. ``sdpa`` ranks with :func:`choose`; kernels get
the same limits as numbers; operators ask :func:`width` for the size of a list.

C rows of a chunk, d queries of a row, J selection blocks, n blocks chosen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.config import NSAConfig
from nsa.core.dtypes import NEG_INF
from nsa.core.geometry import list_width, num_select_blocks

_INDEX_LIMIT = 2**31 - 1


def width(length: int, config: NSAConfig) -> int:
    """Entries of every list, n, where no sequence is longer than ``length`` tokens; those past the
    blocks chosen are −1. ``num_selected``, or all blocks where that is far more than there are."""
    return list_width(length, config)


def most_blocks(position: Tensor, config: NSAConfig) -> Tensor:
    """How many blocks a query at a position reads at most (``select_schedule``)."""
    most = torch.full_like(position, config.num_selected)
    for end, count in reversed(config.select_schedule or ()):
        most = most.where(position >= end, count)
    return most


def least_mass(config: NSAConfig) -> float | None:
    """The score at which a list ends (``select_mass``); None: nowhere.

    Every compressed block that a query sees spreads its probability over l/d blocks in all, so that
    all candidates' scores sum to G·l/d.
    """
    if config.select_mass is None or config.select_mass == 1:
        return None
    return config.select_mass * config.group * config.compress_block / config.compress_stride


def forced_blocks(position: Tensor, J: int, config: NSAConfig) -> tuple[Tensor, Tensor]:
    """bool ``[…, J]`` each: the candidates of a query at a position, and the forced among them."""
    j = torch.arange(J, device=position.device)
    own = position[..., None] // config.select_block
    candidate = j <= own
    return candidate, candidate & ((j < config.num_initial) | (j > own - config.num_local))


def choose(
    scores: Tensor,
    position: Tensor,
    n: int,
    config: NSAConfig,
    searched: Tensor | None = None,
) -> Tensor:
    """Forced blocks first, then the highest scores, ties to the lower index.

    Args:
        scores: ``[X, C, d, J]``, not negative.
        position: int64 ``[C, d]`` or ``[X, C, d]``, of each query in its sequence.
        n: what :func:`width` said.
        searched: bool ``[X, C, d, J]``, the candidates that are ranked; None: all.

    Returns:
        int32 ``[X, C, d, n]``, ascending, then −1.
    """
    J = scores.shape[-1]
    j = torch.arange(J, device=scores.device)
    candidate, forced = forced_blocks(position, J, config)
    ranked = candidate if searched is None else candidate & searched
    if scores.dtype == torch.float32:
        # topk promises no order among equals, so the index is made part of the key: the bits
        # of a float that is not negative sort like the float
        bits = scores.view(torch.int32).to(torch.int64)
        bits = bits.masked_fill_(forced, _INDEX_LIMIT)
        key = bits.bitwise_left_shift_(32).add_(_INDEX_LIMIT - j)
        key = key.masked_fill_(~ranked, -1).topk(min(n, J), dim=-1).values
        index = _INDEX_LIMIT - (key & 0xFFFFFFFF)
        index = index.masked_fill_(key < 0, J)
    else:
        value = scores.masked_fill(forced, float("inf")).masked_fill(~ranked, NEG_INF)
        value, index = value.sort(dim=-1, descending=True, stable=True)
        index = index.masked_fill(value == NEG_INF, J)[..., :n]
    if config.select_schedule is not None:
        rank = torch.arange(index.shape[-1], device=index.device)
        index = index.masked_fill(rank >= most_blocks(position, config)[..., None], J)
    enough = least_mass(config)
    if enough is not None:
        there = index.clamp_max(J - 1)
        score = scores.gather(-1, there).masked_fill(index == J, 0.0)
        is_forced = forced.expand_as(scores).gather(-1, there)
        before = _sums(score) - score
        index = index.masked_fill((before >= enough) & ~is_forced, J)
    index = index.sort(dim=-1).values
    blocks = index.masked_fill(index == J, -1)
    return F.pad(blocks, (0, n - blocks.shape[-1]), value=-1).to(torch.int32)


def _sums(x: Tensor) -> Tensor:
    """``x.cumsum(-1)``, whose order of additions torch fixes on no GPU: it refuses floats there
    under ``torch.use_deterministic_algorithms``."""
    shift = 1
    while shift < x.shape[-1]:
        x = x + F.pad(x[..., :-shift], (shift, 0))
        shift *= 2
    return x


def first_block_only(n: int, device: torch.device) -> Tensor:
    """int32 ``[n]``, the list of a query that sees no compressed block: it stands in block 0, since
    l <= l'."""
    return torch.arange(n, device=device, dtype=torch.int32).clamp_max(1).neg()


def takes_all(length: int, config: NSAConfig) -> bool:
    """Whether every query of sequences of up to ``length`` tokens reads all its candidates."""
    if (config.select_schedule, config.select_regions, least_mass(config)) != (None, None, None):
        return False
    return num_select_blocks(length, config) <= config.num_selected


def all_blocks(position: Tensor, n: int, config: NSAConfig) -> Tensor:
    """int32 ``[T, n]``, the lists of queries at ``position`` ``[T]`` that read all they may."""
    block = torch.arange(n, device=position.device, dtype=torch.int32)
    return block.where(block <= (position // config.select_block)[:, None], -1)
