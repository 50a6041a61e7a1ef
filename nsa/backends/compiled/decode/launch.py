"""A step of decode in three launches: compressed, selection, the gated sum of the branches.

No launch waits for the host, and what they share is made anew for every step: they may be captured
in a CUDA graph, under which lengths, page tables and lists change in place.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from nsa.backends.compiled.common import LOG2E, positive
from nsa.backends.compiled.decode.compressed import nsa_decode_compressed
from nsa.backends.compiled.decode.gated import nsa_decode_gated
from nsa.backends.compiled.decode.select import nsa_decode_select
from nsa.backends.compiled.decode.tiles import (
    MERGED,
    MOST_ROWS,
    Constants,
    DecodeTiles,
    tiles_for,
)
from nsa.backends.compiled.tiling import launch_options, next_power_of_2, padded
from nsa.config import NSAConfig
from nsa.core.inputs import DecodeInputs
from nsa.errors import BackendUnavailable
from nsa.selection.rules import least_mass, width

COLUMNS = 32
"""Of the compressed branch's output that one program sums."""


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
    if inputs.block_idx is None:
        _refuse_options(config)
    q, scale, _ = positive(q, config.softmax_scale)
    C = _constants(q, K, V, inputs, config)
    tiles = tiles or tiles_for(q.dtype, C.D, V, compressed=N, rows=max(C.BLOCK_M, C.BLOCK_GROUP))
    inputs = inputs._replace(q=q, block_idx=_contiguous(inputs.block_idx))
    out = torch.empty(B, S, H, V, dtype=q.dtype, device=q.device)
    out_cmp = torch.empty(B, S, H, V, dtype=torch.float32, device=q.device)
    counters = torch.empty(2, B, S, K, dtype=torch.int32, device=q.device)
    if out.numel() == 0:
        return out, q.new_empty(B, S, K, C.NUM_SELECTED, dtype=torch.int32)
    with torch.cuda.device_of(q):
        scores, parts = _compressed(inputs, counters, scale * LOG2E, tiles, C)
        block_idx = _select(inputs, scores, parts, counters[0], out_cmp, tiles, C)
        inputs = inputs._replace(block_idx=block_idx)
        _gated(inputs, config.window, out_cmp, counters[1], out, scale * LOG2E, tiles, C)
    return out, block_idx


def _refuse_options(config: NSAConfig) -> None:
    for name, off in (("select_regions", None), ("score_dtype", "input")):
        value = getattr(config, name)
        if value != off:
            raise BackendUnavailable(
                f"compiled decodes with {name}={off!r}, got {value!r}: use backend='sdpa'"
            )


def _contiguous(block_idx: Tensor | None) -> Tensor | None:
    return None if block_idx is None else block_idx.contiguous()


def _constants(q: Tensor, K: int, V: int, inputs: DecodeInputs, config: NSAConfig) -> Constants:
    S, H, D = q.shape[1:]
    tokens = inputs.page_table.shape[1] * inputs.selected.k.shape[1]
    n = width(tokens, config) if inputs.block_idx is None else inputs.block_idx.shape[3]
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
        SLOTS=max(2, next_power_of_2(n)),
        BLOCK_M=min(MOST_ROWS, padded(S * (H // K))),
        BLOCK_GROUP=padded(H // K),
        BLOCK_D=padded(D),
        BLOCK_DV=padded(V),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )


def _parts(count: int, rows: int, V: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for ``count`` partial results, as of :mod:`.parts`."""
    sums = torch.empty(count, rows, V, dtype=torch.float32, device=device)
    return sums, torch.empty(count, 2, rows, dtype=torch.float32, device=device)


def _splits(N: int, tiles: DecodeTiles) -> int:
    return max(1, triton.cdiv(N, tiles.compressed.keys))


def _compressed(
    inputs: DecodeInputs, counters: Tensor, scale_log2: float, tiles: DecodeTiles, C: Constants
) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
    """The scores ``[B, K, N, S * G]`` if a list is made of them, and the partial results."""
    q, (k, v), launch = inputs.q, inputs.compressed, tiles.compressed
    B, (N, K) = q.shape[0], k.shape[1:3]
    assert k.stride(3) == v.stride(3) == 1
    splits = _splits(N, tiles)
    parts = _parts(B * K * splits, C.ROWS, C.V, q.device)
    scores = None
    if inputs.block_idx is None:
        scores = torch.empty(B, K, N, C.ROWS, dtype=torch.float32, device=q.device)
    nsa_decode_compressed[(B * splits * triton.cdiv(C.ROWS, C.BLOCK_M) * K,)](
        *(q, inputs.position, k, v, scores, parts, counters),
        *(x.stride() for x in (q, k, v)),
        *(N, splits, K, B * C.S * K, scale_log2),
        KEYS=launch.keys,
        BLOCK_N=launch.block_n,
        C=C,
        **launch_options(launch.num_warps, launch.num_stages),
    )
    return scores, parts


def _select(
    inputs: DecodeInputs,
    scores: Tensor | None,
    parts: tuple[Tensor, Tensor],
    counters: Tensor,
    out_cmp: Tensor,
    tiles: DecodeTiles,
    C: Constants,
) -> Tensor:
    """Writes ``out_cmp`` and returns the lists, made here unless given."""
    B, S, K = counters.shape
    N, splits = inputs.compressed.k.shape[1], _splits(inputs.compressed.k.shape[1], tiles)
    block_idx, chunks, keys, mass = inputs.block_idx, 0, None, None
    blocks = max(tiles.select_blocks, C.SLOTS)
    if block_idx is None:
        tokens = inputs.page_table.shape[1] * inputs.selected.k.shape[1]
        chunks = max(1, triton.cdiv(tokens, C.SELECT_BLOCK * blocks))
        keys = torch.empty(B, S, K, chunks, C.SLOTS, dtype=torch.int64, device=out_cmp.device)
        if C.ENOUGH is not None:
            mass = torch.empty(B, S, K, chunks, dtype=torch.float32, device=out_cmp.device)
        shape = B, S, K, C.NUM_SELECTED
        block_idx = torch.empty(shape, dtype=torch.int32, device=out_cmp.device)
    columns = min(COLUMNS, C.BLOCK_DV)
    programs = chunks + triton.cdiv(C.V, columns)
    nsa_decode_select[(B * S * programs * K,)](
        *(inputs.position, scores, parts, keys, mass, counters, out_cmp, block_idx),
        *(N, splits, K, chunks),
        KEYS=tiles.compressed.keys,
        PARTS=next_power_of_2(splits),
        STEP=_merged(C.BLOCK_GROUP * columns, splits),
        BLOCKS=blocks,
        COLUMNS=columns,
        C=C,
        **launch_options(tiles.select_warps, 1),
    )
    return block_idx


def _merged(size: int, parts: int) -> int:
    """Partial results of ``size`` elements that a program reads at a time."""
    return min(next_power_of_2(parts), max(1, MERGED // size))


def _gated(
    inputs: DecodeInputs,
    window: int,
    out_cmp: Tensor,
    counters: Tensor,
    out: Tensor,
    scale_log2: float,
    tiles: DecodeTiles,
    C: Constants,
) -> None:
    q, selected, ring, launch = inputs.q, inputs.selected, inputs.window, tiles.gated
    B, S, K = counters.shape
    assert inputs.block_idx is not None
    assert inputs.page_table.stride(1) == 1
    assert all(x.stride(3) == 1 for x in (*selected, *ring))
    entries = max(1, next_power_of_2(launch.keys // C.SELECT_BLOCK))
    selected_parts = triton.cdiv(C.NUM_SELECTED, entries)
    window_parts = triton.cdiv(min(window, ring.k.shape[1]), entries * C.SELECT_BLOCK)
    most = next_power_of_2(max(selected_parts, window_parts))
    programs = selected_parts + window_parts
    parts = _parts(B * S * K * programs, C.G, C.V, q.device)
    nsa_decode_gated[(B * S * programs * K,)](
        *(q, inputs.position, inputs.block_idx, inputs.page_table, tuple(selected), tuple(ring)),
        *(inputs.gates, out_cmp, parts, counters, out),
        *(q.stride(), inputs.page_table.stride(0)),
        *(tuple(x.stride() for x in selected), tuple(x.stride() for x in ring)),
        *(inputs.gates.stride(), C.NUM_SELECTED, selected.k.shape[1], window, ring.k.shape[1]),
        *(K, scale_log2),
        SELECTED_PARTS=selected_parts,
        WINDOW_PARTS=window_parts,
        SLOTS=C.SLOTS,
        MERGED=most,
        ENTRIES=entries,
        BLOCK_N=min(launch.block_n, padded(C.SELECT_BLOCK)),
        STEP=_merged(C.BLOCK_GROUP * C.BLOCK_DV, most),
        C=C,
        **launch_options(launch.num_warps, launch.num_stages),
    )
