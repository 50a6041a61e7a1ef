"""The product of all projections to heads, rotated, and back: one kernel each.

R rows (B batch * T tokens), P columns of the product, H query heads, K key/value heads, D key size,
V value size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.config import NSAConfig
from nsa.core.kernel import kernel
from nsa.core.rope import Angles

ROWS = 4
"""Of a program, which reads their angles once."""
ELEMENTS = 1024
"""Of a tile of half heads: rows, heads, half a head."""
COLUMNS = 256
"""Of a tile of what is not rotated."""


@dataclass(frozen=True, slots=True)
class Constants:
    """Compile-time constants of a launch."""

    H: int
    K: int
    D: int
    V: int
    GATES: int
    """Columns of the gates; what is left of the product after them is padding."""
    P: int
    ROTATED: bool
    BACKWARD: bool
    """Whether it goes from heads to the product, and turns the other way."""
    ROWS: int
    BLOCK_HALF: int
    """D / 2, padded to a power of two."""
    BLOCK_HEADS: int
    """Heads of a step."""
    COLUMNS: int


@triton.jit
def _angles(table_ptr, row, T, mask, C: tl.constexpr):
    """Of each row, ``[ROWS, 1, BLOCK_HALF]``; table ``[T, D / 2]``."""
    i = tl.arange(0, C.BLOCK_HALF)
    at = (row % T)[:, None, None] * (C.D // 2) + i[None, None, :]
    return tl.load(table_ptr + at, mask=mask[:, None, None] & (i < C.D // 2)[None, None, :])


@triton.jit
def _rotate(product_ptr, heads_ptr, row, mask, cos, sin, HEADS: tl.constexpr, C: tl.constexpr):
    """Heads of D columns each; ``product_ptr`` is at the first of them."""
    HALF: tl.constexpr = C.D // 2
    i = tl.arange(0, C.BLOCK_HALF)
    for step in range(tl.cdiv(HEADS, C.BLOCK_HEADS)):
        head = step * C.BLOCK_HEADS + tl.arange(0, C.BLOCK_HEADS)
        column = head[:, None] * C.D + i[None, :]
        inside = (head < HEADS)[:, None] & (i < HALF)[None, :]
        tile = mask[:, None, None] & inside[None, :, :]
        product = product_ptr + row[:, None, None] * C.P + column[None, :, :]
        heads = heads_ptr + row[:, None, None] * (HEADS * C.D) + column[None, :, :]
        source = heads if C.BACKWARD else product
        target = product if C.BACKWARD else heads
        low = tl.load(source, mask=tile, other=0.0).to(tl.float32)
        high = tl.load(source + HALF, mask=tile, other=0.0).to(tl.float32)
        dtype: tl.constexpr = product_ptr.dtype.element_ty
        tl.store(target, (low * cos - high * sin).to(dtype), mask=tile)
        tl.store(target + HALF, (high * cos + low * sin).to(dtype), mask=tile)


@triton.jit
def _copy(
    product_ptr,
    heads_ptr,
    bias_ptr,
    row,
    mask,
    SIZE: tl.constexpr,
    FILL: tl.constexpr,
    C: tl.constexpr,
):
    """SIZE columns, plus a bias if there is one; backward also zeros in the FILL columns after."""
    for step in range(tl.cdiv(SIZE + FILL, C.COLUMNS)):
        column = step * C.COLUMNS + tl.arange(0, C.COLUMNS)
        tile = mask[:, None] & (column < SIZE)[None, :]
        product = product_ptr + row[:, None] * C.P + column[None, :]
        heads = heads_ptr + row[:, None] * SIZE + column[None, :]
        if C.BACKWARD:
            filled = mask[:, None] & (column < SIZE + FILL)[None, :]
            tl.store(product, tl.load(heads, mask=tile, other=0.0), mask=filled)
        else:
            x = tl.load(product, mask=tile)
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + column, mask=column < SIZE, other=0.0).to(x.dtype)
                x = (x.to(tl.float32) + bias.to(tl.float32)[None, :]).to(x.dtype)
            tl.store(heads, x, mask=tile)


@kernel(do_not_specialize=["R", "T"])
def nsa_split_heads(
    product_ptr,  # [R, P], contiguous, as all that follow
    q_ptr,  # [R, H, D]
    k_ptrs,  # [R, K, D] each
    v_ptrs,  # [R, K, V] each
    gates_ptr,  # [R, GATES]
    bias_ptr,  # [GATES] or None
    cos_ptr,  # fp32 [T, D / 2], with ROTATED, as is the next
    sin_ptr,
    R,
    T,
    C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * C.ROWS + tl.arange(0, C.ROWS)
    mask = row < R
    KEYS: tl.constexpr = C.K * C.D
    VALUES: tl.constexpr = C.K * C.V
    SETS: tl.constexpr = len(k_ptrs)
    if C.ROTATED:
        cos = _angles(cos_ptr, row, T, mask, C)
        sin = _angles(sin_ptr, row, T, mask, C)
        if C.BACKWARD:
            sin = -sin
        _rotate(product_ptr, q_ptr, row, mask, cos, sin, C.H, C)
    else:
        _copy(product_ptr, q_ptr, None, row, mask, C.H * C.D, 0, C)
    product_ptr += C.H * C.D
    for j in tl.static_range(SETS):
        if C.ROTATED:
            _rotate(product_ptr, k_ptrs[j], row, mask, cos, sin, C.K, C)
        else:
            _copy(product_ptr, k_ptrs[j], None, row, mask, KEYS, 0, C)
        product_ptr += KEYS
    for j in tl.static_range(SETS):
        _copy(product_ptr, v_ptrs[j], None, row, mask, VALUES, 0, C)
        product_ptr += VALUES
    FILL: tl.constexpr = C.P - C.H * C.D - SETS * (KEYS + VALUES) - C.GATES
    _copy(product_ptr, gates_ptr, bias_ptr, row, mask, C.GATES, FILL, C)


def split(
    product: Tensor,
    bias: Tensor | None,
    angles: Angles | None,
    config: NSAConfig,
    heads: Sequence[Tensor],
) -> None:
    """product ``[B, T, P]`` -> heads: q ``[B, T, H, D]``, keys, values, gates; written."""
    _launch(product, bias, angles, config, heads, backward=False)


def join(
    product: Tensor, angles: Angles | None, config: NSAConfig, heads: Sequence[Tensor]
) -> None:
    """The gradients of heads -> that of the product; written."""
    _launch(product, None, angles, config, heads, backward=True)


def _launch(
    product: Tensor,
    bias: Tensor | None,
    angles: Angles | None,
    config: NSAConfig,
    heads: Sequence[Tensor],
    *,
    backward: bool,
) -> None:
    B, T, P = product.shape
    if product.numel() == 0:
        return
    q, *keys_and_values, gates = heads
    sets = len(keys_and_values) // 2
    half = triton.next_power_of_2(max(1, config.head_dim // 2))
    C = Constants(
        H=config.num_heads,
        K=config.num_kv_heads,
        D=config.head_dim,
        V=config.dv,
        GATES=gates.shape[2] * gates.shape[3],
        P=P,
        ROTATED=angles is not None,
        BACKWARD=backward,
        ROWS=ROWS,
        BLOCK_HALF=half,
        BLOCK_HEADS=max(1, ELEMENTS // (ROWS * half)),
        COLUMNS=COLUMNS,
    )
    with torch.cuda.device_of(product):
        nsa_split_heads[(triton.cdiv(B * T, ROWS),)](
            product,
            q,
            tuple(keys_and_values[:sets]),
            tuple(keys_and_values[sets:]),
            gates,
            bias,
            *(angles or (None, None)),
            B * T,
            T,
            C=C,
            enable_fp_fusion=True,
        )
