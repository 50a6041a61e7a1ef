"""The rows of q, k, v and of results that a program works on: which they are, loads and stores.

T query tokens, H query heads, G heads per group, D key size, V value size; C is a
:class:`~nsa.backends.compiled.window.tiles.Constants`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.columns import load_rows
from nsa.backends.compiled.window.bounds import step_of


@triton.jit
def locate(tiles, KV_HEADS):
    """Tile, batch row and key head of a program; neighbouring tiles run side by side."""
    pid = tl.program_id(0)
    return (
        pid % tiles,
        (pid // tiles // KV_HEADS).to(tl.int64),
        (pid // tiles % KV_HEADS).to(tl.int64),
    )


@triton.jit
def query_rows(T, KV_HEADS, C: tl.constexpr):
    """The BLOCK_M query rows of a program: TOKENS tokens times the G heads of a key head.

    Returns:
        Batch row, key head, first and last token, then the token, head and mask of each row. Rows
        past the end do what the last token does, and are not stored.
    """
    tile, b, kv_head = locate(tl.cdiv(T, C.TOKENS), KV_HEADS)
    first_t = tile * C.TOKENS
    last_t = tl.minimum(first_t + C.TOKENS, T) - 1
    row = tl.arange(0, C.BLOCK_M)
    t = first_t + row // C.G
    mask = t <= last_t
    return b, kv_head, first_t, last_t, tl.minimum(t, last_t), kv_head * C.G + row % C.G, mask


@triton.jit
def load_heads(ptr, b, t, head, strides, mask, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """:func:`load_rows` of tokens t and heads of a ``[B, T, H, SIZE]`` tensor."""
    at = b * strides[0] + t.to(tl.int64) * strides[1] + head * strides[2]
    return load_rows(ptr, at, strides[3], mask, SIZE, BLOCK)


@triton.jit
def load_keys(
    k_ptr,  # of the batch row and the head, as is v_ptr
    v_ptr,
    k_strides,
    v_strides,
    span,
    begin,
    step,
    MASKED: tl.constexpr,
    C: tl.constexpr,
):
    """Keys and values of one step of a loop, tiles in parts, and their positions."""
    s0 = step_of(span, begin, step, C.BLOCK_N, MASKED)
    n = tl.arange(0, C.BLOCK_N)
    mask = s0 + n < span[1] if MASKED else n >= 0
    at = s0.to(tl.int64)
    k_ptr += at * k_strides[1]
    v_ptr += at * v_strides[1]
    k = load_rows(k_ptr, n * k_strides[1], k_strides[3], mask, C.D, C.BLOCK_D)
    v = load_rows(v_ptr, n * v_strides[1], v_strides[3], mask, C.V, C.BLOCK_DV)
    return k, v, s0 + n
