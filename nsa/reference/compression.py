"""φ and RoPE of the oracle.

B batch, T tokens, N compressed blocks, H heads, D head size, L tokens of a block.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.config import NSAConfig
from nsa.reference.packing import spans


def apply_rope(x: Tensor, theta: float, cu_seqlens: Tensor | None = None) -> Tensor:
    """Rotates ``(x[i], x[i + D/2])`` by ``t * theta**(-2i/D)``, t counted in its own sequence.

    Args:
        x: ``[B, T, H, D]``.
    """
    B, T, _, D = x.shape
    t = torch.arange(T, device=x.device)
    if cu_seqlens is not None:
        for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            t[start:end] -= start
    i = torch.arange(D // 2, device=x.device, dtype=torch.float64)
    angle = t[:, None] / theta ** (2 * i / D)
    rotation = torch.polar(torch.ones_like(angle), angle)[:, None, :]
    pairs = torch.complex(x[..., : D // 2].double(), x[..., D // 2 :].double())
    turned = pairs * rotation
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def compress(
    x: Tensor,
    weights: Mapping[str, Tensor],
    config: NSAConfig,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """φ: every block of ``l`` tokens, one every ``d``, becomes one row (Eq. 7).

    Args:
        x: keys or values ``[B, T, H, D]``.
        weights: "mlp": ``position [L, D]``, ``up.weight [2D, L*D]``, ``up.bias``,
            ``down.weight [D, 2D]``, ``down.bias``; "linear": ``proj.weight [D, L*D]``,
            ``proj.bias``; "mean": nothing.

    Returns:
        ``[B, N, H, D]``; packed, ``[1, T // d, H, D]`` with zeros past the last block.
    """
    if cu_seqlens is not None:
        parts = [compress(x[:, seq.tokens], weights, config) for seq in spans(cu_seqlens, config)]
        rows = torch.cat(parts, dim=1)
        surplus = x.shape[1] // config.compress_stride - rows.shape[1]
        return F.pad(rows, (0, 0, 0, 0, 0, surplus))
    first = torch.arange(config.num_compressed(x.shape[1]), device=x.device)
    first = first * config.compress_stride
    tokens = first[:, None] + torch.arange(config.compress_block, device=x.device)
    blocks_BNHLD = x[:, tokens].transpose(2, 3)
    if config.compression == "mean":
        return blocks_BNHLD.mean(dim=3)
    if config.compression == "linear":
        flat = blocks_BNHLD.flatten(3)
        return F.linear(flat, weights["proj.weight"], weights["proj.bias"])
    flat = (blocks_BNHLD + weights["position"]).flatten(3)
    hidden = F.gelu(F.linear(flat, weights["up.weight"], weights["up.bias"]))
    return F.linear(hidden, weights["down.weight"], weights["down.bias"])
