"""A step of decode in three launches: compressed, selection, the gated sum of the branches.

No launch waits for the host, and what they share is made anew for every step: they may be captured
in a CUDA graph, under which lengths, page tables and lists change in place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from nsa.backends.compiled.common import LOG2E, positive
from nsa.backends.compiled.decode.compressed import nsa_decode_compressed
from nsa.backends.compiled.decode.gated import nsa_decode_gated
from nsa.backends.compiled.decode.select import nsa_decode_select
from nsa.backends.compiled.decode.tiles import (
    MOST_ROWS,
    Constants,
    DecodeTiles,
    KeyTiles,
    Split,
    tiles_for,
)
from nsa.backends.compiled.tiling import (
    SM_90,
    capability_of,
    launch_options,
    next_power_of_2,
    padded,
)
from nsa.config import NSAConfig
from nsa.core.inputs import DecodeInputs
from nsa.errors import BackendUnavailable
from nsa.selection.rules import least_mass, width

MOST_KEYS = 64
"""Compressed blocks that begin in a selection block, at most."""


def decode_attention(
    inputs: DecodeInputs, config: NSAConfig, *, tiles: DecodeTiles | None = None
) -> tuple[Tensor, Tensor]:
    """The gated sum of the three branches, and the blocks that were read.

    Args:
        inputs: keys and values have heads side by side in memory, page tables their entries;
            ``select_share`` is the caller's, who gives the lists of queries that have another's.
        tiles: overrides :func:`tiles_for`.

    Returns:
        out ``[B, S, H, V]`` in q's dtype; block_idx int32 ``[B, S, K, n]``, ascending, then −1.

    Raises:
        BackendUnavailable: for an option of selection that decode has no kernel for.
    """
    q, k_cmp = inputs.q, inputs.compressed.k
    B, S, H, _ = q.shape
    N, K, V = k_cmp.shape[1], k_cmp.shape[2], inputs.compressed.v.shape[3]
    _refuse(inputs, config)
    q, scale, _ = positive(q, config.softmax_scale)
    rows = min(MOST_ROWS, padded(S * (H // K)))
    ratio = config.select_block // config.compress_stride
    sizes = {"compressed": N, "ratio": ratio, "rows": rows}
    if tiles is None:
        capability = capability_of(q.device)
        tiles = tiles_for(q.dtype, q.shape[3], V, **sizes, capability=capability)
    C = _constants(q, K, V, inputs, config, tiles)
    out = torch.empty(B, S, H, V, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out, q.new_empty(B, S, K, C.NUM_SELECTED, dtype=torch.int32)
    inputs = inputs._replace(q=q, block_idx=_contiguous(inputs.block_idx))
    with torch.cuda.device_of(q):
        space = _Space.of(inputs, config.window, tiles, C)
        _compressed(inputs, space, scale * LOG2E, tiles, C)
        block_idx = _select(inputs, space, config.window, scale * LOG2E, tiles, C)
        inputs = inputs._replace(block_idx=block_idx)
        _gated(inputs, space, config.window, out, scale * LOG2E, tiles, C)
    return out, block_idx


def without_kernel(config: NSAConfig, *, e4m3: bool, given: bool = False) -> str | None:
    """What the kernels have no code for, if that is asked for: an option of selection where lists
    are not given, keys and values in e4m3, or very many compressed blocks in a selection block."""
    options = (("select_regions", None), ("score_dtype", "input"), ("select_share", 1))
    for name, off in () if given else options:
        value = getattr(config, name)
        if value != off:
            return f"no kernel for {name}={value!r}"
    ratio = config.select_block // config.compress_stride
    if ratio > MOST_KEYS:
        return f"no kernel for select_block / compress_stride above {MOST_KEYS}, got {ratio}"
    return "no kernel for e4m3 keys and values" if e4m3 else None


def _refuse(inputs: DecodeInputs, config: NSAConfig) -> None:
    e4m3, given = inputs.selected_scale is not None, inputs.block_idx is not None
    why_not = without_kernel(config, e4m3=e4m3, given=given)
    if why_not is not None:
        raise BackendUnavailable(f"compiled cannot decode this: {why_not}; use backend='sdpa'")


def _contiguous(block_idx: Tensor | None) -> Tensor | None:
    return None if block_idx is None else block_idx.contiguous()


def _tokens(inputs: DecodeInputs) -> int:
    """Tokens that a sequence has room for."""
    return inputs.page_table.shape[1] * inputs.selected.k.shape[1]


def _constants(
    q: Tensor, K: int, V: int, inputs: DecodeInputs, config: NSAConfig, tiles: DecodeTiles
) -> Constants:
    S, H, D = q.shape[1:]
    block_idx = inputs.block_idx
    n = width(_tokens(inputs), config) if block_idx is None else block_idx.shape[3]
    ratio = config.select_block // config.compress_stride
    wide = next_power_of_2(ratio)
    return Constants(
        S=S,
        G=H // K,
        D=D,
        V=V,
        COMPRESS_BLOCK=config.compress_block,
        COMPRESS_STRIDE=config.compress_stride,
        SELECT_BLOCK=config.select_block,
        NUM_SELECTED=n,
        NUM_INITIAL=config.num_initial,
        NUM_LOCAL=config.num_local,
        SCHEDULE=tuple(reversed(config.select_schedule or ())),
        ENOUGH=least_mass(config),
        RATIO=ratio,
        WIDE=wide,
        TILE_BLOCKS=max(1, tiles.compressed.block_n // wide),
        SLOTS=max(2, next_power_of_2(n)),
        BLOCK_M=min(MOST_ROWS, padded(S * (H // K))),
        BLOCK_GROUP=padded(H // K),
        BLOCK_D=padded(D),
        BLOCK_DV=padded(V),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        OVERLAP=tiles.overlap and q.is_cuda and capability_of(q.device) >= SM_90,
    )


Parts = tuple[Tensor, Tensor]
"""Room for partial results, as of :mod:`.parts`."""


class _Space(NamedTuple):
    """What the launches of a step hand on; how many parts there are follows from shapes alone."""

    split: Split
    """Of compressed keys."""
    window_split: Split
    tiles: int
    """Steps over the compressed keys of a head."""
    counters: Tensor
    """int32 ``[2, B, S, K]``"""
    scores: Parts | None
    """Of :func:`.compressed.nsa_decode_compressed`; None: the lists are given."""
    compressed: Parts
    window: Parts
    out_cmp: Tensor
    """fp32 ``[B, S, H, V]``"""

    @classmethod
    def of(cls, inputs: DecodeInputs, window: int, tiles: DecodeTiles, C: Constants) -> _Space:
        q, (B, N, K) = inputs.q, inputs.compressed.k.shape[:3]
        step = C.TILE_BLOCKS * C.RATIO
        split = Split.of(
            N, tiles.compressed.keys, B * K * triton.cdiv(C.ROWS, C.BLOCK_M), multiple=step
        )
        visible = min(window, inputs.window.k.shape[1])
        window_split = Split.of(visible, tiles.window.keys, B * C.S * K, tiles.window.block_n)
        num_tiles, scores = triton.cdiv(N, step), None

        def room(*size: int) -> Tensor:
            return torch.empty(size, dtype=torch.float32, device=q.device)

        def parts(count: int, rows: int) -> Parts:
            return room(count, rows, C.V), room(count, 2, rows)

        if inputs.block_idx is None:
            sums = room(B, K, num_tiles * C.TILE_BLOCKS, 2, C.ROWS)
            scores = sums, room(B, K, num_tiles, C.ROWS)
        return cls(
            split=split,
            window_split=window_split,
            tiles=num_tiles,
            counters=torch.empty(2, B, C.S, K, dtype=torch.int32, device=q.device),
            scores=scores,
            compressed=parts(B * K * split.parts, C.ROWS),
            window=parts(B * C.S * K * window_split.parts, C.G),
            out_cmp=room(B, C.S, K * C.G, C.V),
        )


def _compressed(
    inputs: DecodeInputs, space: _Space, scale_log2: float, tiles: DecodeTiles, C: Constants
) -> None:
    """Writes ``space.scores`` and ``space.compressed``, and zeroes the counters."""
    q, (k, v), launch = inputs.q, inputs.compressed, tiles.compressed
    B, (N, K) = q.shape[0], k.shape[1:3]
    assert k.stride(3) == v.stride(3) == 1
    nsa_decode_compressed[(B * space.split.parts * triton.cdiv(C.ROWS, C.BLOCK_M) * K,)](
        *(q, inputs.position, k, v, space.scores, space.compressed, space.counters),
        *(x.stride() for x in (q, k, v)),
        *(N, space.split.parts, space.tiles, K, B * C.S * K, scale_log2),
        KEYS=space.split.part,
        UNIT=space.split.unit,
        SCORES=space.scores is not None,
        C=C,
        **launch_options(launch.num_warps, launch.num_stages),
    )


def _select(
    inputs: DecodeInputs,
    space: _Space,
    window: int,
    scale_log2: float,
    tiles: DecodeTiles,
    C: Constants,
) -> Tensor:
    """Writes ``space.window`` and ``space.out_cmp``; returns the lists, made here unless given."""
    q, ring, launch = inputs.q, inputs.window, tiles.window
    (B, S), K = q.shape[:2], ring.k.shape[2]
    assert all(x.stride(3) == 1 for x in ring)
    block_idx, chunks, chunk, keys, mass = inputs.block_idx, 0, 0, None, None
    blocks = max(tiles.select_blocks, C.SLOTS)
    rows = B * S * K
    few = triton.cdiv(tiles.select_programs, rows)
    if block_idx is None:
        steps = max(1, triton.cdiv(_tokens(inputs), C.SELECT_BLOCK * blocks))
        chunk = triton.cdiv(steps, few)
        chunks = triton.cdiv(steps, chunk)
        chunk *= blocks
        keys = torch.empty(rows, chunks, C.SLOTS, dtype=torch.int64, device=q.device)
        if C.ENOUGH is not None:
            size = rows, chunks * chunk // blocks
            mass = torch.empty(size, dtype=torch.float32, device=q.device)
        shape = B, S, K, C.NUM_SELECTED
        block_idx = torch.empty(shape, dtype=torch.int32, device=q.device)
    columns = max(min(16, C.BLOCK_DV), C.BLOCK_DV // next_power_of_2(few))
    programs = chunks + space.window_split.parts + triton.cdiv(C.V, columns)
    nsa_decode_select[(rows * programs,)](
        *(q, inputs.position, tuple(ring), space.scores, space.compressed, keys, mass),
        *(space.counters[0], space.out_cmp, space.window, block_idx),
        *(q.stride(), tuple(x.stride() for x in ring)),
        *(inputs.compressed.k.shape[1], space.split.parts, space.tiles, K, rows, chunks, chunk),
        *(window, ring.k.shape[1], scale_log2),
        KEYS=space.split.part,
        GROUPS=next_power_of_2(space.split.groups),
        FOLD=space.split.fold,
        BLOCKS=blocks,
        COLUMNS=columns,
        WINDOW_PARTS=space.window_split.parts,
        WINDOW_KEYS=space.window_split.part,
        WINDOW_UNIT=space.window_split.unit,
        BLOCK_N=launch.block_n,
        C=C,
        **_after_another(launch, C),
    )
    return block_idx


def _after_another(launch: KeyTiles, C: Constants) -> dict[str, int]:
    options = launch_options(launch.num_warps, launch.num_stages)
    return {**options, "launch_pdl": True} if C.OVERLAP else options


def _gated(
    inputs: DecodeInputs,
    space: _Space,
    window: int,
    out: Tensor,
    scale_log2: float,
    tiles: DecodeTiles,
    C: Constants,
) -> None:
    q, (k, v), launch, table = inputs.q, inputs.selected, tiles.selected, inputs.page_table
    rows, K = space.counters[1].numel(), k.shape[2]
    assert k.stride(3) == v.stride(3) == table.stride(1) == 1
    blocks = next_power_of_2(max(1, launch.keys // C.SELECT_BLOCK))
    split, of_window = Split.of(C.NUM_SELECTED, blocks, rows), space.window_split
    count = split.parts
    sums = torch.empty(rows * count, C.G, C.V, dtype=torch.float32, device=q.device)
    stats = torch.empty(rows * count, 2, C.G, dtype=torch.float32, device=q.device)
    nsa_decode_gated[(rows * count,)](
        *(q, inputs.position, inputs.block_idx, table, k, v, inputs.gates),
        *(space.out_cmp, space.window, (sums, stats), space.counters[1], out),
        *(q.stride(), table.stride(0), k.stride(), v.stride(), inputs.gates.stride()),
        *(C.NUM_SELECTED, k.shape[1], window, K, scale_log2),
        SLOTS=C.SLOTS,
        ENTRIES=split.part,
        UNIT=split.unit,
        PARTS=count,
        WINDOW_PARTS=of_window.parts,
        WINDOW_KEYS=of_window.part,
        GROUPS=next_power_of_2(max(split.groups, of_window.groups)),
        FOLD=split.fold,
        WINDOW_FOLD=of_window.fold,
        BLOCK_N=min(launch.block_n, padded(C.SELECT_BLOCK)),
        C=C,
        **_after_another(launch, C),
    )
