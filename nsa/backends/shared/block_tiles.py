"""Selected attention as equal tiles: queries that read the same block sit side by side.

A pair (query, listed block) is a row of work. Sorted by block and cut into tiles of ``m`` queries,
the pairs become equal matrix products of ``m*G`` query rows with one block of ``l'`` keys, and a
block is fetched once for m queries rather than for each. The partial results of a query's blocks
are then merged by their log-sum-exp.

C query tokens of a chunk, K key/value heads, G heads per group, D key size, V value size,
n listed blocks, P = C*K*n pairs, L tokens of a block, m queries of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.backends.shared.workspace import FRESH, Space
from nsa.config import NSAConfig
from nsa.core.geometry import block_size
from nsa.core.packing import packed_select_blocks, packed_tokens

TILE_ROWS = 64
"""Query rows of a tile: what a matrix unit or a CPU's register blocking wants at least."""


class Blocks(NamedTuple):
    """How tokens and selection blocks of the whole batch are numbered, one after the other."""

    total: int
    """Blocks of the batch (an upper bound when packed)."""
    size: int
    """Tokens of a block, L."""
    position: Tensor
    """int64 ``[B*T]``, position of each query in its sequence."""
    base: Tensor
    """int64 ``[B*T]``, the number of the first block of each query's sequence."""
    head: Tensor
    """int64 ``[K, 1]``, the number of each key head's first block."""
    tokens: Tensor | None
    """int64 ``[total, L]``, the key tokens of each block when packed; None when regular."""
    token_row: Tensor | None
    """int64 ``[S]``, block * L + offset of each key token when packed; None when regular."""


def number_blocks(
    q: Tensor, k: Tensor, config: NSAConfig, cu_seqlens: Tensor | None, q_start: int
) -> Blocks:
    """Numbers the blocks of a regular ``[B, T]`` or a packed batch; nothing is read back."""
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    longest = S
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        longest = int(cu_seqlens.diff().max())  # nothing to wait for
    size = block_size(longest, config)
    head = torch.arange(k.shape[2], device=q.device)[:, None]
    if cu_seqlens is None:
        per_row = -(-S // size)
        position = torch.arange(q_start, q_start + T, device=q.device).repeat(B)
        base = torch.arange(B, device=q.device)[:, None].expand(B, T).reshape(-1) * per_row
        return Blocks(B * per_row, size, position, base, head * (B * per_row), None, None)
    token, block = packed_tokens(cu_seqlens, T), packed_select_blocks(cu_seqlens, T, size)
    base = block.offsets[token.seq_id]
    first = cu_seqlens.long()[block.seq_id] + block.position * size
    tokens = first[:, None] + torch.arange(size, device=q.device)
    token_row = (base + token.position // size) * size + token.position % size
    count = block.position.numel()
    tokens = tokens.clamp_max(max(T - 1, 0))
    return Blocks(count, size, token.position, base, head * count, tokens, token_row)


def to_blocks(
    x: Tensor, blocks: Blocks, dtype: torch.dtype, space: Space = FRESH, name: str = "blocks"
) -> Tensor:
    """``[B, S, K, D]`` -> contiguous ``[K * total, L, D]``; slots without a token are undefined."""
    B, S, K, D = x.shape
    shape = (K * blocks.total, blocks.size, D)
    if blocks.tokens is not None:
        if S == 0:  # every sequence is empty: something for the surplus blocks to read
            x = F.pad(x, (0, 0, 0, 0, 0, 1))
        rows = x[0].to(dtype).permute(1, 0, 2)
        result = space.take(name, (K, blocks.total * blocks.size, D), dtype, x.device)
        torch.index_select(rows, 1, blocks.tokens.flatten(), out=result)
        return result.view(shape)
    pad = -S % blocks.size
    result = space.take(name, (K, B, S + pad, D), dtype, x.device)
    result[:, :, :S].copy_(x.permute(2, 0, 1, 3))
    result[:, :, S:].zero_()
    return result.view(shape)


def from_blocks(x: Tensor, blocks: Blocks, like: Tensor) -> Tensor:
    """The inverse of :func:`to_blocks`, in the shape and dtype of ``like``."""
    B, S, K, D = like.shape
    x = x.reshape(K, blocks.total * blocks.size, D)
    if blocks.token_row is not None:
        return x.index_select(1, blocks.token_row).transpose(0, 1)[None].to(like.dtype)
    return x.view(K, B, S + -S % blocks.size, D)[:, :, :S].permute(1, 2, 0, 3).to(like.dtype)


class Tiles(NamedTuple):
    """The pairs of one chunk of queries, sorted into tiles."""

    total: int
    run: int
    """Tiles to work on at once."""
    block: Tensor
    """int64 ``[tiles]``, the row of :func:`to_blocks` that the tile reads."""
    rows: Tensor
    """int64 ``[tiles * m]``, the query (token * K + head, within the chunk) of each row."""
    visible: Tensor
    """int64 ``[tiles, m]``, keys of the block that the query sees; 0 in an unused row."""
    slot: Tensor
    """int64 ``[C*K, n]``, the row of each pair; ``tiles * m``, a spare one, if it is unlisted."""
    listed: Tensor
    """bool ``[C*K, n]``, False for padding and for blocks past the query."""


def make_tiles(
    block_idx: Tensor,
    blocks: Blocks,
    first: int,
    m: int,
    run: int,
    *,
    earlier_only: bool = False,
    space: Space = FRESH,
) -> Tiles:
    """Sorts the pairs of the queries ``first … first + C - 1``; block_idx is ``[C, K, n]``.

    Tiles are worked on ``run`` at a time (fewer where there can't be so many). How many there are
    depends on what later tokens chose, and so does where a query's tile stands; the matrix products
    are told neither: every run is as long, since libraries round by the shape of a batch.

    ``earlier_only`` leaves out the block that a query stands in, the only one it sees in part.
    Every result and intermediate stands in ``space``.
    """
    C, K, n = block_idx.shape
    pairs, device = C * K * n, block_idx.device

    def room(name: str, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return space.take(f"tiles.{name}", shape, dtype, device)

    position = blocks.position[first : first + C, None, None]
    index = room("index", C, K, n).copy_(block_idx)
    seen = torch.mul(index, -blocks.size, out=room("seen", C, K, n)).add_(position).add_(1)
    listed = torch.ge(index, 0, out=room("listed", C, K, n, dtype=torch.bool))
    least = blocks.size if earlier_only else 0  # the own block is seen to its last token at most
    flag = torch.gt(seen, least, out=room("flag", C, K, n, dtype=torch.bool))
    listed &= flag
    seen.clamp_max_(blocks.size)
    nowhere = K * blocks.total
    pair_block = index.add_(blocks.base[first : first + C, None, None]).add_(blocks.head)
    pair_block.masked_fill_(torch.logical_not(listed, out=flag), nowhere)
    sorted_block, pair = room("sorted", pairs), room("pair", pairs)
    torch.sort(pair_block.flatten(), stable=True, out=(sorted_block, pair))
    rank = torch.searchsorted(sorted_block, sorted_block, out=room("rank", pairs))
    number = torch.arange(pairs, out=room("number", pairs))
    rank = torch.sub(number, rank, out=rank)  # within its block
    lane = torch.remainder(rank, m, out=rank)
    tile = torch.eq(lane, 0, out=number)
    tile = torch.cumsum(tile, 0, out=tile).sub_(1)
    count = pairs // m + min(pairs, nowhere + 1)  # at most
    run = max(1, min(run, count))
    if device.type == "cpu":  # nothing to wait for: count those in use
        in_use = int((sorted_block < nowhere).sum())
        count = int(tile[in_use - 1]) + 1 if in_use else 0
        count = -(-count // run) * run
    unused = torch.ge(sorted_block, nowhere, out=flag.view(pairs))
    row = torch.mul(tile, m, out=room("row", pairs)).add_(lane).clamp_max_(max(count * m - 1, 0))
    row.masked_fill_(unused, count * m)  # a spare one
    tile.masked_fill_(unused, count)
    rows = room("rows", count * m + 1).zero_()
    visible = room("visible", count * m + 1).zero_()
    visible.scatter_(0, row, torch.gather(seen.flatten(), 0, pair, out=lane))
    rows.scatter_(0, row, torch.div(pair, n, rounding_mode="floor", out=lane))
    block = room("block", count + 1).zero_()
    block.scatter_(0, tile, sorted_block)
    slot = room("slot", pairs).scatter_(0, pair, row)
    return Tiles(
        count,
        run,
        block[:count],
        rows[: count * m],
        visible[: count * m].view(count, m),
        slot.view(C * K, n),
        listed.view(C * K, n),
    )


def runs(tiles: Tiles) -> Iterator[slice]:
    """The tiles to work on, one run after the other."""
    for start in range(0, tiles.total, tiles.run):
        yield slice(start, min(start + tiles.run, tiles.total))
