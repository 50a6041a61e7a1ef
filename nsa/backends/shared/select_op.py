"""The operator ``nsa::select_blocks``, one for every backend that selects.

Activation checkpointing can keep its result by name
(``torch.ops.nsa.select_blocks.default``): a list that came out differently when it is recomputed,
at a near-tie, would give wrong gradients in silence.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.core import flops
from nsa.core.operators import config_of, define
from nsa.errors import ShapeError
from nsa.registry import TABLE
from nsa.selection.rules import width


def _forward(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    longest: int,
    q_start: int,
    key: str,
    backend: str,
) -> Tensor:
    module = importlib.import_module(TABLE[backend].module)
    impl = cast("Callable[..., Tensor]", module.select_impl)
    return impl(q, k_cmp, lse, config_of(key), cu_seqlens, longest, q_start).contiguous()


def _fake(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    longest: int,
    q_start: int,
    key: str,
    backend: str,
) -> Tensor:
    n = width(longest, config_of(key))
    return q.new_empty(q.shape[0], q.shape[1], k_cmp.shape[2], n, dtype=torch.int32)


def _flops(x: flops.Arguments) -> int:
    """The scores of the compressed blocks and of regions; ranking is not counted. ``sdpa`` scores
    every query and block, and regions from these."""
    (B, T, H, D), config = x["q"], config_of(x["config"])
    if x["backend"] == "sdpa":
        config = replace(config, select_share=1, select_regions=None)
    lengths = [T] if x["cu_seqlens"] is None else flops.longest_first(T, x["longest"])
    return 2 * D * B * H * sum(flops.search_pairs(config, n, x["q_start"]) for n in lengths)


SELECT_BLOCKS = define(
    "select_blocks(Tensor q, Tensor k_cmp, Tensor lse, Tensor? cu_seqlens, SymInt longest, "
    "SymInt q_start, str config, str backend) -> Tensor",
    _forward,
    _fake,
    count=_flops,
)


@torch.no_grad()
def select(
    backend: str,
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    q_start: int,
) -> Tensor:
    """Run a backend's ``select_impl`` as an operator.

    Args:
        backend: a row of :data:`nsa.registry.TABLE`, whose module has ``select_impl``: the same
            arguments, with ``longest``, which bounds the position past the last query of any
            sequence, in tokens.
        q: ``[B, T, H, D]``; k_cmp: ``[B, N, K, D]``; lse ``[B, T, H]`` of the compressed branch.
        q_start: a multiple of ``select_share``.

    Returns:
        int32 ``[B, T, K, n]``.

    Raises:
        ShapeError: for another ``q_start``.
    """
    m = config.select_share
    if m > 1 and q_start % m:
        raise ShapeError(
            f"q_start: expected a multiple of select_share={m}, got {q_start}; begin with the "
            "first of the queries that share a list"
        )
    longest = q_start + q.shape[1] if cu_seqlens is None or max_seqlen is None else max_seqlen
    given = (q.detach(), k_cmp.detach(), lse.detach())
    return SELECT_BLOCKS(*given, cu_seqlens, longest, q_start, config.key, backend)
