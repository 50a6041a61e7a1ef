"""What the forward and the dq kernel share: the tile of a program, and a step over its blocks.

A program takes m neighbouring tokens of one key/value head, all G query heads of each as rows of
one tile, and walks over the union of the tokens' block lists (:mod:`.union`): a block that several
of them selected is fetched once, and m*G rows fill a matrix instruction that one token's G rows
would leave mostly idle.

With C.SHARED all tokens of a tile have one list (:mod:`.shared`), which is read as it is: no union,
no bits, and no mask but in its last block, since all that stands before a query's own block is
seen.
C is a :class:`~nsa.backends.compiled.selected.tiles.Constants`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.columns import load_rows


@triton.jit
def locate_tile(pid, T, num_tiles, KV_HEADS, union_ptrs, C: tl.constexpr):
    """Batch row and key/value head; of each row: the token, the query head, its bit in the union's
    masks, and whether it exists; and the tile's blocks, for :func:`block_step`.

    union_ptrs: first rows, masks and counts of :class:`.union.TileUnions`; with C.SHARED the three
    of :class:`.shared.SharedLists`.
    """
    # Tiles of one head side by side: its keys and values then stay in the L2 cache.
    tile = pid % num_tiles
    kv_head = (pid // num_tiles) % KV_HEADS
    b = (pid // num_tiles // KV_HEADS).to(tl.int64)
    row = tl.arange(0, C.BLOCK_M)
    slot = row // C.G
    first = tile * C.TOKENS
    end = T
    if C.SHARED and C.PACKED:
        first = tl.load(union_ptrs[1] + tile)
        end = tl.load(union_ptrs[1] + tile + 1)
    token = first + slot
    mask = (slot < C.TOKENS) & (token < end)
    head = kv_head * C.G + row % C.G
    bit = tl.where(slot < C.TOKENS, slot, 0)
    if C.SHARED:
        entry = tl.arange(0, C.SLOTS)
        list_ptr = union_ptrs[0] + ((b * T + first) * KV_HEADS + kv_head) * C.WIDTH
        j = tl.load(list_ptr + entry, mask=(entry < C.WIDTH) & (first < T), other=-1)
        first_key = 0
        if C.PACKED:
            first_key = tl.load(union_ptrs[2] + first, mask=first < T, other=0)
        blocks = (list_ptr, first_key, tl.sum((j >= 0).to(tl.int32), 0))
    else:
        union = (b * num_tiles + tile) * KV_HEADS + kv_head
        first_rows_ptr = union_ptrs[0] + union * (C.TOKENS * C.WIDTH)
        masks_ptr = union_ptrs[1] + union * (C.TOKENS * C.WIDTH)
        blocks = (first_rows_ptr, masks_ptr, tl.load(union_ptrs[2] + union))
    return b, kv_head, token, head, bit, mask, blocks


@triton.jit
def load_queries(ptr, strides, b, token, head, mask, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of ``[B, T, H, SIZE]``, a tile in parts."""
    row = token.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[2]
    return load_rows(ptr + b * strides[0] + row, None, 1, mask, SIZE, BLOCK)


@triton.jit
def load_keys(head_ptr, offsets, stride, first_row, mask, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK_N rows of a head's keys or values, from ``first_row`` on, a tile in parts."""
    return load_rows(head_ptr + first_row.to(tl.int64) * stride, offsets, 1, mask, SIZE, BLOCK)


@triton.jit
def block_step(step, blocks, bit, last_row, S, MASKED: tl.constexpr, C: tl.constexpr):
    """One step over a tile's blocks. ``last_row``: the last key row that a query sees of the blocks
    that it selected; ``bit``: its own in the masks. Without MASKED every row sees the whole block.

    Returns:
        The step's first key row, which of its keys exist, and ``[BLOCK_M, BLOCK_N]`` which of them
        each row sees.
    """
    n = tl.arange(0, C.BLOCK_N)
    part = (step % C.PARTS) * C.BLOCK_N
    first_row = tl.load(blocks[0] + step // C.PARTS)
    if C.SHARED:
        first_row = blocks[1] + first_row * C.SELECT_BLOCK
    first_row += part
    # The last of these keys that each row sees, so that a key costs one comparison.
    causal_limit = tl.minimum(last_row - first_row, C.SELECT_BLOCK - 1 - part)
    if not C.SHARED:
        bits = tl.load(blocks[1] + step // C.PARTS)
        causal_limit = tl.where(((bits >> bit) & 1) != 0, causal_limit, -1)
    exists = (n < C.SELECT_BLOCK - part) & (first_row + n < S)
    visible = n[None, :] <= causal_limit[:, None]
    if not MASKED and C.PARTS * C.BLOCK_N == C.SELECT_BLOCK:
        exists = tl.full((C.BLOCK_N,), True, tl.int1)
        visible = tl.full((C.BLOCK_M, C.BLOCK_N), True, tl.int1)
    return first_row, exists, visible


@triton.jit
def phase_steps(phase: tl.constexpr, count, C: tl.constexpr):
    """The steps of a phase: 0, without masks, over all blocks of a shared list but the last; 1,
    with masks, over the others."""
    full = 0
    if C.SHARED:
        full = tl.maximum(count - 1, 0) * C.PARTS
    if phase == 0:
        begin, end = 0, full
    else:
        begin, end = full, count * C.PARTS
    return begin, end
