"""Which blocks a query reads: the rules of selection (paper §3.2.2, Eq. 8-12).

A rule is one class and one row of :data:`RULES`, beside its oracle in ``nsa/reference``. ``sdpa``
ranks with :meth:`Rule.choose`; a kernel of another backend is picked by the rule's name; operators
ask :meth:`Rule.width` for the size of a list.

C rows of a chunk, d queries of a row, J selection blocks, n blocks chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.config import NSAConfig
from nsa.core.dtypes import NEG_INF
from nsa.core.geometry import list_width, num_select_blocks

_INDEX_LIMIT = 2**31 - 1


class Rule(Protocol):
    """How blocks are chosen from their scores."""

    name: str

    def width(self, length: int, config: NSAConfig) -> int:
        """Entries of every list, n, where no sequence is longer than ``length`` tokens; those past
        the blocks chosen are −1."""
        ...

    def choose(self, scores: Tensor, own: Tensor, n: int, config: NSAConfig) -> Tensor:
        """The blocks of each query.

        Args:
            scores: ``[X, C, d, J]``, not negative.
            own: int64 ``[C, d]``, the block each query stands in.
            n: what :meth:`width` said.

        Returns:
            int32 ``[X, C, d, n]``, ascending, then −1.
        """
        ...


class TopN:
    """Forced blocks first, then the highest scores, ties to the lower index; n in all."""

    name = "top_n"

    def width(self, length: int, config: NSAConfig) -> int:
        """``num_selected``, or all blocks where that is far more than there are."""
        return list_width(length, config)

    def choose(self, scores: Tensor, own: Tensor, n: int, config: NSAConfig) -> Tensor:
        """See :class:`Rule`."""
        J = scores.shape[-1]
        j = torch.arange(J, device=scores.device)
        candidate = j <= own[..., None]
        forced = candidate & ((j < config.num_initial) | (j > own[..., None] - config.num_local))
        if scores.dtype == torch.float32:
            # topk promises no order among equals, so the index is made part of the key: the bits
            # of a float that is not negative sort like the float
            bits = scores.view(torch.int32).to(torch.int64)
            bits = bits.masked_fill_(forced, _INDEX_LIMIT)
            key = bits.bitwise_left_shift_(32).add_(_INDEX_LIMIT - j)
            key = key.masked_fill_(~candidate, -1).topk(min(n, J), dim=-1, sorted=False).values
            index = _INDEX_LIMIT - (key & 0xFFFFFFFF)
            index = index.masked_fill_(key < 0, J)
        else:
            ranked = scores.masked_fill(forced, float("inf")).masked_fill(~candidate, NEG_INF)
            ranked, index = ranked.sort(dim=-1, descending=True, stable=True)
            index = index.masked_fill(ranked == NEG_INF, J)[..., :n]
        index = index.sort(dim=-1).values
        blocks = index.masked_fill(index == J, -1)
        return F.pad(blocks, (0, n - blocks.shape[-1]), value=-1).to(torch.int32)


RULES: Mapping[str, Rule] = {rule.name: rule for rule in (TopN(),)}
"""By name."""


def rule_of(config: NSAConfig) -> Rule:
    """The rule that a configuration asks for."""
    return RULES["top_n"]


def first_block_only(n: int, device: torch.device) -> Tensor:
    """int32 ``[n]``, the list of a query that sees no compressed block: it stands in block 0, since
    l <= l'."""
    return torch.arange(n, device=device, dtype=torch.int32).clamp_max(1).neg()


def takes_all(length: int, config: NSAConfig) -> bool:
    """Whether every query of sequences of up to ``length`` tokens reads all that it may."""
    return num_select_blocks(length, config) <= config.num_selected


def all_blocks(position: Tensor, n: int, config: NSAConfig) -> Tensor:
    """int32 ``[T, n]``, the lists of queries at ``position`` ``[T]`` that read all they may."""
    block = torch.arange(n, device=position.device, dtype=torch.int32)
    return block.where(block <= (position // config.select_block)[:, None], -1)
