"""Whether FlashAttention-2 is here and right: the flash-attn package, and PyTorch's own kernels.

That a package is installed, or imports, says little: one built for another torch fails to load, and
one built for another GPU loads and cannot run. So each is called once and its numbers are compared.
B batch, T tokens, H heads, D head size.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa.tools._machine import version_of

ABSENT, BROKEN, WRONG, IDLE, WORKS = "absent", "broken", "wrong numbers", "not run", "works"

_EXPECTED = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError)
"""What importing or calling a package that does not fit this machine may raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One source of FlashAttention-2."""

    name: str
    version: str | None
    status: str
    """One of "absent", "broken", "wrong numbers", "not run", "works"."""
    detail: str
    """The exact error, or why there is none."""


def look_at_flash_attn(device: torch.device | None) -> Provider:
    """The ``flash_attn`` package; it is called on ``device``, unless that is None."""
    version, version_4 = version_of("flash-attn"), version_of("flash-attn-4")
    name = "flash-attn (package)"
    if version is None and (version_4 is not None or not _has_flash_attn()):
        detail = (
            "not installed"
            if version_4 is None
            else f"only flash-attn-4 {version_4} is installed: its flash_attn folder is not "
            "FlashAttention-2"
        )
        return Provider(name=name, version=None, status=ABSENT, detail=detail)
    try:
        function = importlib.import_module("flash_attn").flash_attn_func
    except _EXPECTED as error:
        return Provider(name=name, version=version, status=BROKEN, detail=_exact(error))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v, causal=True)
        if not isinstance(out, Tensor):
            raise TypeError(f"flash_attn_func: expected a tensor, got {type(out).__name__}")
        return out

    return _called(name, version, attend, device, imports="imports")


def look_at_torch(device: torch.device | None) -> Provider:
    """The FlashAttention-2 kernels that PyTorch brings along."""
    name = "PyTorch's own"
    if not torch.backends.cuda.is_flash_attention_available():
        return Provider(
            name=name,
            version=torch.__version__,
            status=ABSENT,
            detail="this torch build has no FlashAttention kernels",
        )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2)

    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    chosen = current() if current is not None else None
    imports = "built in" if chosen is None else f"built in; {chosen} is active in its place"
    return _called(name, torch.__version__, attend, device, imports=imports)


def _called(
    name: str,
    version: str | None,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    device: torch.device | None,
    *,
    imports: str,
) -> Provider:
    if device is None:
        detail = f"{imports}; not called: torch sees no CUDA device"
        return Provider(name=name, version=version, status=IDLE, detail=detail)
    try:
        error, bound = error_of_call(attend, device)
    except _EXPECTED as failure:
        return Provider(name=name, version=version, status=BROKEN, detail=_exact(failure))
    right = error <= bound  # false for NaN
    return Provider(
        name=name,
        version=version,
        status=WORKS if right else WRONG,
        detail=f"{imports}; relative error {error:.2g} of a small forward and backward, "
        f"expected at most {bound:.2g}",
    )


def error_of_call(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], device: torch.device
) -> tuple[float, float]:
    """The largest relative error of a causal call's output and gradients, and what is allowed.

    fp16 inputs ``[B, T, H, D]``, against explicit softmax in fp64. The bound is two units of fp16's
    spacing: right kernels stay within half of one, wrong ones miss it by orders of magnitude.
    """
    dtype = torch.float16
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 48, 2, 64, generator=generator).to(device, dtype) for _ in range(4)]
    *qkv, grad = inputs

    def run(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    actual = run(attend, qkv)
    expected = run(_explicit, [x.double() for x in qkv])
    errors = [
        float((x.double() - y).norm() / y.norm()) for x, y in zip(actual, expected, strict=True)
    ]
    worst = max(errors) if all(e == e for e in errors) else float("nan")
    return worst, 2 * torch.finfo(dtype).eps


def _explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


def _has_flash_attn() -> bool:
    try:
        return importlib.util.find_spec("flash_attn") is not None
    except ValueError:  # a module without a spec stands in sys.modules
        return True


def _exact(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
