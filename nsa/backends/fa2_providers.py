"""Where FlashAttention-2 comes from, behind one narrow interface.

What the sources disagree on is normalised here: keys and rows are aligned at the bottom right, a
window of ``w`` tokens counts the query's own, the log-sum-exp is natural, laid out like q, and −inf
where a row sees nothing.

B batch, T query tokens, S key tokens, H query heads, K key/value heads, D head size (one for keys
and values). Packed tensors drop B: ``[total, H, D]``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from nsa.errors import BackendUnavailable

NEG_INF = float("-inf")

_BROKEN = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError)
"""What importing or calling a package that does not fit this machine may raise."""


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


class Provider(Protocol):
    """Forward and backward of attention; q ``[B, T, H, D]`` or packed ``[total, H, D]``."""

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
            dout.contiguous(),
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


class FlashAttn:
    """The ``flash_attn`` package, version 2."""

    name = "flash_attn"

    def __init__(self, interface: Any) -> None:
        self._interface = interface

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """See :class:`Provider`."""
        options = {
            "dropout_p": 0.0,
            "softmax_scale": call.scale,
            "causal": call.causal,
            "window_size_left": call.left,
            "window_size_right": call.right,
            "softcap": 0.0,
            "alibi_slopes": None,
            "return_softmax": False,
        }
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
        given = (dout.contiguous(), q, k, v, out, _heads_first(lse), dq, dk, dv)
        options = {
            "dropout_p": 0.0,
            "softmax_scale": call.scale,
            "causal": call.causal,
            "window_size_left": call.left,
            "window_size_right": call.right,
            "softcap": 0.0,
            "alibi_slopes": None,
            "deterministic": False,
        }
        if call.cu_q is None:
            self._interface._flash_attn_backward(*given, **options)
        else:
            packing = (call.cu_q, call.cu_k, call.max_q, call.max_k)
            self._interface._flash_attn_varlen_backward(*given, *packing, **options)
        return dq, dk, dv


class Math:
    """FlashAttention-2's contract in plain PyTorch: any device, any float dtype, for tests."""

    name = "math"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """See :class:`Provider`."""
        if call.cu_q is not None:
            out, lse = torch.full_like(q, float("nan")), q.new_full(q.shape[:2], float("nan"))
            lse = lse.to(_wide(q.dtype))
            for rows, keys, one in _sequences(call):
                parts = self.forward(q[None, rows], k[None, keys], v[None, keys], one)
                out[rows], lse[rows] = parts[0][0], parts[1][0]
            return out, lse
        p, lse = _probabilities(q, k, call)
        out = torch.einsum("bkgts,bskd->btkgd", p, v.to(p.dtype)).flatten(2, 3)
        return out.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Provider`."""
        if call.cu_q is not None:
            dq, dk, dv = (torch.full_like(x, float("nan")) for x in (q, k, v))
            for rows, keys, one in _sequences(call):
                given = dout[None, rows], q[None, rows], k[None, keys], v[None, keys]
                parts = self.backward(*given, out[None, rows], lse[None, rows], one)
                for grad, part, span in zip((dq, dk, dv), parts, (rows, keys, keys), strict=True):
                    grad[span] = part[0]
            return dq, dk, dv
        p, _ = _probabilities(q, k, call, lse)
        B, T, H, D = q.shape
        K, wide = k.shape[2], p.dtype
        q_BTKGD, dout_BTKGD = (
            x.to(wide).view(B, T, K, H // K, D) for x in (q, dout.reshape(q.shape))
        )
        delta = (dout.to(wide) * out).sum(-1).view(B, T, K, H // K).permute(0, 2, 3, 1)
        dp = torch.einsum("btkgd,bskd->bkgts", dout_BTKGD, v.to(wide))
        ds = p * (dp - delta[..., None]) * call.scale
        dq = torch.einsum("bkgts,bskd->btkgd", ds, k.to(wide)).reshape(q.shape)
        dk = torch.einsum("bkgts,btkgd->bskd", ds, q_BTKGD)
        dv = torch.einsum("bkgts,btkgd->bskd", p, dout_BTKGD)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sequences(call: Call) -> list[tuple[slice, slice, Call]]:
    """Rows, keys and the regular call of each packed sequence."""
    assert call.cu_q is not None
    assert call.cu_k is not None
    rows, keys = call.cu_q.tolist(), call.cu_k.tolist()
    result = []
    for i in range(len(rows) - 1):
        one = replace(
            call, cu_q=None, cu_k=None, max_q=rows[i + 1] - rows[i], max_k=keys[i + 1] - keys[i]
        )
        result.append((slice(rows[i], rows[i + 1]), slice(keys[i], keys[i + 1]), one))
    return result


def _probabilities(
    q: Tensor, k: Tensor, call: Call, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``[B, K, G, T, S]`` and lse ``[B, T, H]``; normalised by ``lse`` if it is given."""
    B, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    wide = _wide(q.dtype)
    q_BTKGD = q.to(wide).view(B, T, K, H // K, D)
    scores = call.scale * torch.einsum("btkgd,bskd->bkgts", q_BTKGD, k.to(wide))
    t = torch.arange(T, device=q.device)[:, None] + S - T
    s = torch.arange(S, device=q.device)
    hidden = torch.zeros(T, S, dtype=torch.bool, device=q.device)
    if call.causal:
        hidden |= s > t
    if call.window is not None:
        hidden |= s <= t - call.window
    scores = scores.masked_fill(hidden, NEG_INF)
    if lse is None:
        lse_BKGT = scores.logsumexp(-1)
    else:
        lse_BKGT = lse.view(B, T, K, H // K).permute(0, 2, 3, 1)
    p = (scores - lse_BKGT.masked_fill(lse_BKGT == NEG_INF, float("inf"))[..., None]).exp()
    return p, lse_BKGT.permute(0, 3, 1, 2).reshape(B, T, H)


def provider(name: str, device: torch.device) -> Provider:
    """The provider of that name, or of the first that works for "auto".

    Raises:
        BackendUnavailable: none works, with the reason for each and the fix.
    """
    if name == "math":
        return Math()
    found, reasons = _probe(name, device)
    if found is None:
        raise BackendUnavailable("; ".join(reasons))
    return found


@lru_cache(maxsize=64)
def _probe(name: str, device: torch.device) -> tuple[Provider | None, tuple[str, ...]]:
    """Tries the sources once for each device, never inside a trace."""
    reasons = []
    for source in ("flash_attn", "aten") if name == "auto" else (name,):
        why_not: str | None
        candidate: Provider | None
        if device.type != "cuda":
            candidate, why_not = None, f"FlashAttention-2 needs a CUDA device, got {device.type}"
        elif torch.cuda.get_device_capability(device) < (8, 0):
            major, minor = torch.cuda.get_device_capability(device)
            candidate, why_not = None, f"FlashAttention-2 needs sm80 or newer, got sm{major}{minor}"
        elif source == "flash_attn":
            candidate, why_not = _find_package()
        else:
            candidate, why_not = _find_aten()
        if candidate is not None:
            why_not = _wrong(candidate, device)
            if why_not is None:
                return candidate, ()
        reasons.append(f"{source}: {why_not}")
    return None, tuple(reasons)


def _find_package() -> tuple[Provider | None, str | None]:
    """``flash_attn``, by the distribution's name: flash-attn-4 installs a folder so called, too."""
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        try:
            other = importlib.metadata.version("flash-attn-4")
        except importlib.metadata.PackageNotFoundError:
            return None, "the package is not installed: pip install flash-attn"
        return None, (
            f"only flash-attn-4 {other} is installed, whose flash_attn folder is not "
            "FlashAttention-2: pip install flash-attn"
        )
    if not version.startswith("2."):
        return None, f"expected version 2 of flash-attn, got {version}"
    try:
        return FlashAttn(importlib.import_module("flash_attn.flash_attn_interface")), None
    except _BROKEN as error:
        return None, (
            f"flash-attn {version} does not import ({type(error).__name__}: {error}): build it "
            f"for torch {torch.__version__} (pip install --no-build-isolation --force-reinstall "
            "flash-attn)"
        )


def _find_aten() -> tuple[Provider | None, str | None]:
    if not torch.backends.cuda.is_flash_attention_available():
        return None, "this build of torch has no FlashAttention kernels"
    return Aten(), None


def _wrong(candidate: Provider, device: torch.device) -> str | None:
    """What a tiny call gets wrong, forward or backward; None if it is right."""
    generator = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(2, 40, 4, 32, generator=generator) for _ in range(2))
    k, v = (torch.randn(2, 40, 2, 32, generator=generator) for _ in range(2))
    call = Call(scale=0.2, causal=True, window=9, max_q=40, max_k=40)
    truth = Math()
    want_out, want_lse = truth.forward(q, k, v, call)
    want = (want_out, want_lse, *truth.backward(dout, q, k, v, want_out, want_lse, call))
    q, k, v, dout = (x.to(device, torch.float16) for x in (q, k, v, dout))
    try:
        out, lse = candidate.forward(q, k, v, call)
        got = (out, lse, *candidate.backward(dout, q, k, v, out, lse, call))
    except _BROKEN as error:
        return f"a small call failed ({type(error).__name__}: {error})"
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        error_ = ((x.float().cpu() - y).norm() / y.norm()).item()
        if not error_ < 8 * torch.finfo(torch.float16).eps:
            return f"a small call gave wrong numbers ({name}: relative error {error_:.2g})"
    return None
