"""What the forward and the dq kernel share: the tile of a program, and a step over its union.

A program takes m neighbouring tokens of one key/value head, all G query heads of each as rows of
one tile, and walks over the union of the tokens' block lists (:mod:`.union`): a block that several
of them selected is fetched once, and m*G rows fill a matrix instruction that one token's G rows
would leave mostly idle. C is a :class:`~nsa.backends.compiled.selected.tiles.Constants`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.common import tile_mask


@triton.jit
def locate_tile(T, num_tiles, KV_HEADS, C: tl.constexpr):
    """Batch row, key/value head and number of the union; of each row: the token, the query head,
    its bit in the union's masks, and whether it exists."""
    # Tiles of one head side by side: its keys and values then stay in the L2 cache.
    pid = tl.program_id(0)
    tile = pid % num_tiles
    kv_head = (pid // num_tiles) % KV_HEADS
    b = (pid // num_tiles // KV_HEADS).to(tl.int64)
    row = tl.arange(0, C.BLOCK_M)
    slot = row // C.G
    token = tile * C.TOKENS + slot
    mask = (slot < C.TOKENS) & (token < T)
    head = kv_head * C.G + row % C.G
    bit = tl.where(slot < C.TOKENS, slot, 0)
    return b, kv_head, (b * num_tiles + tile) * KV_HEADS + kv_head, token, head, bit, mask


@triton.jit
def load_queries(ptr, strides, b, token, head, mask, dim, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of ``[B, T, H, SIZE]``."""
    row = token.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[2]
    tile_ptr = ptr + b * strides[0] + row[:, None] + dim[None, :]
    return tl.load(tile_ptr, mask=tile_mask(mask, dim, SIZE, BLOCK), other=0.0)


@triton.jit
def load_keys(
    head_ptr, offsets, stride, first_row, mask, dim, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK_N rows of a head's keys or values, from ``first_row`` on."""
    tile_ptr = head_ptr + first_row.to(tl.int64) * stride + offsets
    return tl.load(tile_ptr, mask=tile_mask(mask, dim, SIZE, BLOCK), other=0.0)


@triton.jit
def union_step(step, first_rows_ptr, masks_ptr, bit, last_row, S, C: tl.constexpr):
    """One step over a tile's union, whose first rows and masks are given. ``last_row``: the last
    key row that a query sees of the blocks that it selected; ``bit``: its own in the masks.

    Returns:
        The step's first key row, which of its keys exist, and ``[BLOCK_M, BLOCK_N]`` which of them
        each row sees.
    """
    n = tl.arange(0, C.BLOCK_N)
    part = (step % C.PARTS) * C.BLOCK_N
    first_row = tl.load(first_rows_ptr + step // C.PARTS) + part
    bits = tl.load(masks_ptr + step // C.PARTS)
    exists = (n < C.SELECT_BLOCK - part) & (first_row + n < S)
    # The last of these keys that each row sees, so that a key costs one comparison.
    causal_limit = tl.minimum(last_row - first_row, C.SELECT_BLOCK - 1 - part)
    causal_limit = tl.where(((bits >> bit) & 1) != 0, causal_limit, -1)
    return first_row, exists, n[None, :] <= causal_limit[:, None]
