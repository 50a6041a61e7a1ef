"""FlashAttention-2 as one differentiable operator, whoever provides it."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor

from nsa.backends.fa2.calls import Call, readable
from nsa.backends.fa2.providers import provider
from nsa.core import flops
from nsa.core.operators import define_attention


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    *call: Any,
) -> tuple[Tensor, Tensor]:
    *numbers, source = call
    q, k, v = map(readable, (q, k, v))
    out, lse = provider(source, q.device).forward(q, k, v, _call(cu_q, cu_k, *numbers))
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
    *call: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *numbers, source = call
    dout, q, k, v, out = map(readable, (dout, q, k, v, out))
    given = (dout, q, k, v, out, lse, _call(cu_q, cu_k, *numbers))
    dq, dk, dv = provider(source, q.device).backward(*given)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


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
        cu_q=None if cu_q is None else cu_q.contiguous(),
        cu_k=None if cu_k is None else cu_k.contiguous(),
        max_q=max_q,
        max_k=max_k,
    )


def _pairs(x: flops.Arguments) -> int:
    """Every call of ours is causal: the last query sees the last key."""
    *batch, R, H, _ = x["q"]
    S, window = x["k"][-3], x["window"]
    if x["cu_q"] is None:
        return prod(batch) * H * flops.window_pairs(R, window or S, S - R)
    lengths = flops.longest_first(R, x["max_q"])
    return H * sum(flops.window_pairs(n, window or n) for n in lengths)


_FLASH = define_attention(
    "flash_attention_2",
    "Tensor? cu_q, Tensor? cu_k, SymInt max_q, SymInt max_k, float scale, bool causal, "
    "SymInt? window, str source",
    _forward,
    _backward,
    _pairs,
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
