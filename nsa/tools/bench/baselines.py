"""What NSA is measured against in the same run: dense causal attention, and a peer.

B batch, T tokens, H query heads, K key/value heads, D key size, V value size.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

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


class Refusal(NSAError):
    """A kernel that cannot run a problem, and says why."""


class Rival(Protocol):
    """One kernel that is not a backend."""

    name: str
    branch: str
    """"selected", or "dense"."""

    def timed(self, inputs: Inputs) -> Timed:
        """Its call; leaves are q, k, v as ``[B, T, H or K, D or V]``, the output ``[B, T, H, V]``.

        Raises:
            Refusal: here, or when it is called.
        """
        ...

    def tune(self) -> None:
        """Before every new problem: forgets what was tuned for another one."""
        ...


def dense_rivals(device: torch.device, packed: bool, settings: Settings) -> tuple[Rival, ...]:
    """The ways to compute dense causal attention on a device, all of which get a row."""
    if device.type != "cuda":
        return (DensePacked("dense SDPA") if packed else DenseSdpa("dense SDPA", None),)
    if packed:
        cudnn = Refusing("dense cuDNN", DENSE, "dense cuDNN: takes regular batches only")
        return (DenseFlash("dense FA-2", settings), cudnn)
    return (
        DenseSdpa("dense FA-2", SDPBackend.FLASH_ATTENTION),
        DenseSdpa("dense cuDNN", SDPBackend.CUDNN_ATTENTION),
    )


class _Dense:
    """Dense causal attention over the window branch's keys and values."""

    branch = DENSE

    def __init__(self, name: str) -> None:
        self.name = name

    def tune(self) -> None:
        """Nothing is tuned."""

    def timed(self, inputs: Inputs) -> Timed:
        """See :class:`Rival`."""
        q, (k, v) = inputs.q, inputs.window
        return Timed(lambda: self._attend(q, k, v, inputs), (q, k, v), inputs.dout)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        raise NotImplementedError


class DenseSdpa(_Dense):
    """``scaled_dot_product_attention`` on one of its kernels, or on what it chooses (None)."""

    def __init__(self, name: str, kernel: SDPBackend | None) -> None:
        super().__init__(name)
        self._kernel = kernel

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        if self._kernel is None:
            return _causal(q, k, v, inputs)
        try:
            with sdpa_kernel(self._kernel):
                return _causal(q, k, v, inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why = self._explain(lambda: _causal(q, k, v, inputs)) or str(error)
            raise Refusal(f"{self.name}: {why}") from error

    def _explain(self, call: Callable[[], object]) -> str:
        """Why no kernel took it: PyTorch says so in warnings, once each."""
        assert self._kernel is not None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with contextlib.suppress(RuntimeError), sdpa_kernel(self._kernel):
                call()
        said = [str(warning.message).split(" (Triggered")[0] for warning in caught]
        noise = ("not used because", "runtime disabled")  # of the kernels that were not asked
        reasons = [text for text in said if not any(part in text for part in noise)]
        return "; ".join(dict.fromkeys(" ".join(text.split()) for text in reasons))


class DensePacked(_Dense):
    """One sequence after the other, for a CPU, which has no kernel for packed ones."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        assert inputs.cu_seqlens is not None
        sizes = inputs.cu_seqlens.diff().tolist()
        parts = zip(*(x.split(sizes, 1) for x in (q, k, v)), strict=True)
        return torch.cat([_causal(q, k, v, inputs) for q, k, v in parts if q.shape[1]], 1)


class DenseFlash(_Dense):
    """FlashAttention-2 on packed sequences: the window step of ``fa2-varlen``, as wide as they are.

    A window that reaches past the longest sequence makes FlashAttention-2 run its causal kernel.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name)
        source = "auto" if settings.fa2_provider == "math" else settings.fa2_provider
        self._settings = replace(settings, fa2_provider=source)

    def timed(self, inputs: Inputs) -> Timed:
        """See :class:`Rival`."""
        q, longest = inputs.q, inputs.max_seqlen
        assert longest is not None
        problem = Problem(
            config=inputs.config,
            device=q.device,
            dtype=q.dtype,
            length=longest,
            packed=True,
            needs_grad=True,
        )
        why_not = unavailable("fa2-varlen", problem, self._settings)
        if why_not is not None:
            raise Refusal(f"{self.name}: {why_not}")
        return super().timed(inputs)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        longest = inputs.max_seqlen
        assert longest is not None
        wide = replace(inputs.config, window=longest + 1)
        steps = load("fa2-varlen", self._settings)
        return steps.window_attention(q, k, v, wide, inputs.cu_seqlens, max_seqlen=longest)[0]


class Refusing:
    """Something that cannot run at all, and still gets a row."""

    def __init__(self, name: str, branch: str, reason: str) -> None:
        self.name, self.branch, self._reason = name, branch, reason

    def tune(self) -> None:
        """Nothing is tuned."""

    def timed(self, inputs: Inputs) -> Timed:
        """See :class:`Rival`."""
        raise Refusal(self._reason)


def _causal(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=inputs.config.softmax_scale, enable_gqa=True
    )
    return out.transpose(1, 2)
