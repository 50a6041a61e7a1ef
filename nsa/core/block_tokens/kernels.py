"""The tokens of every compressed block, and the way back: two copies.

B batch, T tokens, N compressed blocks, K key/value heads, D head size, L tokens of a block. Where
sequences are packed (B = 1), a program finds the sequence of each of its rows by bisection.
"""

from __future__ import annotations

from typing import NamedTuple

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


class Packing(NamedTuple):
    """Packed sequences."""

    cu_seqlens: Tensor
    """int32 ``[n_seq + 1]``, the first token of each, then T."""
    offsets: Tensor
    """int64 ``[n_seq + 1]``, the first compressed block of each, then their number."""


@triton.jit
def _sequence_of(item, offsets_ptr, num_sequences):
    """The last sequence whose first item is not past ``item``; num_sequences for a surplus one."""
    low = tl.zeros_like(item)
    high = low + num_sequences  # the answer is in low … high
    width = num_sequences + 0
    while width > 0:
        middle = (low + high + 1) // 2
        before = tl.load(offsets_ptr + middle) <= item
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
        width = width // 2
    return low


@kernel(do_not_specialize=["T", "N", "num_sequences"])
def nsa_block_tokens_gather(
    x_ptr,  # [B, T, K, D]
    blocks_ptr,  # [B, N, K, L, D], contiguous; written
    packing_ptrs,  # of :class:`Packing`, or None
    x_strides,
    T,
    N,
    num_sequences,
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
    token = n * STRIDE + i
    if packing_ptrs is not None:
        sequence = _sequence_of(n, packing_ptrs[1], num_sequences)
        first_block = tl.load(packing_ptrs[1] + sequence).to(tl.int32)
        token = tl.load(packing_ptrs[0] + sequence) + (n - first_block) * STRIDE + i
        token = tl.minimum(token, T - 1)  # past the last one: of rows that are no block
    token = token.to(tl.int64)
    source = b * x_strides[0] + token * x_strides[1] + kv_head.to(tl.int64) * x_strides[2] + d
    row = tl.load(x_ptr + source, mask=mask)
    tl.store(blocks_ptr + b * N * (KV_HEADS * BLOCK * D) + at, row, mask=mask)


@kernel(do_not_specialize=["T", "N", "num_sequences"])
def nsa_block_tokens_scatter(
    grad_ptr,  # [B, N, K, L, D], contiguous
    total_ptr,  # [B, T, K, D], contiguous; written
    packing_ptrs,  # of :class:`Packing`, or None
    T,
    N,
    num_sequences,
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
    first_block = tl.zeros_like(t)
    end_block = first_block + N
    if packing_ptrs is not None:
        sequence = _sequence_of(t, packing_ptrs[0], num_sequences)
        sequence = tl.minimum(sequence, num_sequences - 1)  # where the mask is off
        t -= tl.load(packing_ptrs[0] + sequence)
        first_block = tl.load(packing_ptrs[1] + sequence).to(tl.int32)
        end_block = tl.load(packing_ptrs[1] + sequence + 1).to(tl.int32)
    for j in tl.static_range(BLOCK // STRIDE):  # a token is in at most l/d blocks
        n = t // STRIDE - j
        i = t - n * STRIDE
        row = first_block + n
        source = ((row.to(tl.int64) * KV_HEADS + kv_head) * BLOCK + i) * D + d
        in_block = mask & (n >= 0) & (row < end_block)
        acc += tl.load(grad_ptr + source, mask=in_block, other=0.0).to(tl.float32)
    tl.store(total_ptr + b * T * (KV_HEADS * D) + at, acc.to(total_ptr.dtype.element_ty), mask=mask)


def gather(x: Tensor, block: int, stride: int, N: int, packing: Packing | None = None) -> Tensor:
    """x ``[B, T, K, D]`` -> ``[B, N, K, L, D]``, block i from token ``i * stride`` of its sequence
    on."""
    B, T, K, D = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    blocks = x.new_empty(B, N, K, block, D)
    grid = (triton.cdiv(N * K * block * D, _ELEMENTS), B)
    constants = _constants(K, D, block, stride)
    where = _pointers(packing), x.stride(), T, N, _num_sequences(packing)
    with torch.cuda.device_of(x):
        nsa_block_tokens_gather[grid](x, blocks, *where, **constants)
    return blocks


def scatter(grad: Tensor, T: int, stride: int, packing: Packing | None = None) -> Tensor:
    """grad ``[B, N, K, L, D]`` -> ``[B, T, K, D]``: each token's sum over its blocks, in fp32."""
    B, N, K, block, D = grad.shape
    grad = grad.contiguous()
    total = grad.new_empty(B, T, K, D)
    grid = (triton.cdiv(T * K * D, _ELEMENTS), B)
    constants = _constants(K, D, block, stride)
    where = _pointers(packing), T, N, _num_sequences(packing)
    with torch.cuda.device_of(grad):
        nsa_block_tokens_scatter[grid](grad, total, *where, **constants)
    return total


def _pointers(packing: Packing | None) -> tuple[Tensor, ...] | None:
    return None if packing is None else tuple(packing)


def _num_sequences(packing: Packing | None) -> int:
    return 1 if packing is None else packing.cu_seqlens.shape[0] - 1


def _constants(K: int, D: int, block: int, stride: int) -> dict[str, int]:
    sizes = {"KV_HEADS": K, "D": D, "BLOCK": block, "STRIDE": stride, "ELEMENTS": _ELEMENTS}
    return {**sizes, "enable_fp_fusion": True}
