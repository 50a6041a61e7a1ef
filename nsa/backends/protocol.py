"""What a backend is: four step functions under one private signature.

The public functions validate; a backend trusts its arguments. B batch, T query tokens, S key
tokens, N compressed blocks, H query heads, K key/value heads, D key size, V value size.

Common to every step:
    cu_seqlens: int32 ``[n_seq + 1]`` on q's device, or None for a regular batch. Packed input has
        B = 1 and ``q_start`` 0.
    max_seqlen: an upper bound of the packed lengths (int), or None.
    q_start: the position of q's first row in its sequence; keys start at position 0, so that
        decode is no special case.

Every ``out`` has q's dtype; every ``lse`` is ``[B, T, H]``, natural log, fp32 (fp64 for fp64) and
detached; a row that sees no key has out 0 and lse −inf.

A backend's module may have besides:
    ``bind(settings) -> Backend``: the steps are those of the object it returns.
    ``unavailable(problem, settings) -> str | None``: why it cannot run a problem.
    ``delegated(problem, settings) -> dict[str, str]``: the steps that ``sdpa`` runs, and why.
    ``decode_unavailable(problem, *, e4m3) -> str | None``: why ``sdpa`` runs a step of decode.
    ``select_impl(q, k_cmp, lse, config, cu_seqlens, longest, q_start)``: what
    :func:`nsa.backends.shared.select_op.select` runs for it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.core.inputs import AttentionInputs, DecodeInputs

STEPS = ("compressed", "select", "selected", "window")
"""The names under which ``Resolution.per_branch`` lists what runs each step."""


class Problem(NamedTuple):
    """What decides whether a backend can run a call."""

    config: NSAConfig
    device: torch.device
    dtype: torch.dtype
    length: int
    """The longest sequence, in tokens (T for a regular batch)."""
    packed: bool
    needs_grad: bool
    sharded: bool = False
    """Whether a call may be of some rows of a sequence, with gradients (context parallelism)."""


class Backend(Protocol):
    """The steps of one backend; a module with these functions is one."""

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
        """q ``[B, T, H, D]``, k ``[B, N, K, D]``, v ``[B, N, K, V]`` -> (out, lse)."""
        ...

    def select_blocks(
        self,
        q: Tensor,
        k_cmp: Tensor,
        config: NSAConfig,
        cu_seqlens: Tensor | None = None,
        *,
        max_seqlen: int | None = None,
        q_start: int = 0,
        lse: Tensor | None = None,
    ) -> Tensor:
        """q ``[B, T, H, D]``, k_cmp ``[B, N, K, D]`` -> int32 ``[B, T, K, n]``.

        Lists may be narrower where ``n`` is far more than there are blocks (``Rule.width``).
        ``lse`` is the compressed branch's, if it has been computed.
        """
        ...

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
        """q ``[B, T, H, D]``, k ``[B, S, K, D]``, v ``[B, S, K, V]`` -> (out, lse)."""
        ...

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
        """q ``[B, T, H, D]``, k ``[B, S, K, D]``, v ``[B, S, K, V]`` -> (out, lse)."""
        ...


class Gated(Protocol):
    """What a backend may have besides: the gated sum at once, where it runs all three branches."""

    def gated_attention(
        self,
        inputs: AttentionInputs,
        out_cmp: Tensor,
        lse_cmp: Tensor,
        block_idx: Tensor,
        config: NSAConfig,
        *,
        gates_in_unit_interval: bool = False,
    ) -> Tensor:
        """``Σ_c gate_c * o_c``, ``[B, T, H, V]``.

        ``out_cmp`` and ``lse_cmp`` are the compressed branch's and carry no gradient: what flows
        back through that branch is this function's to compute. ``gates_in_unit_interval``: every
        gate is in 0…1.
        """
        ...


class Decoder(Protocol):
    """What a backend with ``decodes`` in its row has besides."""

    def decode_attention(self, inputs: DecodeInputs, config: NSAConfig) -> tuple[Tensor, Tensor]:
        """One step of decode -> (the gated sum ``[B, S, H, V]`` in q's dtype, int32
        ``[B, S, K, n]``, the lists that were read). Nothing is read back from the device."""
        ...
