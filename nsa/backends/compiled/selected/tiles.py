"""How the kernels of the selected branch are cut: tile sizes, warps, stages.

Two kinds of launch: *query tiles* (forward, dq: some tokens, over the blocks they list) and *key
tiles* (dk, dv: one block, over the tokens that list it). Rows are tokens times the G query heads of
a key/value head. D key size, V value size, n listed blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from triton import next_power_of_2

SHARED_BYTES = 220 * 1024
"""Shared memory that a program may plan with (227 KiB on sm_90, less what reductions need)."""

MAX_SLOTS = 1024
"""List entries of one query tile that the list builder sorts at once."""

WITH_DQ_FROM = 2048
"""Tokens from which small heads sum dq beside dk and dv (H100: 1.68 ms against 1.95 at T = 2048,
2.8 against 3.9 at 8192, with lists at random; with heads of 128 the adds cost more than they save).
Short sequences list nearly all they see, so that unions are small and dq alone is fast."""

MASK_BITS = 32
"""Tokens of one query tile: one bit of an int32 each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryTiles:
    """One launch of the forward or of the dq kernel."""

    tokens: int
    """Consecutive tokens of a tile, at most 32."""
    block_n: int
    """Keys of one step, a power of two from 16; a block of more keys takes several steps."""
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTiles:
    """One launch of the dk, dv kernel."""

    tokens: int
    """Tokens of one step; any of those that read the block, they need not be neighbours."""
    block_n: int
    """Keys of a program, a power of two from 16; a block of more keys takes several programs."""
    num_warps: int
    num_stages: int
    chunk: int = 256
    """Tokens of one chunk at most: what a program reads of one block before it adds its dk, dv."""
    span: int | None = None
    """Chunks are ordered by spans of as many tokens, so that what one span reads of q and dout can
    stay in the L2 cache; every block adds its dk, dv once a span. None: one span."""
    with_dq: bool = False
    """Whether dq is summed here too, by atomic adds in fp32, in place of a kernel of its own."""
    maxnreg: int | None = None
    """Registers of a thread; None leaves it to the compiler."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedTiles:
    """The launches of one problem."""

    forward: QueryTiles
    dq: QueryTiles
    dkv: KeyTiles


def padded(size: int) -> int:
    """The power of two, at least 16, that a matrix product pads ``size`` to."""
    return max(16, next_power_of_2(size))


def padded_rows(tokens: int, group: int) -> int:
    """Rows of a tile of ``tokens`` tokens with G heads each."""
    return padded(tokens * group)


def tokens_per_tile(group: int, rows: int, width: int | None = None) -> int:
    """The most tokens whose rows fit in ``rows``, at least 1.

    ``width`` (n): also so few that a union list can be made of their lists.
    """
    tokens = max(1, rows // group)
    while width is not None and tokens > 1 and not _listable(tokens, width):
        tokens -= 1
    return tokens


def _listable(tokens: int, width: int) -> bool:
    return tokens <= MASK_BITS and next_power_of_2(tokens * width) <= MAX_SLOTS


def config_for(
    D: int, V: int, G: int, *, width: int, select_block: int, dtype: torch.dtype, length: int
) -> SelectedTiles:
    """Tiles for an H100: head sizes, group, listed blocks n, l', and T (only a small one matters).

    Chosen for fp16 and bf16 at D = V = 128 (G = 16) and 64 (G = 6): two or more programs a
    multiprocessor, nothing spilled but in dk and dv of small heads. Larger heads take less of
    everything until it fits in shared memory. IEEE fp32 has no matrix unit: small tiles.
    """
    wide = padded(D) + padded(V)
    fp32 = dtype == torch.float32
    rows = 16 if fp32 else 64
    keys = padded(select_block)
    few = max(1, length)  # no rows for tokens that do not exist
    tokens = min(tokens_per_tile(G, rows, width), few)
    fp32_warps = 8 if wide >= 256 else 4

    def query_tiles(n: int, stages: int, row_size: int) -> QueryTiles:
        """``row_size``: elements of a row that stay in shared memory."""
        held = padded_rows(tokens, G)
        while (held * row_size + n * wide * stages) * dtype.itemsize > SHARED_BYTES:
            if stages > 1:
                stages -= 1
            elif n > 16:
                n //= 2
            else:
                break
        # More warps than one for 16 rows would compute the same scores twice.
        warps = fp32_warps if fp32 else 8 if held > 64 else 4
        return QueryTiles(tokens=tokens, block_n=n, num_warps=warps, num_stages=stages)

    def key_tiles(n: int, stages: int) -> KeyTiles:
        step = min(tokens_per_tile(G, rows), few)
        while (n + padded_rows(step, G) * min(stages, 2)) * wide * dtype.itemsize > SHARED_BYTES:
            if stages > 1:
                stages -= 1
            elif step > 1 and padded_rows(step, G) > 16:
                step //= 2
            elif n > 16:
                n //= 2
            else:
                break
        many = n * wide > 64 * 256 or padded_rows(step, G) > 64
        warps = fp32_warps if fp32 else 8 if many else 4
        return KeyTiles(tokens=step, block_n=n, num_warps=warps, num_stages=stages)

    if fp32:
        return SelectedTiles(
            forward=query_tiles(min(keys, 32), 1, padded(D)),
            dq=query_tiles(16, 1, wide),
            dkv=key_tiles(min(keys, 32), 1),
        )
    n = min(keys, 64)
    if wide <= 128:
        # Three programs a multiprocessor: waiting costs more than what 168 registers spill.
        dkv = replace(key_tiles(n, 1), with_dq=length >= WITH_DQ_FROM, maxnreg=168)
        return SelectedTiles(
            forward=query_tiles(n, 2, padded(D)), dq=query_tiles(n, 3, wide), dkv=dkv
        )
    return SelectedTiles(
        forward=query_tiles(n, 3, padded(D)), dq=query_tiles(n, 2, wide), dkv=key_tiles(n, 3)
    )


def default_tiles(q: Tensor, v: Tensor, block_idx: Tensor, select_block: int) -> SelectedTiles:
    """:func:`config_for` of q ``[B, T, H, D]``, v ``[B, S, K, V]``, block_idx ``[B, T, K, n]``."""
    T, H, D = q.shape[1:]
    K, V = v.shape[2:]
    n = block_idx.shape[3]
    return config_for(D, V, H // K, width=n, select_block=select_block, dtype=q.dtype, length=T)
