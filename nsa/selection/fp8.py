"""Rows rounded to e4m3, each with a scale: for selection scores (``score_dtype="fp8"``), and for
selected keys and values in a cache."""

from __future__ import annotations

import torch
from torch import Tensor

MAX = 448.0
"""The largest number of e4m3."""


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as e4m3, and its scale for each row of the last dimension, fp32."""
    largest = x.abs().amax(-1, keepdim=True).float() / MAX
    scale = largest.masked_fill(largest == 0, 1.0)
    return (x.float() / scale).to(torch.float8_e4m3fn), scale[..., 0]


def dequantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What :func:`quantize` made, in a dtype; x as e4m3 or as its bytes."""
    return (x.view(torch.float8_e4m3fn).float() * scale[..., None]).to(dtype)


def round_rows(x: Tensor) -> Tensor:
    """x rounded to e4m3 with one scale per row of the last dimension, in fp32 (fp64 for fp64)."""
    rounded, scale = quantize(x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return rounded.to(wide) * scale[..., None].to(wide)
