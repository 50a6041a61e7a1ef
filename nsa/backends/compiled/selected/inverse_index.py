"""The inverse index: for each block, the tokens that selected it, in compressed sparse rows.

The kernel for dk and dv walks over it. Rows are *chunks*: at most so many tokens of one block, so
that a block that every token selects does not keep one program busy. Blocks are told apart and
seen as :mod:`.union` explains. Where they are *ordered*, a block is divided from its own first
token on, so that the chunks of a sequence are the same alone and in any batch.

B batch, T query tokens, S key tokens, K key/value heads, n selected blocks, P = B*T*K*n pairs
(token, selected block). Nothing is read back from the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.backends.compiled.selected.far import is_far
from nsa.core.kernel import kernel
from nsa.core.operators import BUILDING

_BLOCK = 1024
"""Pairs of one program."""


class InverseIndex(NamedTuple):
    """Pairs (token, selected block) sorted by block, and chunks of one block each."""

    block_ids: Tensor
    """Integers ``[P + 1]``, sorted: ``(b*K + kv_head)*num_blocks + first key row // block_pitch``;
    blocks that nobody sees, and one more, stand at the end as ``B*K*num_blocks``."""
    tokens: Tensor
    """int32 ``[P + 1]``, ``b*T + t`` of each sorted pair; of far pairs alone, n times that plus the
    place in the token's list."""
    offsets: Tensor
    """int32 ``[P + 2]``, first pair of each chunk, and the end of the last; then not set."""
    num_chunks: Tensor
    """int32 ``[1]``"""
    max_chunks: int
    """What the host knows of ``num_chunks``, or of the chunks of fewer heads."""
    num_blocks: int
    """Of one batch row and head, as far as ``block_ids`` counts them."""
    block_pitch: int
    """Key rows from one to the next: l' in a fixed-length batch, 1 in a packed one."""
    share: int = 1
    """Consecutive tokens at most that an entry stands for (:func:`.shared.shared_index`)."""
    ends: Tensor | None = None
    """int32 ``[P + 1]``, past the last of them; None: they are ``share`` everywhere."""
    chunk: int | None = None
    """Ordered: entries of every chunk of a block but its last; else None."""
    head_chunks: Tensor | None = None
    """Of far pairs alone: int32 ``[B*K + 1]``, the first chunk of each head; then their number."""


@kernel(do_not_specialize=["T", "pairs", "key_rows", "q_start", "num_blocks", "nowhere"])
def nsa_selected_block_ids(
    block_idx_ptr,  # [B, T, K, n], contiguous
    seq_start_ptr,  # [T], with PACKED
    block_ids_ptr,
    T,
    pairs,
    key_rows,
    q_start,
    num_blocks,
    nowhere,
    KV_HEADS,
    WIDTH: tl.constexpr,
    SELECT_BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    SINCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = pair < pairs
    j = tl.load(block_idx_ptr + pair, mask=mask, other=-1).to(tl.int64)
    token = pair // WIDTH // KV_HEADS  # b*T + t
    kv_head = pair // WIDTH % KV_HEADS
    b = token // T
    t = token - b * T
    seq_start = tl.zeros_like(t)
    if PACKED:
        seq_start += tl.load(seq_start_ptr + t, mask=mask, other=0)
    first_row = seq_start + j * SELECT_BLOCK
    visible = mask & (j >= 0) & (first_row <= q_start + t) & (first_row < key_rows)
    if SINCE is not None:
        visible = visible & is_far(j, seq_start, q_start + t, SELECT_BLOCK, SINCE)
    block_id = (b * KV_HEADS + kv_head) * num_blocks + (first_row if PACKED else j)
    block_id = tl.where(visible, block_id, nowhere)
    tl.store(block_ids_ptr + pair, block_id.to(block_ids_ptr.dtype.element_ty), mask=pair <= pairs)


@kernel(do_not_specialize=["pairs", "nowhere", "halvings"])
def nsa_selected_chunk_begins(
    block_ids_ptr,
    begins_ptr,
    pairs,
    nowhere,
    halvings,
    CHUNK: tl.constexpr,
    ORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = entry <= pairs
    block_id = tl.load(block_ids_ptr + entry, mask=mask, other=0)
    before = tl.load(block_ids_ptr + entry - 1, mask=mask & (entry > 0), other=0)
    # A chunk begins where the block changes, and at every multiple of CHUNK among all pairs: no
    # chunk is longer then, and none needs to know where its block began.
    changes = (entry > 0) & (block_id != before)
    since = entry
    if ORDERED:  # among the block's pairs: bisect for the first of them
        low, high = tl.zeros_like(entry), entry
        for _ in range(halvings):
            middle = (low + high) // 2
            earlier = tl.load(block_ids_ptr + middle, mask=mask, other=0) < block_id
            low, high = tl.where(earlier, middle + 1, low), tl.where(earlier, high, middle)
        since = entry - low
    begins = changes | ((since % CHUNK == 0) & (block_id < nowhere))
    tl.store(begins_ptr + entry, begins.to(tl.int32), mask=mask)


@kernel(do_not_specialize=["pairs"])
def nsa_selected_chunk_offsets(
    order_ptr,
    begun_ptr,  # chunks that began up to each entry
    begins_ptr,
    tokens_ptr,
    offsets_ptr,
    num_chunks_ptr,
    pairs,
    KV_HEADS,
    WIDTH: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = entry <= pairs
    pair = tl.load(order_ptr + entry, mask=mask, other=0)
    token = pair // WIDTH // KV_HEADS
    if PLACES:
        token = token * WIDTH + pair % WIDTH
    tl.store(tokens_ptr + entry, token.to(tl.int32), mask=mask)
    # the first pair is in chunk 0, though nobody may see it
    chunk = tl.load(begun_ptr + entry, mask=mask, other=0) - tl.load(begins_ptr)
    begins = tl.load(begins_ptr + entry, mask=mask, other=0) != 0
    tl.store(offsets_ptr + chunk, entry.to(tl.int32), mask=mask & (begins | (entry == 0)))
    tl.store(num_chunks_ptr + entry * 0, chunk, mask=entry == pairs)


def inverse_index(
    block_idx: Tensor,
    *,
    key_rows: int,
    start: Tensor | None,
    select_block: int,
    chunk: int,
    ordered: bool = False,
    q_start: int = 0,
    sequences: int | None = None,
    since: int | None = None,
    heads: int | None = None,
) -> InverseIndex:
    """Sorts the pairs by block and cuts them into chunks of at most ``chunk`` tokens of one block.

    Arguments as of :func:`.union.tile_unions`. Chunks stand by batch row, head, block, and within
    one by token. ``ordered``: each block is divided from its first token on. ``sequences``: at most
    so many packed ones. ``since``: of far pairs alone (:mod:`.far`), the position of the first
    token that has some. ``heads``: of a launch, all if None.
    """
    B, T, K, n = block_idx.shape
    block_idx = block_idx.contiguous()
    pairs, device = block_idx.numel(), block_idx.device
    assert 0 < pairs < 2**31 - 2, pairs
    packed, key_rows = start is not None, max(key_rows, 1)
    pitch = 1 if packed else select_block
    num_blocks = triton.cdiv(key_rows, pitch)
    nowhere = B * K * num_blocks
    # sorting takes a pass for every 8 bits
    integers = (torch.int16, torch.int32, torch.int64)
    dtype = next(x for x in integers if nowhere <= torch.iinfo(x).max)

    def empty(size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    options = {"BLOCK": _BLOCK, "enable_fp_fusion": True}
    block_ids, grid = empty(pairs + 1, dtype), (triton.cdiv(pairs + 1, _BLOCK),)
    nsa_selected_block_ids[grid](
        *(block_idx, block_idx if start is None else start, block_ids),
        *(T, pairs, key_rows, q_start, num_blocks, nowhere, K),
        WIDTH=n,
        SELECT_BLOCK=select_block,
        PACKED=packed,
        SINCE=since,
        **options,
    )
    building = BUILDING.get()  # torch's sort and sum of meta tensors would import its compiler
    if building:
        order = empty(pairs + 1, torch.int64)
    else:
        block_ids, order = block_ids.sort(stable=True)
    begins = empty(pairs + 1)
    nsa_selected_chunk_begins[grid](
        *(block_ids, begins, pairs, nowhere, pairs.bit_length()),
        CHUNK=chunk,
        ORDERED=ordered,
        **options,
    )
    begun = begins if building else begins.cumsum(0, dtype=torch.int32)
    tokens, offsets, num_chunks = empty(pairs + 1), empty(pairs + 2), empty(1)
    nsa_selected_chunk_offsets[grid](
        *(order, begun, begins, tokens, offsets, num_chunks, pairs, K),
        WIDTH=n,
        PLACES=since is not None,
        **options,
    )
    blocks = triton.cdiv(key_rows, select_block)
    if packed:  # the last block of a sequence may be short
        short = key_rows if sequences is None else sequences
        blocks = min(key_rows, key_rows // select_block + short)

    heads = heads or B * K
    listed = pairs // (B * K) * heads
    max_chunks = 1 + listed // chunk + min(listed, heads * blocks)
    found = InverseIndex(block_ids, tokens, offsets, num_chunks, max_chunks, num_blocks, pitch)
    if since is not None and building:
        found = found._replace(head_chunks=empty(B * K + 1))
    elif since is not None:
        first = torch.arange(B * K + 1, dtype=torch.int64, device=device) * num_blocks
        first = torch.searchsorted(block_ids[:-1], first.to(dtype))
        found = found._replace(head_chunks=begun[first] - begins[0])
    return found._replace(chunk=chunk) if ordered else found
