"""What NSA is measured against in the same run: dense causal attention here, peers in ``peers``.

B batch, T tokens, H query heads, K key/value heads, D key size, V value size.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa.backends import load, unavailable
from nsa.backends.protocol import Problem
from nsa.errors import NSAError
from nsa.settings import Settings
from nsa.testing.inputs import Inputs
from nsa.tools.bench.cases import DENSE, Timed
from nsa.tools.common.problems import run_branch


class Unsupported(NSAError):
    """A kernel cannot run a problem, and says why."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """One kernel that is not a backend."""

    name: str
    branch: str
    """The one that it computes, or "dense"."""
    timed: Callable[[Inputs], Timed]
    """Its call; leaves are q, k, v as ``[B, T, H or K, D or V]``, or none if it has no backward;
    the output ``[B, T, H, V]``. Raises :class:`Unsupported`, here or when it is called."""
    tune: Callable[[], None] = lambda: None
    """Before every new problem: forgets what was tuned for another one."""


def dense_baselines(device: torch.device, packed: bool, settings: Settings) -> tuple[Baseline, ...]:
    """The ways to compute dense causal attention on a device, all of which get a row."""
    if device.type != "cuda":
        return (dense("dense SDPA", _one_by_one if packed else _causal),)
    if packed:
        cudnn = unsupported("dense cuDNN", DENSE, "dense cuDNN: takes regular batches only")
        if settings.fa2_provider == "math":  # a stand-in for tests
            settings = replace(settings, fa2_provider="auto")
        return (dense_flash("dense FA-2", settings), cudnn)
    return (
        dense_kernel("dense FA-2", SDPBackend.FLASH_ATTENTION),
        dense_kernel("dense cuDNN", SDPBackend.CUDNN_ATTENTION),
    )


def dense(name: str, attend: Callable[[Tensor, Tensor, Tensor, Inputs], Tensor]) -> Baseline:
    """Dense causal attention over the window branch's keys and values."""

    def timed(inputs: Inputs) -> Timed:
        leaves = (inputs.q, *inputs.window)
        return Timed(lambda: attend(*leaves, inputs), leaves, inputs.dout)

    return Baseline(name, DENSE, timed)


def dense_kernel(name: str, kernel: SDPBackend) -> Baseline:
    """``scaled_dot_product_attention`` on one of its kernels."""

    def attend(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        try:
            with sdpa_kernel(kernel):
                return _causal(q, k, v, inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why = _explain(kernel, lambda: _causal(q, k, v, inputs)) or str(error)
            raise Unsupported(f"{name}: {why}") from error

    return dense(name, attend)


def dense_flash(name: str, settings: Settings) -> Baseline:
    """FlashAttention-2 on packed sequences: the window step of ``fa2-varlen``, as wide as they are.

    A window that reaches past the longest sequence makes FlashAttention-2 run its causal kernel.
    """

    def timed(inputs: Inputs) -> Timed:
        q, longest = inputs.q, inputs.max_seqlen
        assert longest is not None
        problem = Problem(inputs.config, q.device, q.dtype, longest, packed=True, needs_grad=True)
        why_not = unavailable("fa2-varlen", problem, settings)
        if why_not is not None:
            raise Unsupported(f"{name}: {why_not}")
        wide = replace(inputs, config=replace(inputs.config, window=longest + 1))
        steps = load("fa2-varlen", settings)
        leaves = (q, *inputs.window)
        return Timed(lambda: run_branch(steps, "window", wide)[0], leaves, inputs.dout)

    return Baseline(name, DENSE, timed)


def unsupported(name: str, branch: str, reason: str) -> Baseline:
    """Something that cannot run at all, and still gets a row."""

    def timed(inputs: Inputs) -> Timed:
        raise Unsupported(reason)

    return Baseline(name, branch, timed)


def _causal(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=inputs.config.softmax_scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
    """One packed sequence after the other, for a CPU, which has no kernel for them."""
    assert inputs.cu_seqlens is not None
    sizes = inputs.cu_seqlens.diff().tolist()
    parts = zip(*(x.split(sizes, 1) for x in (q, k, v)), strict=True)
    return torch.cat([_causal(q, k, v, inputs) for q, k, v in parts if q.shape[1]], 1)


def _explain(kernel: SDPBackend, call: Callable[[], object]) -> str:
    """Why no kernel took it: PyTorch says so in warnings, once each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(RuntimeError), sdpa_kernel(kernel):
            call()
    said = [str(warning.message).split(" (Triggered")[0] for warning in caught]
    noise = ("not used because", "runtime disabled")  # of the kernels that were not requested
    reasons = [text for text in said if not any(part in text for part in noise)]
    return "; ".join(dict.fromkeys(" ".join(text.split()) for text in reasons))
