"""FlashAttention-2's calls, as every source of it is called: behind one narrow interface.

What the sources disagree on is normalised here: keys and rows are aligned at the bottom right, a
window of ``w`` tokens counts the query's own, the log-sum-exp is natural, laid out like q, and −inf
where a row sees nothing.

B batch, T query tokens, S key tokens, H query heads, K key/value heads, D head size (one for keys
and values). Packed tensors drop B: ``[total, H, D]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nsa.core.dtypes import NEG_INF


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One FlashAttention-2 problem."""

    scale: float
    causal: bool
    window: int | None = None
    """Keys a row sees at most, its own included; None: all."""
    cu_q: Tensor | None = None
    """int32 ``[n_seq + 1]`` when packed."""
    cu_k: Tensor | None = None
    max_q: int
    """The longest sequence of rows (T when regular)."""
    max_k: int

    @property
    def left(self) -> int:
        """FA-2's left window: keys before the row's own, −1 for all."""
        return -1 if self.window is None else self.window - 1

    @property
    def right(self) -> int:
        """FA-2's right window."""
        return 0 if self.causal else -1


VECTOR_BYTES = 16
"""What one load of FA-2 reads."""


def is_readable(x: Tensor) -> bool:
    """Whether FA-2 can read a tensor: rows contiguous, each at a multiple of its loads."""
    step = VECTOR_BYTES // x.element_size()
    rows = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return (
        x.stride(-1) == 1
        and x.data_ptr() % VECTOR_BYTES == 0
        and all(stride % step == 0 for size, stride in rows if size > 1)
    )


def readable(x: Tensor) -> Tensor:
    """The tensor itself or, where FA-2 could not read it, a copy."""
    return x if is_readable(x) else x.clone(memory_format=torch.contiguous_format)


class Provider(Protocol):
    """Forward and backward of attention; q ``[B, T, H, D]`` or packed ``[total, H, D]``.

    Every tensor is readable (:func:`is_readable`).
    """

    name: str

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """``out`` like q and ``lse`` fp32 ``[B, T, H]`` or ``[total, H]``."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k, v for an output and log-sum-exp that may be those of a merge.

        A row whose lse is −inf gets and gives no gradient.
        """
        ...


def _heads_first(lse: Tensor) -> Tensor:
    """``[B, T, H]`` -> ``[B, H, T]`` with the +inf that FA-2's backward wants for an empty row."""
    lse = lse.masked_fill(lse == NEG_INF, float("inf"))
    return lse.transpose(-1, -2).contiguous()


def _heads_last(lse: Tensor) -> Tensor:
    """FA-2's ``[B, H, T]`` -> ``[B, T, H]``, −inf where it says +inf."""
    return lse.transpose(-1, -2).masked_fill(lse.transpose(-1, -2) == float("inf"), NEG_INF)


class Aten:
    """The FlashAttention-2 kernels that PyTorch brings along."""

    name = "aten"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """See :class:`Provider`."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            call.cu_q,
            call.cu_k,
            call.max_q,
            call.max_k,
            0.0,
            call.causal,
            False,
            scale=call.scale,
            window_size_left=call.left,
            window_size_right=call.right,
        )
        return out, _heads_last(lse)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Provider`."""
        unused = torch.empty((), dtype=torch.uint64, device=q.device)  # no dropout, no seed
        return torch.ops.aten._flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            _heads_first(lse),
            call.cu_q,
            call.cu_k,
            call.max_q,
            call.max_k,
            0.0,
            call.causal,
            unused.new_empty(2),
            unused,
            scale=call.scale,
            window_size_left=call.left,
            window_size_right=call.right,
        )


def _options(call: Call) -> dict[str, Any]:
    """What forward and backward of ``flash_attn`` are told alike."""
    return {
        "dropout_p": 0.0,
        "softmax_scale": call.scale,
        "causal": call.causal,
        "window_size_left": call.left,
        "window_size_right": call.right,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


class FlashAttn:
    """The ``flash_attn`` package, version 2."""

    name = "flash_attn"

    def __init__(self, interface: Any) -> None:
        self._interface = interface

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """See :class:`Provider`."""
        options = {**_options(call), "return_softmax": False}
        if call.cu_q is None:
            out, lse, *_ = self._interface._flash_attn_forward(q, k, v, **options)
        else:
            packing = (call.cu_q, call.cu_k, call.max_q, call.max_k)
            out, lse, *_ = self._interface._flash_attn_varlen_forward(q, k, v, *packing, **options)
        return out, _heads_last(lse)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Provider`."""
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        given = (dout, q, k, v, out, _heads_first(lse), dq, dk, dv)
        deterministic = torch.are_deterministic_algorithms_enabled()  # aten looks at it itself
        options = {**_options(call), "deterministic": deterministic}
        if call.cu_q is None:
            self._interface._flash_attn_backward(*given, **options)
        else:
            packing = (call.cu_q, call.cu_k, call.max_q, call.max_k)
            self._interface._flash_attn_varlen_backward(*given, *packing, **options)
        return dq, dk, dv
