"""The tokens of every compressed block of a regular batch, and the way back: two copies.

B batch, T tokens, N compressed blocks, K key/value heads, D head size, L tokens of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 2048
"""Of one program."""
MOST_ELEMENTS = 2**31 - 2 * _ELEMENTS
"""Of one batch row's blocks: offsets within it are int32."""
MOST_ROWS = 65_535
"""Batch rows, in the second dimension of CUDA's grid."""


@triton.jit(do_not_specialize=["N"])
def _gather(
    x,  # [B, T, K, D]
    blocks,  # [B, N, K, L, D], contiguous; written
    N,
    x_b,
    x_t,
    x_k,
    K: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    STRIDE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    at = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)  # within one batch row
    b = tl.program_id(1).to(tl.int64)
    live = at < N * (K * L * D)
    d = at % D
    m = at // D % L
    k = at // (D * L) % K
    n = at // (D * L * K)
    source = b * x_b + (n * STRIDE + m).to(tl.int64) * x_t + k.to(tl.int64) * x_k + d
    row = tl.load(x + source, mask=live)
    tl.store(blocks + b * N * (K * L * D) + at, row, mask=live)


@triton.jit(do_not_specialize=["T", "N"])
def _scatter(
    grad,  # [B, N, K, L, D], contiguous
    total,  # [B, T, K, D], contiguous; written
    T,
    N,
    K: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    STRIDE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    at = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    b = tl.program_id(1).to(tl.int64)
    live = at < T * (K * D)
    d = at % D
    k = at // D % K
    t = at // (D * K)
    grad += b * N * (K * L * D)
    acc = tl.zeros([ELEMENTS], tl.float32)
    for j in tl.static_range(L // STRIDE):  # a token is in at most l/d blocks
        n = t // STRIDE - j
        m = t - n * STRIDE
        source = ((n.to(tl.int64) * K + k) * L + m) * D + d
        acc += tl.load(grad + source, mask=live & (n >= 0) & (n < N), other=0.0).to(tl.float32)
    tl.store(total + b * T * (K * D) + at, acc.to(total.dtype.element_ty), mask=live)


def gather(x: Tensor, block: int, stride: int, N: int) -> Tensor:
    """x ``[B, T, K, D]`` -> ``[B, N, K, L, D]``, block i from token ``i * stride`` on."""
    B, _, K, D = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    blocks = x.new_empty(B, N, K, block, D)
    grid = (triton.cdiv(N * K * block * D, _ELEMENTS), B)
    with torch.cuda.device_of(x):
        _gather[grid](
            x, blocks, N, *x.stride()[:3], K=K, D=D, L=block, STRIDE=stride, ELEMENTS=_ELEMENTS
        )
    return blocks


def scatter(grad: Tensor, T: int, stride: int) -> Tensor:
    """grad ``[B, N, K, L, D]`` -> ``[B, T, K, D]``: each token's sum over its blocks, in fp32."""
    B, N, K, block, D = grad.shape
    grad = grad.contiguous()
    total = grad.new_empty(B, T, K, D)
    grid = (triton.cdiv(T * K * D, _ELEMENTS), B)
    with torch.cuda.device_of(grad):
        _scatter[grid](grad, total, T, N, K=K, D=D, L=block, STRIDE=stride, ELEMENTS=_ELEMENTS)
    return total
