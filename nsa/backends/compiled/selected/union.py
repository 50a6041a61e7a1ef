"""Tile unions: the blocks that any of m neighbouring tokens selected, each once.

The forward and the dq kernel walk over them. A block comes with a bit per token that selected it.

A block is known by its first key row, the row of k and v where it begins: ``seq_start + j*l'``.
That tells blocks of different packed sequences apart without numbering them. A query sees a key iff
it selected the key's block and the key's row is not past the query's own row, which is ``q_start +
t`` in a fixed-length and ``t`` in a packed batch; so the kernels need nothing else to be causal.

B batch, T query tokens, S key tokens, K key/value heads, n selected blocks, m tokens of a tile,
W = m*n. Nothing is read back from the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.backends.compiled.selected.far import is_far
from nsa.backends.compiled.selected.tiles import has_union
from nsa.backends.compiled.tiling import padded
from nsa.core.kernel import kernel


class TileUnions(NamedTuple):
    """What the tokens of each tile selected together."""

    tokens: int
    """Tokens of a tile, m."""
    first_rows: Tensor
    """int32 ``[B, tiles, K, W]``, first key rows, ascending; only the first ``counts`` are set."""
    masks: Tensor
    """int32 ``[B, tiles, K, W]``, bit i set iff token i of the tile selected the block; then 0."""
    counts: Tensor
    """int32 ``[B, tiles, K]``"""


@kernel(do_not_specialize=["T", "num_tiles", "key_rows", "q_start"])
def nsa_selected_union(
    block_idx_ptr,  # [B, T, K, n], contiguous
    seq_start_ptr,  # [T], with PACKED
    first_rows_ptr,
    masks_ptr,
    counts_ptr,
    T,
    num_tiles,
    key_rows,
    q_start,
    KV_HEADS,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    SELECT_BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    PACKED: tl.constexpr,
    SINCE: tl.constexpr,
    INT64: tl.constexpr,
):
    pid = tl.program_id(0)
    kv_head = pid % KV_HEADS
    tile = (pid // KV_HEADS) % num_tiles
    b = (pid // KV_HEADS) // num_tiles
    entry = tl.arange(0, SLOTS)
    i = entry // WIDTH
    token = tile * TOKENS + i
    mask = (i < TOKENS) & (token < T)
    pair = ((b.to(tl.int64) * T + token) * KV_HEADS + kv_head) * WIDTH + entry % WIDTH
    j = tl.load(block_idx_ptr + pair, mask=mask, other=-1)
    first_row = j.to(tl.int64) * SELECT_BLOCK  # any block number is legal, as far as int32 goes
    seq_start = tl.zeros_like(token)
    if PACKED:
        seq_start = tl.load(seq_start_ptr + token, mask=mask, other=0)
    first_row += seq_start
    visible = mask & (j >= 0) & (first_row <= q_start + token) & (first_row < key_rows)
    if SINCE is not None:
        visible = visible & ~is_far(j, seq_start, q_start + token, SELECT_BLOCK, SINCE)

    # The token in the low bits: after sorting, those that selected one block stand side by side.
    LAST: tl.constexpr = 9223372036854775807 if INT64 else 2147483647
    key = tl.where(visible, first_row * TOKENS + i, LAST)
    if not INT64:
        key = key.to(tl.int32)
    key = tl.sort(key)
    before = tl.gather(key, tl.maximum(entry - 1, 0), 0)
    occupied = key < LAST
    begins = occupied & ((entry == 0) | (key // TOKENS != before // TOKENS))
    slot = tl.cumsum(begins.to(tl.int32), 0) - 1
    base = pid.to(tl.int64) * (TOKENS * WIDTH)
    bit = tl.full([SLOTS], 1, tl.int32) << (key % TOKENS).to(tl.int32)
    tl.store(first_rows_ptr + base + slot, (key // TOKENS).to(tl.int32), mask=begins)
    tl.atomic_or(masks_ptr + base + slot, bit, mask=occupied, sem="relaxed")
    tl.store(counts_ptr + pid, tl.sum(begins.to(tl.int32), 0))


def tile_unions(
    block_idx: Tensor,
    *,
    tokens: int,
    key_rows: int,
    start: Tensor | None,
    select_block: int,
    q_start: int = 0,
    since: int | None = None,
) -> TileUnions:
    """Builds the unions in one kernel.

    Args:
        block_idx: int32 ``[B, T, K, n]``, each list ascending, then −1.
        tokens: m, at most 32, with m*n at most 1024.
        key_rows: S, rows of k and v.
        start: int32 ``[T]``, first row of each token's packed sequence; None for a fixed-length
            batch.
        select_block: l', in tokens.
        q_start: position of the first token; when packed, its row among those of k and v.
        since: of near blocks alone, the position from which tokens have far ones (:mod:`.far`).
    """
    B, T, K, n = block_idx.shape
    assert tokens == 1 or has_union(tokens, n), (tokens, n)
    tiles = triton.cdiv(T, tokens)
    block_idx = block_idx.contiguous()
    shape = (B, tiles, K, tokens * n)
    first_rows = torch.empty(shape, dtype=torch.int32, device=block_idx.device)
    masks = torch.zeros(shape, dtype=torch.int32, device=block_idx.device)
    counts = torch.empty(shape[:3], dtype=torch.int32, device=block_idx.device)
    if counts.numel():
        slots = padded(tokens * n)
        nsa_selected_union[(counts.numel(),)](
            *(block_idx, block_idx if start is None else start, first_rows, masks, counts),
            *(T, tiles, key_rows, q_start, K),
            TOKENS=tokens,
            WIDTH=n,
            SELECT_BLOCK=select_block,
            SLOTS=slots,
            PACKED=start is not None,
            SINCE=since,
            INT64=(key_rows + 1) * tokens >= 2**31,
            num_warps=1 if slots <= 128 else 4,
            enable_fp_fusion=True,
        )
    return TileUnions(tokens, first_rows, masks, counts)
