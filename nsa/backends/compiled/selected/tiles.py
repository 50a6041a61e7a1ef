"""Tiles of the selected branch's kernels: one row per GPU and shape, in :data:`ROWS`.

Two kinds of launch: *query tiles* (forward, dq: some tokens, over the blocks that they selected)
and *key tiles* (dk, dv: one block, over the tokens that selected it). The rows of a tile are tokens
times the G query heads of a key/value head. D key size, V value size, n selected blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from nsa.backends.compiled.tiling import (
    SM_90,
    UNTUNED,
    Capability,
    capability_of,
    head_columns,
    next_power_of_2,
    padded,
    shared_bytes,
)

MAX_SLOTS = 1024
"""Entries of one query tile's lists that :func:`.union.tile_unions` sorts at once."""

MASK_BITS = 32
"""Tokens of one query tile: one bit of an int32 each."""

WITH_DQ_FROM = 2048
"""Tokens from which small heads sum dq beside dk and dv (H100: 1.68 ms against 1.95 at T = 2048,
2.8 against 3.9 at 8192, with lists at random; with heads of 128 the adds cost more than they save).
Short sequences list nearly all they see, so that unions are small and dq alone is fast."""

CHUNK = 256
"""Tokens of one chunk of a block."""

ORDERED_CHUNK = 512
"""Tokens of one chunk where chunks are summed in order: the sums of all but a block's first go
through memory, at most two times the bytes of dk and dv in fp32 with 16 blocks of 64 listed."""

FP32_DQ_SIZE = 64
"""Head sizes D up to this one get dq in fp32, and where a row sums it by atomic adds."""

WITH_DQ_COLUMNS = 320
"""Of keys and values together at most, with padding, where larger heads sum dq beside dk and dv:
more do not stay in registers."""

SMALL_GROUP = 8
"""Query heads of a key/value head up to which far blocks are taken key-stationary (:mod:`.far`)."""

FAR_BLOCK = 128
"""Keys of a block at most there: a program holds all of it."""

FAR_SINCE = 4096
"""Position of the first token that has far blocks: up to there random lists of 16 blocks are most
of what a token sees, and unions are small."""

FAR_ROWS = 1024
"""Rows of a chunk there: many programs, since a launch has no more rows than parts have room."""

PARTS_BYTES = 5 * 2**28
"""Of the parts of far blocks at one time, 1.25 GiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch."""

    tokens: int
    """Consecutive tokens of a query tile, at most 32; of key tiles: of a step, any that selected
    the block, they need not be neighbours."""
    block_n: int
    """Keys of a step (key tiles: of a program), a power of two from 16; a block of more keys takes
    several."""
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FarTiles(Launch):
    """One launch of a kernel for far blocks, over key tiles; a program has all keys of a block."""

    chunk: int
    """As of :class:`KeyTiles`, as is ``maxnreg``."""
    since: int = FAR_SINCE
    room: int = PARTS_BYTES
    maxnreg: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryTiles(Launch):
    """One launch of the forward or of the dq kernel, and of what goes before it."""

    far: FarTiles | None = None
    """None: all blocks are near."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTiles(Launch):
    """One launch of the dk, dv kernel."""

    chunk: int = CHUNK
    """Tokens of one chunk at most: what a program reads of one block before it adds its dk, dv."""
    with_dq: bool = False
    """Whether dq is summed here too, by atomic adds in fp32, in place of a kernel of its own."""
    ordered: bool = False
    """Whether the chunks of a block are summed in order, in place of atomic adds in any order."""
    maxnreg: int | None = None
    """Registers of a thread; None leaves it to the compiler."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedTiles:
    """The launches of one problem."""

    forward: QueryTiles
    dq: QueryTiles
    dkv: KeyTiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Tiles of one shape, before they are fitted to n, l', T and shared memory."""

    D: int
    V: int
    G: int
    fp32: bool = False
    capability: Capability = SM_90
    rows: int = 64
    """Rows of a tile at most, if one token has no more."""
    forward: tuple[int, int]
    """Keys of a step and stages, as of the next two."""
    dq: tuple[int, int]
    dkv: tuple[int, int]
    dkv_maxnreg: int | None = None
    with_dq: bool = False
    """Whether long sequences sum dq beside dk and dv."""
    far: tuple[int, int] | None = None
    """Warps and stages of the forward's kernel for far blocks; None: all blocks are near."""
    far_dq: tuple[int, int] = (4, 1)
    """Those of dq's."""
    near: tuple[int, int] | None = None
    """Rows of a tile, on four warps, and stages of the forward's other kernel where far blocks go
    before it."""
    chunk_rows: int = 0
    """Rows of a chunk of key tiles, where :data:`CHUNK` tokens have fewer."""
    measured: str
    """The device and dtype that it was timed with, or :data:`UNTUNED`."""


SMALL_HEADS = Row(
    # Two or more programs a multiprocessor; three for dk and dv, where waiting costs more than what
    # 168 registers spill.
    D=64,
    V=64,
    G=6,
    forward=(64, 2),
    dq=(64, 3),
    dkv=(64, 1),
    dkv_maxnreg=168,
    with_dq=True,
    measured="H100, bf16",
)
LARGE_HEADS = Row(
    # Two programs a multiprocessor, nothing spilled.
    D=128,
    V=128,
    G=16,
    forward=(64, 3),
    dq=(64, 2),
    dkv=(64, 3),
    measured="H100, bf16",
)
PAPER = replace(
    # Forward and dq: two programs a multiprocessor.
    LARGE_HEADS,
    D=192,
    forward=(64, 2),
    dq=(32, 3),
    dkv=(64, 1),
)
BETWEEN = (
    # With two stages ptxas waits after every matrix instruction of dk and dv, and with heads of 96
    # that is faster all the same.
    replace(LARGE_HEADS, D=96, V=96, forward=(64, 2), dkv=(64, 2)),
    replace(LARGE_HEADS, D=80, V=80, dkv=(64, 1), measured=UNTUNED),
)


def small_group(row: Row, G: int) -> Row:
    """The row of fewer heads a group: far blocks, and dq, by key tiles.

    A query tile's union grows with its tokens where neighbours share little, and key tiles read
    the same whatever G is.
    """
    with_dq = head_columns(row.D) + head_columns(row.V) <= WITH_DQ_COLUMNS
    return replace(
        row,
        G=G,
        far=(4, 3),
        near=(128 if G == 8 and row.V <= 128 else row.rows, 2 if G == 1 else 1),
        chunk_rows=max(4096, 1024 * G),
        with_dq=with_dq,
        dq=(32, 2),  # with 64 keys ptxas waits after every matrix instruction
        dkv=(64, 1) if with_dq else row.dkv,
        measured=UNTUNED,
    )


SMALL_GROUPS = tuple(small_group(LARGE_HEADS, G) for G in (8, 4, 2, 1))
FP32 = Row(
    # IEEE fp32 has no matrix unit: small tiles.
    D=128,
    V=128,
    G=16,
    fp32=True,
    rows=16,
    forward=(32, 1),
    dq=(16, 1),
    dkv=(32, 1),
    measured=UNTUNED,
)
ROWS = (SMALL_HEADS, LARGE_HEADS, *SMALL_GROUPS, PAPER, *BETWEEN, FP32)
"""A shape without a row of its own gets one by :func:`tile_row`'s rule; ``bench --tune`` prints a
row to add."""


def tile_row(D: int, V: int, G: int, dtype: torch.dtype, capability: Capability = SM_90) -> Row:
    """The row of this GPU and shape; else, as untuned, the GPU's of these heads, an H100's of the
    shape or of these heads, or the nearest by dtype and head sizes."""
    fp32 = dtype == torch.float32
    for of in dict.fromkeys((capability, SM_90)):
        heads = [x for x in ROWS if (x.D, x.V, x.fp32, x.capability) == (D, V, fp32, of)]
        for row in heads:
            if row.G == G:
                return row if of == capability else replace(row, measured=UNTUNED)
        if heads:
            found = _nearest_group(heads, G)
            break
    else:
        found = SMALL_HEADS if padded(D) + padded(V) <= 128 else LARGE_HEADS
        found = replace(FP32 if fp32 else found, D=D, V=V)
    if found.far is None and G < found.G and G <= SMALL_GROUP and not fp32:
        found = small_group(found, G)
    return replace(found, G=G, measured=UNTUNED)


def _nearest_group(rows: list[Row], G: int) -> Row:
    """The row of the nearest group, not of a small one for a large one."""
    rows = [row for row in rows if row.far is None or G <= SMALL_GROUP] or rows
    found = rows[0]
    for row in rows:  # in a trace, too, which takes no key of min
        if max(row.G / G, G / row.G) < max(found.G / G, G / found.G):
            found = row
    return found


def dq_dtype(dtype: torch.dtype, D: int, V: int, G: int) -> torch.dtype:
    """Of q's gradient within a backward: fp32 where atomic adds may sum it."""
    few = head_columns(D) + head_columns(V) <= WITH_DQ_COLUMNS
    summed = D <= FP32_DQ_SIZE or (G <= SMALL_GROUP and few)
    return torch.float32 if summed else dtype


def tokens_per_tile(group: int, rows: int, width: int | None = None) -> int:
    """The most tokens whose rows fit in ``rows``, at least 1.

    ``width`` (n): also so few that the union of their lists can be made.
    """
    tokens = max(1, rows // group)
    while width is not None and tokens > 1 and not has_union(tokens, width):
        tokens -= 1
    return tokens


def has_union(tokens: int, width: int) -> bool:
    """Whether the union of the lists of so many tokens, n blocks each, can be made."""
    return tokens <= MASK_BITS and next_power_of_2(tokens * width) <= MAX_SLOTS


def shared_tokens(q: Tensor, v: Tensor, share: int) -> int:
    """``share`` where the rows of so many tokens fill three quarters of a tile, else 1.

    Then tiles of several lists' unions are fuller (H200, 12/2:64, T 32768: 0.82 ms a forward
    against 1.13 with ``select_share=4``, 0.61 against 0.44 with 8). q ``[B, T, H, D]``, v ``[B, S,
    K, V]``.
    """
    G = q.shape[2] // v.shape[2]
    rows = tile_row(q.shape[3], v.shape[3], G, q.dtype).rows
    return share if 4 * share * G >= 3 * rows else 1


@lru_cache(256)
def tiles_for(
    D: int,
    V: int,
    G: int,
    *,
    width: int,
    select_block: int,
    dtype: torch.dtype,
    length: int,
    share: int = 1,
    deterministic: bool = False,
    capability: Capability = SM_90,
    row: Row | None = None,
) -> SelectedTiles:
    """Tiles for a GPU: head sizes, group, n, l', T, how many tokens have one list (those of a
    query tile then divide it), and whether sums have one order in every run and batch.

    The row of the shape, with no more keys than a block has, and less of everything until it fits
    in shared memory. T says how dq is summed and how many stages there are: of all else a sequence
    has the same alone and packed with others. ``row``: in place of :func:`tile_row`'s.
    """
    row = row or tile_row(D, V, G, dtype, capability)
    most_bytes = shared_bytes(capability)
    with_dq = row.with_dq and dq_dtype(dtype, D, V, G) == torch.float32
    wide = head_columns(D) + head_columns(V)
    keys = padded(select_block)
    tokens = tokens_per_tile(G, row.rows, width)
    if share > 1:
        most = tokens_per_tile(G, row.rows)
        tokens = max(m for m in range(1, share + 1) if share % m == 0 and m <= most)
    fp32_warps = 8 if wide >= 256 else 4

    def query_tiles(n: int, stages: int, row_size: int, tokens: int = tokens) -> QueryTiles:
        """``row_size``: elements of a row that stay in shared memory."""
        n = min(keys, n)
        rows = padded(tokens * G)
        while (rows * row_size + n * wide * stages) * dtype.itemsize > most_bytes:
            if stages > 1:
                stages -= 1
            elif n > 16:
                n //= 2
            else:
                break
        # More warps than one for 16 rows would compute the same scores twice.
        warps = fp32_warps if row.fp32 else 8 if rows > 64 else 4
        return QueryTiles(tokens=tokens, block_n=n, num_warps=warps, num_stages=stages)

    def far_tiles(warps: int, stages: int, row_size: int) -> FarTiles | None:
        if row.far is None or share > 1 or keys > FAR_BLOCK:
            return None
        step = tokens_per_tile(G, row.rows)
        size = padded(step * G) * row_size
        while stages > 1 and (keys * wide + size * stages) * dtype.itemsize > most_bytes:
            stages -= 1
        chunk = max(1, FAR_ROWS // G)
        return FarTiles(
            tokens=step,
            block_n=keys,
            num_warps=warps,
            num_stages=stages,
            chunk=chunk,
            since=FAR_SINCE,
            room=PARTS_BYTES,
        )

    def key_tiles(n: int, stages: int) -> KeyTiles:
        n = min(keys, n)
        step = tokens_per_tile(G, row.rows)
        while (n + padded(step * G) * min(stages, 2)) * wide * dtype.itemsize > most_bytes:
            if stages > 1:
                stages -= 1
            elif step > 1 and padded(step * G) > 16:
                step //= 2
            elif n > 16:
                n //= 2
            else:
                break
        large = n * wide > 64 * (256 if row.with_dq else 320) or padded(step * G) > 64
        return KeyTiles(
            tokens=step,
            block_n=n,
            num_warps=fp32_warps if row.fp32 else 8 if large else 4,
            num_stages=stages,
            with_dq=with_dq and length >= WITH_DQ_FROM and not deterministic,
            maxnreg=row.dkv_maxnreg,
            chunk=ORDERED_CHUNK if deterministic else max(CHUNK, row.chunk_rows // G),
            ordered=deterministic,
        )

    forward, dq = query_tiles(*row.forward, head_columns(D)), query_tiles(*row.dq, wide)
    far = far_tiles(*(row.far or (1, 1)), head_columns(D))
    if far is not None and row.near is not None and length >= far.since:
        near, stages = tokens_per_tile(G, row.near[0], width), row.near[1]
        forward = query_tiles(row.forward[0], stages, head_columns(D), near)
        forward = replace(forward, num_warps=4)
    return SelectedTiles(
        forward=replace(forward, far=far),
        dq=replace(dq, far=far_tiles(*row.far_dq, wide)),
        dkv=key_tiles(*row.dkv),
    )


def default_tiles(
    q: Tensor,
    v: Tensor,
    block_idx: Tensor,
    select_block: int,
    share: int = 1,
    *,
    deterministic: bool = False,
) -> SelectedTiles:
    """:func:`tiles_for` q ``[B, T, H, D]``, v ``[B, S, K, V]``, block_idx ``[B, T, K, n]``."""
    T, H, D = q.shape[1:]
    K, V = v.shape[2:]
    n = block_idx.shape[3]
    return tiles_for(
        *(D, V, H // K),
        width=n,
        select_block=select_block,
        dtype=q.dtype,
        length=T,
        share=share,
        deterministic=deterministic,
        capability=capability_of(q.device),
    )


def part_slices(
    B: int, T: int, K: int, *, token: int, width: int, room: int = PARTS_BYTES
) -> tuple[int, int]:
    """Tokens, and batch rows times key/value heads, whose parts (:mod:`.far`) have room together,
    at least one; where there are fewer than T tokens, of one batch row.

    token: bytes of the parts of one token and key/value head; width: n.
    """
    tokens = min(T, max(1, room // token), (2**31 - 3) // (B * K * width))
    tokens = -(-T // -(-T // tokens))  # all alike
    heads = (B if tokens == T else 1) * K
    return tokens, min(heads, max(1, room // (token * tokens)))


def part_bytes(n: int, G: int, V: int, itemsize: int) -> int:
    """Of the parts of one token and key/value head, with their lse."""
    return n * G * (V * itemsize + 4)


@dataclass(frozen=True, slots=True)
class Constants:
    """Compile-time constants of a launch, one argument of each of the three kernels."""

    G: int
    D: int
    V: int
    SELECT_BLOCK: int
    WIDTH: int
    """n, entries of a list."""
    TOKENS: int
    BLOCK_M: int
    """Rows of a tile, at least TOKENS * G."""
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_DV: int
    PARTS: int
    """Steps of BLOCK_N keys of a block."""
    PRECISION: str
    """Of products of fp32; no effect on 16 bits."""
    SLOTS: int
    """n, padded to a power of two."""
    SHARED: bool
    """Whether all tokens of a query tile have one list."""
    PACKED: bool
    """With SHARED: whether sequences are packed."""


def constants(
    q: Tensor,
    v: Tensor,
    block_idx: Tensor,
    select_block: int,
    tiles: Launch,
    *,
    shared: bool = False,
    packed: bool = False,
) -> Constants:
    """Those of q ``[B, T, H, D]``, v ``[B, S, K, V]``, block_idx ``[B, T, K, n]``."""
    D, V, G = q.shape[3], v.shape[3], q.shape[2] // v.shape[2]
    return Constants(
        G=G,
        D=D,
        V=V,
        SELECT_BLOCK=select_block,
        WIDTH=block_idx.shape[3],
        TOKENS=tiles.tokens,
        BLOCK_M=padded(tiles.tokens * G),
        BLOCK_N=tiles.block_n,
        BLOCK_D=head_columns(D),
        BLOCK_DV=head_columns(V),
        PARTS=-(-select_block // tiles.block_n),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        SLOTS=next_power_of_2(block_idx.shape[3]),
        SHARED=shared,
        PACKED=packed,
    )
