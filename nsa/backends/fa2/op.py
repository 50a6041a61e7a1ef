"""What both FlashAttention-2 backends begin with: what it can run, and a differentiable call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.backends.fa2.providers import Call, provider
from nsa.backends.protocol import Problem
from nsa.core.operators import define, lse_dtype
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


def _call(
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
    window: int | None,
) -> Call:
    return Call(
        scale=scale,
        causal=causal,
        window=window,
        cu_q=cu_q,
        cu_k=cu_k,
        max_q=max_q,
        max_k=max_k,
    )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
    window: int | None,
    source: str,
) -> tuple[Tensor, Tensor]:
    call = _call(cu_q, cu_k, max_q, max_k, scale, causal, window)
    out, lse = provider(source, q.device).forward(q, k, v, call)
    return out.contiguous(), lse.contiguous()


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
    window: int | None,
    source: str,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _call(cu_q, cu_k, max_q, max_k, scale, causal, window)
    dq, dk, dv = provider(source, q.device).backward(dout, q, k, v, out, lse, call)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


_CALL = (
    "Tensor? cu_q, Tensor? cu_k, SymInt max_q, SymInt max_k, float scale, bool causal, "
    "SymInt? window, str source"
)
_BACKWARD = define(
    "flash_attention_2_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_CALL}) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda dout, q, k, v, *rest: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)


def _gradients(
    inputs: tuple[Any, ...], saved: tuple[Tensor, ...], dout: Tensor
) -> tuple[Tensor | None, ...]:
    return (*_BACKWARD(dout, *saved, *inputs[5:]), *(None,) * 8)


_FLASH = define(
    f"flash_attention_2(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor)",
    _forward,
    lambda q, k, v, *rest: (
        q.new_empty(q.shape),
        q.new_empty(q.shape[:-1], dtype=lse_dtype(q)),
    ),
    saved=lambda inputs, outputs: (*inputs[:3], *outputs, *inputs[3:5]),
    gradients=_gradients,
)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, call: Call, source: str
) -> tuple[Tensor, Tensor]:
    """One call of a provider, by its name; shapes as in :class:`Provider`, one head size."""
    return _FLASH(
        q,
        k,
        v,
        call.cu_q,
        call.cu_k,
        call.max_q,
        call.max_k,
        call.scale,
        call.causal,
        call.window,
        source,
    )
