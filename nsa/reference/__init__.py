"""The oracle: Native Sparse Attention with dense masks and explicit softmax, step by step.

It is the truth that every backend is held to: slow, quadratic, plain. It runs in any float dtype
up to fp64, on any device, with gradients, and shares nothing with the rest of the library but
:mod:`nsa.config`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa.config import KV, NSAConfig
from nsa.reference.attend import accumulation_dtype
from nsa.reference.branches import compressed_attention, selected_attention, window_attention
from nsa.reference.compression import apply_rope, compress
from nsa.reference.selection import overlap_matrix, select_blocks, selection_scores

__all__ = [
    "apply_rope",
    "compress",
    "compressed_attention",
    "nsa_attention",
    "overlap_matrix",
    "select_blocks",
    "selected_attention",
    "selection_scores",
    "window_attention",
]


def unavailable(problem: Any, settings: Any) -> str | None:
    """Why the oracle cannot run a problem, or None; it reads ``cu_seqlens``."""
    if problem.packed and problem.device.type == "meta":
        return "reference reads cu_seqlens, which has no values on the meta device"
    mass = problem.config.select_mass is not None and problem.config.select_mass < 1
    strict = torch.are_deterministic_algorithms_enabled()
    strict &= not torch.is_deterministic_algorithms_warn_only_enabled()
    if mass and strict and problem.device.type == "cuda":
        return (
            "reference needs torch.cumsum for select_mass, which is not deterministic on CUDA, and "
            "torch.use_deterministic_algorithms(True) is in force: use warn_only=True"
        )
    return None


def nsa_attention(
    q: Tensor,
    compressed: KV,
    selected: KV,
    window: KV,
    gates: Tensor,
    config: NSAConfig,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    block_idx: Tensor | None = None,
    q_start: int = 0,
) -> Tensor:
    """The gated sum of the three branches (Eq. 5); the shapes of :func:`nsa.nsa_attention`."""
    if block_idx is None:
        block_idx = select_blocks(q, compressed.k, config, cu_seqlens, q_start=q_start)
    outputs = (
        compressed_attention(q, *compressed, config, cu_seqlens, q_start=q_start)[0],
        selected_attention(q, *selected, block_idx, config, cu_seqlens, q_start=q_start)[0],
        window_attention(q, *window, config, cu_seqlens, q_start=q_start)[0],
    )
    dtype = accumulation_dtype(q.dtype)
    branches = zip(gates.unbind(-1), outputs, strict=True)
    return sum(gate[..., None] * out.to(dtype) for gate, out in branches).to(q.dtype)  # type: ignore[union-attr]
