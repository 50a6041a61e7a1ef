"""The table of cosines and sines in one kernel; see :data:`nsa.core.rope.rope_table`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.core.kernel import kernel

ELEMENTS = 512
"""Of a program."""


@kernel(do_not_specialize=["elements"])
def nsa_rope_table(
    position_ptr,  # [T]
    cos_ptr,  # [T, D / 2], as is the next; written
    sin_ptr,
    elements,  # T * D / 2
    HALF: tl.constexpr,
    LOG2_THETA: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Angles and their functions in fp64, rounded once."""
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = at < elements
    position = tl.load(position_ptr + at // HALF, mask=mask, other=0).to(tl.float64)
    angle = position * tl.exp2((at % HALF).to(tl.float64) * (-LOG2_THETA / HALF))
    tl.store(cos_ptr + at, tl.cos(angle).to(cos_ptr.dtype.element_ty), mask=mask)
    tl.store(sin_ptr + at, tl.sin(angle).to(sin_ptr.dtype.element_ty), mask=mask)


def table(positions: Tensor, size: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[T, D / 2]`` of positions ``[T]``, for heads of an even ``size``."""
    half = size // 2
    cos, sin = (positions.new_empty(positions.shape[0], half, dtype=dtype) for _ in range(2))
    if cos.numel():
        constants = {"HALF": half, "LOG2_THETA": math.log2(theta), "ELEMENTS": ELEMENTS}
        grid = (triton.cdiv(cos.numel(), ELEMENTS),)
        with torch.cuda.device_of(positions):
            nsa_rope_table[grid](
                positions.contiguous(), cos, sin, cos.numel(), **constants, enable_fp_fusion=True
            )
    return cos, sin
