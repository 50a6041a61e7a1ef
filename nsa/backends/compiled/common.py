"""What several kernels share: constants, delta.

B batch, T query tokens, H query heads, V value size.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.backends.compiled.tiling import padded
from nsa.core.kernel import kernel

LOG2E = math.log2(math.e)
LOG2_E = tl.constexpr(LOG2E)
LN_2 = tl.constexpr(math.log(2.0))

_ELEMENTS = 4096
"""Of the tile of one program of :func:`nsa_bwd_preprocess`."""


def rows_contiguous(x: Tensor) -> Tensor:
    """x itself if its rows are contiguous and offsets within a block fit in int32, else a copy."""
    if x.stride(-1) != 1 or x.stride(1) >= 2**22:
        return x.contiguous()
    return x


def positive(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """q and a scale above 0 with the same scores; q is the new one times the third result."""
    if scale > 0:  # kernels mask, or take the running maximum, before scaling
        return q, scale, 1.0
    return (-q, -scale, -1.0) if scale < 0 else (torch.zeros_like(q), 1.0, 0.0)


@kernel(do_not_specialize=["num_rows"])
def nsa_bwd_preprocess(
    out_ptr,  # [B, T, H, V], contiguous
    dout_ptr,
    delta_ptr,  # [B, T, H], contiguous; written
    dout_strides,
    num_rows,
    T,
    H,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_DV)
    row_mask = row < num_rows
    mask = row_mask[:, None] & (e < V)[None, :]
    b, t, h = row // H // T, row // H % T, row % H
    dout_row = b * dout_strides[0] + t * dout_strides[1] + h * dout_strides[2]
    out = tl.load(out_ptr + row[:, None] * V + e[None, :], mask=mask, other=0.0)
    dout = tl.load(dout_ptr + dout_row[:, None] + e[None, :], mask=mask, other=0.0)
    tl.store(delta_ptr + row, tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1), mask=row_mask)


def bwd_preprocess(dout: Tensor, out: Tensor) -> Tensor:
    """delta, fp32 ``[B, T, H]``: the sum of ``dout * out`` ``[B, T, H, V]`` over V."""
    B, T, H, V = out.shape
    delta = torch.empty(B, T, H, dtype=torch.float32, device=out.device)
    if delta.numel() == 0:
        return delta
    out, dout = out.contiguous(), rows_contiguous(dout)
    constants = {"V": V, "BLOCK_M": max(1, _ELEMENTS // padded(V)), "BLOCK_DV": padded(V)}
    constants["enable_fp_fusion"] = True
    grid = (triton.cdiv(delta.numel(), constants["BLOCK_M"]),)
    with torch.cuda.device_of(out):
        nsa_bwd_preprocess[grid](out, dout, delta, dout.stride(), delta.numel(), T, H, **constants)
    return delta
