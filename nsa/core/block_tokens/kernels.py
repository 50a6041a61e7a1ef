"""The tokens of every compressed block of a fixed-length batch, and the way back: two copies.

B batch, T tokens, N compressed blocks, K key/value heads, D head size, L tokens of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.core.kernel import kernel

_ELEMENTS = 2048
"""Of one program."""
MOST_ELEMENTS = 2**31 - 2 * _ELEMENTS
"""Of one batch row's blocks: offsets within it are int32."""
MOST_ROWS = 65_535
"""Batch rows, in the second dimension of CUDA's grid."""


@kernel(do_not_specialize=["N"])
def nsa_block_tokens_gather(
    x_ptr,  # [B, T, K, D]
    blocks_ptr,  # [B, N, K, L, D], contiguous; written
    x_strides,
    N,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    at = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)  # within one batch row
    b = tl.program_id(1).to(tl.int64)
    mask = at < N * (KV_HEADS * BLOCK * D)
    d = at % D
    i = at // D % BLOCK
    kv_head = at // (D * BLOCK) % KV_HEADS
    n = at // (D * BLOCK * KV_HEADS)
    token = (n * STRIDE + i).to(tl.int64)
    source = b * x_strides[0] + token * x_strides[1] + kv_head.to(tl.int64) * x_strides[2] + d
    row = tl.load(x_ptr + source, mask=mask)
    tl.store(blocks_ptr + b * N * (KV_HEADS * BLOCK * D) + at, row, mask=mask)


@kernel(do_not_specialize=["T", "N"])
def nsa_block_tokens_scatter(
    grad_ptr,  # [B, N, K, L, D], contiguous
    total_ptr,  # [B, T, K, D], contiguous; written
    T,
    N,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    at = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    b = tl.program_id(1).to(tl.int64)
    mask = at < T * (KV_HEADS * D)
    d = at % D
    kv_head = at // D % KV_HEADS
    t = at // (D * KV_HEADS)
    grad_ptr += b * N * (KV_HEADS * BLOCK * D)
    acc = tl.zeros([ELEMENTS], tl.float32)
    for j in tl.static_range(BLOCK // STRIDE):  # a token is in at most l/d blocks
        n = t // STRIDE - j
        i = t - n * STRIDE
        source = ((n.to(tl.int64) * KV_HEADS + kv_head) * BLOCK + i) * D + d
        in_block = mask & (n >= 0) & (n < N)
        acc += tl.load(grad_ptr + source, mask=in_block, other=0.0).to(tl.float32)
    tl.store(total_ptr + b * T * (KV_HEADS * D) + at, acc.to(total_ptr.dtype.element_ty), mask=mask)


def gather(x: Tensor, block: int, stride: int, N: int) -> Tensor:
    """x ``[B, T, K, D]`` -> ``[B, N, K, L, D]``, block i from token ``i * stride`` on."""
    B, _, K, D = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    blocks = x.new_empty(B, N, K, block, D)
    grid = (triton.cdiv(N * K * block * D, _ELEMENTS), B)
    constants = _constants(K, D, block, stride)
    with torch.cuda.device_of(x):
        nsa_block_tokens_gather[grid](x, blocks, x.stride(), N, **constants)
    return blocks


def scatter(grad: Tensor, T: int, stride: int) -> Tensor:
    """grad ``[B, N, K, L, D]`` -> ``[B, T, K, D]``: each token's sum over its blocks, in fp32."""
    B, N, K, block, D = grad.shape
    grad = grad.contiguous()
    total = grad.new_empty(B, T, K, D)
    grid = (triton.cdiv(T * K * D, _ELEMENTS), B)
    constants = _constants(K, D, block, stride)
    with torch.cuda.device_of(grad):
        nsa_block_tokens_scatter[grid](grad, total, T, N, **constants)
    return total


def _constants(K: int, D: int, block: int, stride: int) -> dict[str, int]:
    sizes = {"KV_HEADS": K, "D": D, "BLOCK": block, "STRIDE": stride, "ELEMENTS": _ELEMENTS}
    return {**sizes, "enable_fp_fusion": True}
