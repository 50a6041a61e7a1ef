"""The ``fa2-varlen`` backend: FlashAttention-2 on packed sequences; ``[B, T]`` is B of them."""

from __future__ import annotations

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
        *,
        max_seqlen: int | None = None,
        q_start: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`nsa.backends.fa2.steps.Steps`."""
        step = super().compressed_attention
        if not _whole(q, config.num_compressed(q.shape[1]), k, cu_seqlens, q_start):
            return step(q, k, v, config, cu_seqlens, max_seqlen=max_seqlen, q_start=q_start)
        out, lse = step(_join(q), _join(k), _join(v), config, _cu(q), max_seqlen=q.shape[1])
        return _split(out, q), _split(lse, q)

    def selected_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_idx: Tensor,
        config: NSAConfig,
        cu_seqlens: Tensor | None = None,
        *,
        max_seqlen: int | None = None,
        q_start: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`nsa.backends.fa2.steps.Steps`."""
        step = super().selected_attention
        if not _whole(q, q.shape[1], k, cu_seqlens, q_start):
            return step(
                q, k, v, block_idx, config, cu_seqlens, max_seqlen=max_seqlen, q_start=q_start
            )
        out, lse = step(
            _join(q), _join(k), _join(v), _join(block_idx), config, _cu(q), max_seqlen=q.shape[1]
        )
        return _split(out, q), _split(lse, q)

    def window_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        config: NSAConfig,
        cu_seqlens: Tensor | None = None,
        *,
        max_seqlen: int | None = None,
        q_start: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`nsa.backends.fa2.steps.Steps`."""
        step = super().window_attention
        if not _whole(q, q.shape[1], k, cu_seqlens, q_start):
            return step(q, k, v, config, cu_seqlens, max_seqlen=max_seqlen, q_start=q_start)
        out, lse = step(_join(q), _join(k), _join(v), config, _cu(q), max_seqlen=q.shape[1])
        return _split(out, q), _split(lse, q)


def _whole(q: Tensor, keys: int, k: Tensor, cu_seqlens: Tensor | None, q_start: int) -> bool:
    """Whether the call is a regular batch of whole sequences, with as many keys as they have."""
    return cu_seqlens is None and q_start == 0 and k.shape[1] == keys


def _cu(q: Tensor) -> Tensor:
    """``cu_seqlens`` of a regular batch."""
    B, T = q.shape[:2]
    return torch.arange(B + 1, dtype=torch.int32, device=q.device) * T


def _join(x: Tensor) -> Tensor:
    """``[B, T, …]`` -> ``[1, B*T, …]``."""
    return x.flatten(0, 1)[None]


def _split(x: Tensor, q: Tensor) -> Tensor:
    """The inverse, for the batch of q."""
    return x.view(q.shape[0], q.shape[1], *x.shape[2:])
