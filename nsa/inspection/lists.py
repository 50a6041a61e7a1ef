"""Measures of block lists alone: what they share with others, and how many blocks queries read
together.

Everything is of one sequence. T tokens, K key/value heads, n listed blocks, J selection blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.core.geometry import num_select_blocks
from nsa.selection.rules import forced_blocks

NAN = float("nan")


def listed_blocks(block_idx: Tensor, J: int) -> Tensor:
    """bool ``[…, J]``: whether a query reads each of a sequence's J blocks; block_idx ``[…, n]``,
    ended by −1."""
    index = block_idx.long().masked_fill(block_idx < 0, J)
    listed = index.new_zeros(*index.shape[:-1], J + 1, dtype=torch.bool)
    return listed.scatter_(-1, index, True)[..., :J]


def candidate_and_forced(
    T: int, config: NSAConfig, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """bool ``[T, J]`` each: the blocks that a query sees a token of, and those always read."""
    position = torch.arange(T, device=device)
    return forced_blocks(position, num_select_blocks(T, config), config)


def has_choice(listed: Tensor, config: NSAConfig) -> Tensor:
    """bool ``[T, K]``: whether a query leaves a candidate out. Early ones read all they see, so
    that nothing about their lists was learned."""
    candidate, _ = candidate_and_forced(listed.shape[0], config, listed.device)
    return (candidate[:, None] & ~listed).any(-1)


def shared_part(listed: Tensor, other: Tensor) -> Tensor:
    """The share of a list's blocks that are on another list, too: ``[…, J]`` -> ``[…]``; NaN of an
    empty list."""
    return (listed & other).sum(-1) / listed.sum(-1)


def ranked_blocks(listed: Tensor, config: NSAConfig) -> Tensor:
    """The blocks listed that are not forced: those that scores have brought in; ``[T, K, J]``."""
    _, forced = candidate_and_forced(listed.shape[0], config, listed.device)
    return listed & ~forced[:, None]


def chance_of_block(listed: Tensor, config: NSAConfig) -> Tensor:
    """``[T, K]``, how likely a list as long that ranks at random has a given candidate that is not
    forced; NaN where there is none. What recall and overlap of ranked blocks are to be held to."""
    candidate, forced = candidate_and_forced(listed.shape[0], config, listed.device)
    free = (candidate & ~forced).sum(-1, keepdim=True)
    return ranked_blocks(listed, config).sum(-1) / free


def overlap_with_token_before(part: Tensor, listed: Tensor) -> Tensor:
    """``[T, K]``, :func:`shared_part` with the query before; NaN for the first.

    Args:
        part: bool ``[T, K, J]``, the blocks that are looked for: ``listed``, or the ranked of them.
        listed: bool ``[T, K, J]``.
    """
    return _from(1, shared_part(part[1:], listed[:-1]))


def overlap_with_other_groups(part: Tensor, listed: Tensor) -> Tensor:
    """``[T, K]``, :func:`shared_part` with the lists of the other groups, on average; NaN where
    there is one group. Arguments as for :func:`overlap_with_token_before`."""
    K = listed.shape[1]
    common = part.float() @ listed.float().mT
    others = common.sum(-1) - common.diagonal(dim1=-2, dim2=-1)
    return others / part.sum(-1) / (K - 1) if K > 1 else torch.full_like(others, NAN)


def same_a_block_later(listed: Tensor, config: NSAConfig) -> Tensor:
    """``[T, K]``, the share of a query's ranked blocks that the query l' tokens before reads, too;
    1 where lists depend on nothing but the position.

    NaN for queries that see less than twice the blocks they read: there even random lists share
    most.
    """
    block = config.select_block
    candidate, _ = candidate_and_forced(listed.shape[0], config, listed.device)
    now, before = listed[block:], listed[:-block]
    ranked = ranked_blocks(listed, config)[block:] & candidate[:-block, None]
    few = candidate[block:].sum(-1, keepdim=True) < 2 * now.sum(-1)
    return _from(block, shared_part(ranked, before).masked_fill(few, NAN), len(listed))


def _from(start: int, values: Tensor, T: int | None = None) -> Tensor:
    """``[T, K]``: values from row ``start`` on, NaN before."""
    T = start + len(values) if T is None else T
    return torch.cat([values.new_full((T - len(values), values.shape[1]), NAN), values])


def union_sizes(listed: Tensor, queries: int) -> Tensor:
    """``[T // queries, K]``: distinct blocks that ``queries`` consecutive tokens read together,
    tiles standing at multiples of ``queries``."""
    whole = len(listed) // queries * queries
    return listed[:whole].unflatten(0, (-1, queries)).any(1).sum(-1)


def block_map(listed: Tensor, *, rows: int, columns: int) -> Tensor:
    """``[K, R, C]``, R and C at most rows and columns: how much of each tile of a query × block map
    is read, from 0 to 1.

    Args:
        listed: bool ``[T, K, J]``.
    """
    T, _, J = listed.shape
    R, C = min(rows, T), min(columns, J)
    row = torch.arange(T, device=listed.device) * R // T
    column = torch.arange(J, device=listed.device) * C // J
    by_row = torch.zeros(R, *listed.shape[1:], device=listed.device)
    by_row.index_add_(0, row, listed.float())
    tiles = torch.zeros(C, listed.shape[1], R, device=listed.device)
    tiles.index_add_(0, column, by_row.permute(2, 1, 0))
    size = row.bincount(minlength=R)[:, None] * column.bincount(minlength=C)
    return tiles.permute(1, 2, 0) / size
