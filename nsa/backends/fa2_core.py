"""What both FlashAttention-2 backends begin with: what it can run, and a differentiable call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa.backends.contract import Problem
from nsa.backends.fa2_providers import Call, Provider, provider
from nsa.errors import BackendUnavailable
from nsa.settings import Settings

MAX_HEAD = 256


def why_not(problem: Problem, settings: Settings) -> str | None:
    """Why FlashAttention-2 cannot run a problem, as far as the two backends agree."""
    config = problem.config
    if max(config.head_dim, config.dv) > MAX_HEAD:
        size = max(config.head_dim, config.dv)
        return f"FlashAttention-2 takes head sizes up to {MAX_HEAD}, got {size}"
    try:
        provider(settings.fa2_provider, problem.device)
    except BackendUnavailable as error:
        return str(error)
    math = settings.fa2_provider == "math"
    if not math and problem.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention-2 takes float16 and bfloat16, got {problem.dtype}"
    return None


def pad_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Widens head sizes with zeros, which add nothing, to one multiple of 8."""
    size = max(-(-x.shape[-1] // 8) * 8 for x in tensors)
    return tuple(F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] != size else x for x in tensors)


class FlashAttention(torch.autograd.Function):
    """``(q, k, v, call, provider) -> out, lse``, one call of the provider each way."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call, source: Provider
    ) -> tuple[Tensor, Tensor]:
        out, lse = source.forward(q, k, v, call)
        ctx.save_for_backward(q, k, v, out, lse, call.cu_q, call.cu_k)
        ctx.call, ctx.source = replace(call, cu_q=None, cu_k=None), source
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
        call = replace(ctx.call, cu_q=cu_q, cu_k=cu_k)
        return (*ctx.source.backward(dout, q, k, v, out, lse, call), None, None)
