"""The lists that the kernels of the selected branch walk over.

*Union lists*: the blocks that any token of a tile of m neighbours lists, each once, with a bit per
token that lists it. *Chunks*: the loop turned round, the tokens that list one block.

A block is known by its first key row, the row of k and v where it begins: ``start + j*l'``. That
tells blocks of different packed sequences apart without numbering them. A query sees a key iff its
block is listed and the key's row is not past the query's own row, which is ``q_start + t`` in a
regular and ``t`` in a packed batch; so the kernels need nothing else to be causal.

B batch, T query tokens, S key tokens, K key/value heads, n listed blocks, m tokens of a tile,
W = m*n, P = B*T*K*n pairs (token, listed block). Nothing is read back from the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.backends.compiled.selected.tiles import MASK_BITS, MAX_SLOTS


class UnionLists(NamedTuple):
    """What the tokens of each tile list together."""

    tokens: int
    """Tokens of a tile, m."""
    rows: Tensor
    """int32 ``[B, tiles, K, W]``, first key rows, ascending; only the first ``counts`` are set."""
    masks: Tensor
    """int32 ``[B, tiles, K, W]``, bit i set iff token i of the tile lists the block; then 0."""
    counts: Tensor
    """int32 ``[B, tiles, K]``"""


class Chunks(NamedTuple):
    """Pairs (token, listed block) sorted by block and cut into chunks of one block each."""

    keys: Tensor
    """Integers ``[P + 1]``, sorted: ``((b*K + head)*spans + span)*blocks + first key row // unit``;
    blocks that nobody sees, and one more, stand at the end as ``B*K*spans*blocks``."""
    tokens: Tensor
    """int32 ``[P + 1]``, ``b*T + t`` of each sorted pair."""
    starts: Tensor
    """int32 ``[P + 2]``, first pair of each chunk, and the end of the last; then not set."""
    number: Tensor
    """int32 ``[1]``, how many chunks there are."""
    at_most: int
    """No more chunks than this."""
    spans: int
    blocks: int
    """Of one batch row and head, as far as ``keys`` counts them."""
    unit: int
    """Key rows from one to the next: l' in a regular batch, 1 in a packed one."""


@triton.jit(do_not_specialize=["T", "tiles", "key_end", "q_start"])
def _union_kernel(
    block_idx,  # [B, T, K, n]
    start,  # [T] or anything
    rows,
    masks,
    counts,
    T,
    tiles,
    key_end,
    q_start,
    KV,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    SELECT: tl.constexpr,
    SLOTS: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    pid = tl.program_id(0)
    head = pid % KV
    tile = (pid // KV) % tiles
    b = (pid // KV) // tiles
    place = tl.arange(0, SLOTS)
    i = place // WIDTH
    token = tile * TOKENS + i
    read = (i < TOKENS) & (token < T)
    pair = ((b.to(tl.int64) * T + token) * KV + head) * WIDTH + place % WIDTH
    j = tl.load(block_idx + pair, mask=read, other=-1)
    first = j.to(tl.int64) * SELECT  # any block number is legal, as far as int32 goes
    if PACKED:
        first += tl.load(start + token, mask=read, other=0)
    seen = read & (j >= 0) & (first <= q_start + token) & (first < key_end)

    # The token in the low bits: after sorting, those that list one block stand side by side.
    LAST: tl.constexpr = 9223372036854775807 if WIDE else 2147483647
    key = first * TOKENS + i
    key = tl.where(seen, key, LAST)
    if not WIDE:
        key = key.to(tl.int32)
    key = tl.sort(key)
    before = tl.gather(key, tl.maximum(place - 1, 0), 0)
    used = key < LAST
    begins = used & ((place == 0) | (key // TOKENS != before // TOKENS))
    slot = tl.cumsum(begins.to(tl.int32), 0) - 1
    base = pid.to(tl.int64) * (TOKENS * WIDTH)
    bit = tl.full([SLOTS], 1, tl.int32) << (key % TOKENS).to(tl.int32)
    tl.store(rows + base + slot, (key // TOKENS).to(tl.int32), mask=begins)
    tl.atomic_or(masks + base + slot, bit, mask=used, sem="relaxed")
    tl.store(counts + pid, tl.sum(begins.to(tl.int32), 0))


def union_lists(
    block_idx: Tensor,
    *,
    tokens: int,
    key_rows: int,
    start: Tensor | None,
    select_block: int,
    q_start: int = 0,
) -> UnionLists:
    """Builds the union lists in one kernel.

    Args:
        block_idx: int32 ``[B, T, K, n]``, each list ascending, then −1.
        tokens: m, at most 32, with m*n at most 1024.
        key_rows: S, rows of k and v.
        start: int32 ``[T]``, first row of each token's packed sequence; None for a regular batch.
        select_block: l', in tokens.
        q_start: position of the first token; 0 when packed.
    """
    B, T, K, n = block_idx.shape
    check_tokens(tokens, n)
    tiles = triton.cdiv(T, tokens)
    block_idx = block_idx.contiguous()
    shape = (B, tiles, K, tokens * n)
    rows = torch.empty(shape, dtype=torch.int32, device=block_idx.device)
    masks = torch.zeros(shape, dtype=torch.int32, device=block_idx.device)
    counts = torch.empty(shape[:3], dtype=torch.int32, device=block_idx.device)
    lists = UnionLists(tokens, rows, masks, counts)
    if counts.numel() == 0:
        return lists
    slots = max(16, triton.next_power_of_2(tokens * n))
    _union_kernel[(counts.numel(),)](
        block_idx,
        block_idx if start is None else start,
        rows,
        masks,
        counts,
        T,
        tiles,
        key_rows,
        q_start,
        K,
        TOKENS=tokens,
        WIDTH=n,
        SELECT=select_block,
        SLOTS=slots,
        PACKED=start is not None,
        WIDE=(key_rows + 1) * tokens >= 2**31,
        num_warps=1 if slots <= 128 else 4,
    )
    return lists


def check_tokens(tokens: int, width: int) -> None:
    """Raises where a tile of that many tokens can't be listed."""
    assert 1 <= tokens <= MASK_BITS, tokens
    assert tokens == 1 or triton.next_power_of_2(tokens * width) <= MAX_SLOTS, (tokens, width)


def union_lists_torch(
    block_idx: Tensor,
    *,
    tokens: int,
    key_rows: int,
    start: Tensor | None,
    select_block: int,
    q_start: int = 0,
) -> UnionLists:
    """The same in plain PyTorch, to check the kernel by; entries past ``counts`` are −1."""
    B, T, K, n = block_idx.shape
    device = block_idx.device
    t = torch.arange(T, device=device)[:, None, None]
    first = block_idx.long() * select_block
    if start is not None:
        first = first + start.long()[:, None, None]
    seen = (block_idx >= 0) & (first <= t + q_start) & (first < key_rows)
    nowhere = key_rows
    first = first.masked_fill(~seen, nowhere)
    first = torch.nn.functional.pad(first, (0, 0, 0, 0, 0, -T % tokens), value=nowhere)
    tiles = first.shape[1] // tokens
    first = first.view(B, tiles, tokens, K, n).transpose(2, 3).reshape(B, tiles, K, tokens * n)
    first, order = first.sort(dim=-1, stable=True)
    token = order // n
    begins = first < nowhere
    begins[..., 1:] &= first[..., 1:] != first[..., :-1]
    slot = (begins.cumsum(-1) - 1).clamp_min(0)
    slot = slot.masked_fill(first == nowhere, tokens * n)
    blank = torch.zeros(B, tiles, K, tokens * n + 1, dtype=torch.int64, device=device)
    rows = (blank - 1).scatter(-1, slot, first)[..., :-1]
    masks = blank.scatter_add(-1, slot, torch.ones_like(token) << token)[..., :-1]
    masks = torch.where(masks >= 2**31, masks - 2**32, masks)
    counts = begins.sum(-1)
    return UnionLists(tokens, rows.int(), masks.int(), counts.int())


@triton.jit(
    do_not_specialize=["T", "pairs", "key_rows", "span", "spans", "q_start", "blocks", "nowhere"]
)
def _key_kernel(
    block_idx,
    start,
    keys,
    T,
    pairs,
    key_rows,
    span,
    spans,
    q_start,
    blocks,
    nowhere,
    KV,
    WIDTH: tl.constexpr,
    SELECT: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    read = pair < pairs
    j = tl.load(block_idx + pair, mask=read, other=-1).to(tl.int64)
    token = pair // WIDTH // KV  # b*T + t
    head = pair // WIDTH % KV
    b = token // T
    t = token - b * T
    first = j * SELECT
    if PACKED:
        first += tl.load(start + t, mask=read, other=0)
    seen = read & (j >= 0) & (first <= q_start + t) & (first < key_rows)
    key = ((b * KV + head) * spans + t // span) * blocks + (first if PACKED else j)
    key = tl.where(seen, key, nowhere)
    tl.store(keys + pair, key.to(keys.dtype.element_ty), mask=pair <= pairs)


@triton.jit(do_not_specialize=["pairs", "nowhere"])
def _begin_kernel(
    keys,
    begins,
    pairs,
    nowhere,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    read = place <= pairs
    key = tl.load(keys + place, mask=read, other=0)
    before = tl.load(keys + place - 1, mask=read & (place > 0), other=0)
    # A chunk begins where the block changes, and at every multiple of CHUNK in the whole list: no
    # chunk is longer then, and none needs to know where its block began.
    starts = ((place > 0) & (key != before)) | ((place % CHUNK == 0) & (key < nowhere))
    tl.store(begins + place, starts.to(tl.int32), mask=read)


@triton.jit(do_not_specialize=["pairs"])
def _chunk_kernel(
    order,
    number,
    begins,
    tokens,
    starts,
    count,
    pairs,
    KV,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    read = place <= pairs
    pair = tl.load(order + place, mask=read, other=0)
    tl.store(tokens + place, (pair // WIDTH // KV).to(tl.int32), mask=read)
    # the first pair is in chunk 0, though nobody may see it
    first = tl.load(begins)
    mine = tl.load(number + place, mask=read, other=0) - first
    begun = tl.load(begins + place, mask=read, other=0) != 0
    tl.store(starts + mine, place.to(tl.int32), mask=read & (begun | (place == 0)))
    tl.store(count + place * 0, mine, mask=place == pairs)


def chunks(
    block_idx: Tensor,
    *,
    key_rows: int,
    start: Tensor | None,
    select_block: int,
    chunk: int,
    span: int | None = None,
    q_start: int = 0,
    sequences: int | None = None,
) -> Chunks:
    """Sorts the pairs by block and cuts them into chunks of at most ``chunk`` tokens of one block.

    Arguments as of :func:`union_lists`; ``span`` tokens make a span (None: all of them), and
    chunks are ordered by batch row, head, span, block, and within one by token. ``sequences``:
    at most so many packed ones.
    """
    B, T, K, n = block_idx.shape
    block_idx = block_idx.contiguous()
    pairs, device = block_idx.numel(), block_idx.device
    assert 0 < pairs < 2**31 - 2, pairs
    span = T if span is None else min(span, T)
    spans = triton.cdiv(T, span)
    key_rows = max(key_rows, 1)
    unit = select_block if start is None else 1
    most = triton.cdiv(key_rows, unit)
    nowhere = B * K * spans * most
    # sorting takes a pass for every 8 bits
    dtype = next(
        x for x in (torch.int16, torch.int32, torch.int64) if nowhere <= torch.iinfo(x).max
    )
    keys = torch.empty(pairs + 1, dtype=dtype, device=device)
    grid, block = (triton.cdiv(pairs + 1, 1024),), 1024
    _key_kernel[grid](
        block_idx,
        block_idx if start is None else start,
        keys,
        T,
        pairs,
        key_rows,
        span,
        spans,
        q_start,
        most,
        nowhere,
        K,
        WIDTH=n,
        SELECT=select_block,
        PACKED=start is not None,
        BLOCK=block,
    )
    keys, order = keys.sort(stable=True)
    begins = torch.empty(pairs + 1, dtype=torch.int32, device=device)
    _begin_kernel[grid](keys, begins, pairs, nowhere, CHUNK=chunk, BLOCK=block)
    number = begins.cumsum(0, dtype=torch.int32)
    blocks = triton.cdiv(key_rows, select_block)
    if start is not None:  # the last block of a sequence may be short
        blocks = min(
            key_rows, key_rows // select_block + (key_rows if sequences is None else sequences)
        )
    at_most = triton.cdiv(pairs, chunk) + min(pairs, B * K * spans * blocks)
    tokens = torch.empty(pairs + 1, dtype=torch.int32, device=device)
    starts = torch.empty(pairs + 2, dtype=torch.int32, device=device)
    count = torch.empty(1, dtype=torch.int32, device=device)
    _chunk_kernel[grid](
        order, number, begins, tokens, starts, count, pairs, K, WIDTH=n, BLOCK=block
    )
    return Chunks(keys, tokens, starts, count, at_most, spans, most, unit)
