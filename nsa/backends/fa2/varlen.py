"""The ``fa2-varlen`` backend: FlashAttention-2 on packed sequences; ``[B, T]`` is B of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa.backends.fa2.flags import delegated, unavailable
from nsa.backends.fa2.steps import Steps
from nsa.backends.shared.workspace import Store
from nsa.config import NSAConfig
from nsa.settings import Settings

__all__ = ["VarlenSteps", "bind", "delegated", "unavailable"]


def bind(settings: Settings) -> VarlenSteps:
    """The steps, on the provider that the settings name, with a workspace that is kept."""
    store = Store(kept=True, rows=settings.prealloc_varlen_n, keys=settings.prealloc_varlen_k)
    return VarlenSteps(settings.fa2_provider, store)


class VarlenSteps(Steps):
    """Packs a regular batch; a step of some rows only (decode) is regular as it is."""

    def compressed_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        config: NSAConfig,
        cu_seqlens: Tensor | None = None,
        **positions: Any,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`nsa.backends.fa2.steps.Steps`."""
        step, keys = super().compressed_attention, config.num_compressed(q.shape[1])
        return _packed(step, keys, (q, k, v), config, cu_seqlens, **positions)

    def selected_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_idx: Tensor,
        config: NSAConfig,
        cu_seqlens: Tensor | None = None,
        **positions: Any,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`nsa.backends.fa2.steps.Steps`."""
        tensors = (q, k, v, block_idx)
        step = super().selected_attention
        return _packed(step, q.shape[1], tensors, config, cu_seqlens, **positions)

    def window_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        config: NSAConfig,
        cu_seqlens: Tensor | None = None,
        **positions: Any,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`nsa.backends.fa2.steps.Steps`."""
        step = super().window_attention
        return _packed(step, q.shape[1], (q, k, v), config, cu_seqlens, **positions)


def _packed(
    step: Callable[..., tuple[Tensor, Tensor]],
    keys: int,
    tensors: tuple[Tensor, ...],
    config: NSAConfig,
    cu_seqlens: Tensor | None,
    *,
    max_seqlen: int | None = None,
    q_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Run a step on a regular batch of whole sequences, with so many keys each, as packed ones."""
    q, k = tensors[:2]
    B, T = q.shape[:2]
    if cu_seqlens is not None or q_start != 0 or k.shape[1] != keys:
        return step(*tensors, config, cu_seqlens, max_seqlen=max_seqlen, q_start=q_start)
    cu_seqlens = torch.arange(B + 1, dtype=torch.int32, device=q.device) * T
    joined = (x.flatten(0, 1)[None] for x in tensors)
    out, lse = step(*joined, config, cu_seqlens, max_seqlen=T)
    return out.view(B, T, *out.shape[2:]), lse.view(B, T, *lse.shape[2:])
