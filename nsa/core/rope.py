"""Rotary position embedding, in the half-rotation layout of Llama (arXiv 2104.09864).

Shapes: B batch, T tokens, H heads, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsa.core.dtypes import accumulation_dtype
from nsa.core.operators import define
from nsa.core.toolchain import has_triton


class Angles(NamedTuple):
    """Cosines and sines of some positions, ``[T, 1, D/2]`` or ``[B, T, 1, D/2]``."""

    cos: Tensor
    sin: Tensor


def rope_angles(positions: Tensor, size: int, theta: float, dtype: torch.dtype) -> Angles:
    """What :func:`apply_rope` makes of positions: heads of ``size`` can share it."""
    tables = rope_table(positions.flatten(), size, theta, dtype)
    return Angles(*(x.view(*positions.shape, 1, x.shape[-1]) for x in tables))


def apply_rope(x: Tensor, theta: float, positions: Tensor | Angles | None = None) -> Tensor:
    """Rotates each pair ``(x[i], x[i + D/2])`` by ``position * theta**(-2i/D)``.

    Args:
        x: ``[B, T, H, D]``, D even, any float dtype; the rotation is computed in fp32 (fp64 for
            fp64) and rounded once.
        theta: the base of the frequencies.
        positions: integer ``[T]``, the position of each token in its own sequence, or ``[B, T]``,
            or what :func:`rope_angles` made of them; None counts from 0.

    Returns:
        ``[B, T, H, D]`` in x's dtype.
    """
    dtype = accumulation_dtype(x)
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device)
    if not isinstance(positions, Angles):
        positions = rope_angles(positions, x.shape[-1], theta, dtype)
    cos_T1D, sin_T1D = positions
    low, high = x.to(dtype).chunk(2, dim=-1)
    rotated = torch.cat([low * cos_T1D - high * sin_T1D, high * cos_T1D + low * sin_T1D], dim=-1)
    return rotated.to(x.dtype)


def _table(positions: Tensor, size: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    exponent = torch.arange(0, size, 2, device=positions.device, dtype=torch.float64) / size
    angle_TD = positions.to(torch.float64)[:, None] * theta**-exponent
    return angle_TD.cos().to(dtype), angle_TD.sin().to(dtype)


def _table_cuda(
    positions: Tensor, size: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same in one kernel in place of ten; PyTorch's where there is no Triton."""
    if not has_triton():
        return _table(positions, size, theta, dtype)
    from nsa.core.angles import table

    return table(positions, size, theta, dtype)


def _table_fake(
    positions: Tensor, size: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = (positions.shape[0], (size + 1) // 2)
    return positions.new_empty(shape, dtype=dtype), positions.new_empty(shape, dtype=dtype)


rope_table = define(
    "rope_table(Tensor positions, int size, float theta, ScalarType dtype) -> (Tensor, Tensor)",
    _table,
    _table_fake,
    cuda=_table_cuda,
)
"""Cosines and sines ``[T, D/2]``: ``(positions [T], D, theta, dtype)``.

An operator, since Inductor would compute them anew, in fp64, for every element that is rotated: a
quarter of a compiled model's step was that.
"""
