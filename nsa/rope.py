"""Rotary position embedding, in the half-rotation layout of Llama (arXiv 2104.09864).

Shapes: B batch, T tokens, H heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope(x: Tensor, theta: float, positions: Tensor | None = None) -> Tensor:
    """Rotates each pair ``(x[i], x[i + D/2])`` by ``position * theta**(-2i/D)``.

    Args:
        x: ``[B, T, H, D]``, D even, any float dtype; the rotation is computed in fp32 (fp64 for
            fp64) and rounded once.
        theta: the base of the frequencies.
        positions: integer ``[T]``, the position of each token in its own sequence; None counts
            from 0.

    Returns:
        ``[B, T, H, D]`` in x's dtype.
    """
    length, size = x.shape[1], x.shape[-1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if positions is None:
        positions = torch.arange(length, device=x.device)
    exponent = torch.arange(0, size, 2, device=x.device, dtype=torch.float64) / size
    angle_TD = positions.to(torch.float64)[:, None] * theta**-exponent
    cos_T1D = angle_TD.cos().to(dtype)[:, None, :]
    sin_T1D = angle_TD.sin().to(dtype)[:, None, :]
    low, high = x.to(dtype).chunk(2, dim=-1)
    rotated = torch.cat([low * cos_T1D - high * sin_T1D, high * cos_T1D + low * sin_T1D], dim=-1)
    return rotated.to(x.dtype)
