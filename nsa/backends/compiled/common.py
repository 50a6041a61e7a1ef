"""Query rows, V contiguous elements each: making them so, and the sum of each of ``dout * out``.

B batch, T query tokens, H query heads, V value size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.backends.compiled.selected.tiles import padded


def rows_contiguous(x: Tensor) -> Tensor:
    """x itself if its rows are contiguous and offsets within a block fit in int32, else a copy."""
    if x.stride(-1) != 1 or x.stride(1) >= 2**22:
        return x.contiguous()
    return x


@triton.jit(do_not_specialize=["rows"])
def _delta_kernel(
    out,  # [B, T, H, V], contiguous
    dout,
    delta,  # [B, T, H], contiguous; written
    rows,
    T,
    H,
    do_b,
    do_t,
    do_h,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK_V)
    live = row < rows
    mask = live[:, None] & (e < V)[None, :]
    at = row // H // T * do_b + row // H % T * do_t + row % H * do_h
    x = tl.load(out + row[:, None] * V + e[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(dout + at[:, None] + e[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(delta + row, tl.sum(x * y, 1), mask=live)


def row_sums(dout: Tensor, out: Tensor) -> Tensor:
    """delta, fp32 ``[B, T, H]``: the sum of ``dout * out`` ``[B, T, H, V]`` over V."""
    B, T, H, V = out.shape
    delta = torch.empty(B, T, H, dtype=torch.float32, device=out.device)
    if delta.numel() == 0:
        return delta
    dout = rows_contiguous(dout)
    wide = padded(V)
    rows = max(1, 4096 // wide)
    with torch.cuda.device_of(out):
        _delta_kernel[(triton.cdiv(delta.numel(), rows),)](
            out.contiguous(),
            dout,
            delta,
            delta.numel(),
            T,
            H,
            *dout.stride()[:3],
            V=V,
            ROWS=rows,
            BLOCK_V=wide,
        )
    return delta
