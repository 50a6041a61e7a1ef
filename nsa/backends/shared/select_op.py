"""The operator ``nsa::select_blocks``, one for every backend that selects.

Activation checkpointing can keep its result by name
(``torch.ops.nsa.select_blocks.default``): a list that came out differently when it is recomputed,
at a near-tie, would give wrong gradients in silence.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.core.operators import config_of, define, geometry


class Selector(Protocol):
    """What a backend computes behind the operator."""

    def __call__(
        self,
        q: Tensor,
        k_cmp: Tensor,
        lse: Tensor,
        config: NSAConfig,
        cu_seqlens: Tensor | None,
        longest: int,
        q_start: int,
    ) -> Tensor:
        """``[B, T, H, D]``, ``[B, N, K, D]``, ``[B, T, H]`` -> int32 ``[B, T, K, n]``.

        ``longest`` bounds the position past the last query of any sequence, in tokens.
        """
        ...


SELECTORS: dict[str, Selector] = {}
"""By name; a backend's module puts its own here when it is imported."""


def _forward(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    longest: int,
    q_start: int,
    shape: list[int],
    scale: float,
    selector: str,
) -> Tensor:
    config = config_of(shape, scale)
    return SELECTORS[selector](q, k_cmp, lse, config, cu_seqlens, longest, q_start).contiguous()


def _fake(q: Tensor, k_cmp: Tensor, lse: Tensor, *rest: object) -> Tensor:
    shape = rest[3]
    assert isinstance(shape, (list, tuple))
    n = config_of(list(shape), 1.0).num_selected
    return q.new_empty(q.shape[0], q.shape[1], k_cmp.shape[2], n, dtype=torch.int32)


_SELECT = define(
    "select_blocks(Tensor q, Tensor k_cmp, Tensor lse, Tensor? cu_seqlens, SymInt longest, "
    "SymInt q_start, int[] shape, float scale, str selector) -> Tensor",
    _forward,
    _fake,
)


@torch.no_grad()
def select(
    selector: str,
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    q_start: int,
) -> Tensor:
    """Runs one of :data:`SELECTORS` as an operator; see :class:`Selector`."""
    longest = q_start + q.shape[1] if cu_seqlens is None or max_seqlen is None else max_seqlen
    scale = config.softmax_scale
    return _SELECT(
        q.detach(),
        k_cmp.detach(),
        lse.detach(),
        cu_seqlens,
        longest,
        q_start,
        geometry(config),
        scale,
        selector,
    )
