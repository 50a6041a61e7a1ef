"""The selection kernel in Triton's interpreter: run with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from nsa import NSAConfig, reference
from nsa.backends.compiled.select.launch import select_forward
from nsa.backends.compiled.select.tiles import (
    ROWS,
    SearchTiles,
    SelectTiles,
    select_tiles,
    tile_row,
)
from nsa.backends.compiled.tiling import UNTUNED
from nsa.reference.packing import spans
from nsa.testing import Inputs, make_inputs
from nsa.testing.selection import _sequence_faults
from nsa.testing.strategies import Case, cases
from tests.triton_interpreter import triton_fixes

triton_fixes.apply()

SMALL = SelectTiles(rows=64, blocks=16, num_warps=4, num_stages=2)
SEARCH = SearchTiles(keys=16, chunk=32, num_warps=1, num_stages=2)
CONFIG = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    compress_block=4,
    compress_stride=2,
    select_block=6,
    num_selected=4,
    num_local=1,
)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel does not write is no block number."""
    empty = torch.empty

    def poisoned(*size: Any, **kwargs: Any) -> Tensor:
        return empty(*size, **kwargs).fill_(-77)

    monkeypatch.setattr("nsa.backends.compiled.select.launch.torch.empty", poisoned)


def select(
    q: Tensor,
    k: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None = None,
    *,
    q_start: int = 0,
    tiles: SelectTiles | None = SMALL,
) -> Tensor:
    """The kernel under the signature of a backend's step, lse from the oracle."""
    if cu_seqlens is None:
        _, lse = reference.compressed_attention(q, k, k, config, q_start=q_start)
    else:
        _, lse = reference.compressed_attention(q, k, k, config, cu_seqlens)
    return select_forward(
        q, k, lse, config, cu_seqlens, q_start=q_start, tiles=tiles, search=SEARCH
    )


def faults(inputs: Inputs, chosen: Tensor) -> list[str]:
    """The acceptance rule of :func:`nsa.testing.selection_faults`, sequence by sequence."""
    q, k, config = inputs.q.detach(), inputs.compressed.k.detach(), inputs.config
    expected_shape = (*q.shape[:2], config.num_kv_heads, config.num_selected)
    assert chosen.dtype == torch.int32
    assert tuple(chosen.shape) == expected_shape
    if inputs.cu_seqlens is None:
        return _sequence_faults(q, k, chosen, config)
    found = []
    for seq in spans(inputs.cu_seqlens, config):
        if seq.tokens.stop > seq.tokens.start:
            parts = q[:, seq.tokens], k[:, seq.blocks], chosen[:, seq.tokens]
            found += _sequence_faults(*parts, config)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(case=cases(max_length=60))
@settings(max_examples=5)
def test_obeys_the_acceptance_rule(dtype: torch.dtype, case: Case) -> None:
    inputs = case.inputs(dtype)
    q, k = inputs.q.detach(), inputs.compressed.k.detach()
    assert faults(inputs, select(q, k, case.config, inputs.cu_seqlens)) == []


@pytest.mark.parametrize(
    ("geometry", "length"),
    [((4, 2, 6), 110), ((3, 1, 4), 75), ((2, 2, 2), 45), ((6, 2, 6), 110), ((32, 16, 64), 1100)],
)
def test_equals_the_oracle(geometry: tuple[int, int, int], length: int) -> None:
    """More candidates than one step holds; long cases look at the last rows only."""
    block, stride, select_block = geometry
    config = NSAConfig(
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        compress_block=block,
        compress_stride=stride,
        select_block=select_block,
        num_selected=5,
        num_initial=1,
        num_local=2,
    )
    inputs = make_inputs(config, length=length, seed=length)
    first = length - 21
    q, k = inputs.q.detach()[:, first:], inputs.compressed.k.detach()
    tiles = SelectTiles(rows=32, blocks=16, num_warps=4, num_stages=2)
    chosen = select(q, k, config, q_start=first, tiles=tiles)
    assert torch.equal(chosen, reference.select_blocks(q, k, config, q_start=first))


@pytest.mark.parametrize(
    ("selected", "initial", "local"),
    [(1, 0, 0), (1, 1, 0), (3, 0, 2), (4, 2, 2), (13, 1, 2), (40, 0, 1)],
)
def test_numbers_of_blocks(selected: int, initial: int, local: int) -> None:
    config = NSAConfig(
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        compress_block=4,
        compress_stride=2,
        select_block=4,
        num_selected=selected,
        num_initial=initial,
        num_local=local,
    )
    inputs = make_inputs(config, length=100, seed=3)
    q, k = inputs.q.detach(), inputs.compressed.k.detach()
    tiles = SelectTiles(rows=64, blocks=64 if selected > 16 else 16, num_warps=4, num_stages=2)
    chosen = select(q, k, config, tiles=tiles)
    assert torch.equal(chosen, reference.select_blocks(q, k, config))


@pytest.mark.parametrize("initial", [0, 1])
def test_ties_go_to_the_lower_index(initial: int) -> None:
    """With q = 0 every visible block weighs the same, and scores tie but at the edges."""
    config = NSAConfig(
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        compress_block=4,
        compress_stride=2,
        select_block=6,
        num_selected=4,
        num_initial=initial,
        num_local=1,
    )
    inputs = make_inputs(config, length=130)
    q, k = torch.zeros_like(inputs.q)[:, 90:], inputs.compressed.k.detach()
    tiles = SelectTiles(rows=32, blocks=16, num_warps=4, num_stages=2)
    chosen = select(q, k, config, q_start=90, tiles=tiles)
    assert torch.equal(chosen, reference.select_blocks(q, k, config, q_start=90))
    assert chosen[0, -1, 0].tolist() == ([0, 1, 2, 21] if initial else [1, 2, 3, 21])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_to_come_do_not_count(dtype: torch.dtype) -> None:
    """Keys that a query does not see yet, however large; around the end of the first step."""
    config = NSAConfig(
        num_heads=3,
        num_kv_heads=1,
        head_dim=8,
        compress_block=4,
        compress_stride=2,
        select_block=6,
        num_selected=4,
        num_initial=0,
        num_local=0,
    )
    inputs = make_inputs(config, length=104, dtype=dtype)
    q, k = inputs.q.detach(), inputs.compressed.k.detach()
    tiles = SelectTiles(rows=16, blocks=16, num_warps=4, num_stages=2)
    for first in range(92, 104, 4):  # tiles of four tokens
        whole = select(q[:, first : first + 4], k, config, q_start=first, tiles=tiles)
        for t in range(first, first + 4):
            changed = k.clone()
            changed[:, config.num_compressed(t + 1) :] = 100 * q[:, t : t + 1, :1]
            found = select(q[:, first : t + 1], changed, config, q_start=first, tiles=tiles)
            assert torch.equal(found[:, -1], whole[:, t - first]), t


def test_packed_with_empty_sequences() -> None:
    """Several sequences in a tile, a tile in one sequence, and rows that belong to nobody."""
    lengths = (0, 3, 1, 0, 50, 2, 30, 0)
    inputs = make_inputs(CONFIG, lengths=lengths, seed=5, surplus=True)
    assert inputs.compressed.k.isnan().any()
    q, k = inputs.q.detach(), inputs.compressed.k.detach()
    chosen = select(q, k, CONFIG, inputs.cu_seqlens)
    assert torch.equal(chosen, reference.select_blocks(q, k, CONFIG, inputs.cu_seqlens))


OPTIONS = {
    "schedule": {"select_schedule": ((9, 2), (30, 3))},
    "mass": {"select_mass": 0.6},
    "share": {"select_share": 3},
    "regions": {"select_regions": (2, 1)},
    "fp8": {"score_dtype": "fp8"},
}
OPTIONS["all"] = {name: value for option in OPTIONS.values() for name, value in option.items()}


@pytest.mark.parametrize(
    ("option", "packed"),
    [
        pytest.param(
            *(option, packed),
            marks=[pytest.mark.slow] if not packed and option in ("regions", "fp8") else [],
            id=f"{option}-{'packed' if packed else 'regular'}",
        )
        for option in OPTIONS
        for packed in (False, True)
    ],
)
def test_options_equal_the_oracle(option: str, packed: bool) -> None:
    """From the middle of a sequence, or sequences that are empty, short or end within a share."""
    config = replace(CONFIG, **OPTIONS[option])
    if packed:
        inputs = make_inputs(config, lengths=(2, 0, 40, 13, 5), seed=5, surplus=True)
    else:
        inputs = make_inputs(config, length=54, batch=2, seed=5)
    q, k, first = inputs.q.detach(), inputs.compressed.k.detach(), 0 if packed else 30
    chosen = select(q[:, first:], k, config, inputs.cu_seqlens, q_start=first)
    assert torch.equal(chosen, reference.select_blocks(q, k, config, inputs.cu_seqlens)[:, first:])


@pytest.mark.parametrize("chunk", [16, 64, 512])
@pytest.mark.parametrize("regions", [(6, 2), (5, 1)])
def test_regions_in_pieces(regions: tuple[int, int], chunk: int) -> None:
    """Of one block, of several and whole; one chunk or many: the same lists, ties included."""
    config = replace(CONFIG, compress_block=6, num_initial=2, select_regions=regions)
    inputs = make_inputs(config, length=170)
    k = inputs.compressed.k.detach().round()
    k[:, 30:60] = k[:, :30]  # blocks that score alike
    q, first = inputs.q.detach().round(), 165
    _, lse = reference.compressed_attention(q[:, first:], k, k, config, q_start=first)
    search = SearchTiles(16, chunk, 1, 2)
    chosen = select_forward(q[:, first:], k, lse, config, q_start=first, search=search)
    assert torch.equal(chosen, reference.select_blocks(q, k, config)[:, first:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [48, 72])
def test_heads_in_two_parts(head_dim: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(
        replace(CONFIG, head_dim=head_dim), lengths=(2, 0, 40, 13), dtype=dtype, surplus=True
    )
    q, k = inputs.q.detach(), inputs.compressed.k.detach()
    assert faults(inputs, select(q, k, inputs.config, inputs.cu_seqlens)) == []


def test_heads_in_two_parts_under_every_option() -> None:
    """The largest element of a row, which e4m3 is scaled by, may be in either part."""
    config = replace(CONFIG, head_dim=72, **OPTIONS["all"])
    inputs = make_inputs(config, lengths=(2, 0, 40, 13), seed=5, surplus=True)
    q, k = inputs.q.detach(), inputs.compressed.k.detach()
    chosen = select(q, k, config, inputs.cu_seqlens)
    assert torch.equal(chosen, reference.select_blocks(q, k, config, inputs.cu_seqlens))


def test_tied_regions_go_to_the_lower_index() -> None:
    config = replace(CONFIG, num_initial=0, select_regions=(2, 2), compress_block=2)
    inputs = make_inputs(config, length=80)
    q, k = torch.zeros_like(inputs.q)[:, 72:], inputs.compressed.k.detach()
    chosen = select(q, k, config, q_start=72)
    assert torch.equal(
        chosen, reference.select_blocks(torch.zeros_like(inputs.q), k, config)[:, 72:]
    )
    assert chosen[0, -1, 0].tolist() == [0, 1, 2, 13]


@pytest.mark.parametrize("options", [{}, OPTIONS["mass"] | OPTIONS["regions"]], ids=str)
def test_no_compressed_block(options: dict[str, Any]) -> None:
    config = replace(CONFIG, **options)
    inputs = make_inputs(config, length=3, batch=2)
    assert inputs.compressed.k.shape[1] == 0
    chosen = select(inputs.q.detach(), inputs.compressed.k.detach(), config)
    assert chosen.unique(dim=1).tolist() == [[[[0, -1, -1, -1]] * 2]] * 2


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("scale", [1e4, 1e12, 1e25])
def test_huge_scores_give_legal_lists(scale: float) -> None:
    """lse has rounded away what tells scores apart, or is no number: lists must still be lists."""
    inputs = make_inputs(CONFIG, length=60)
    q, k = inputs.q.detach() * scale, inputs.compressed.k.detach() * scale
    chosen = select(q, k, CONFIG)
    own = (torch.arange(60) // CONFIG.select_block)[None, :, None, None]
    assert ((chosen >= 0).sum(-1, keepdim=True) == (own + 1).clamp_max(4)).all()
    assert ((chosen[..., 1:] > chosen[..., :-1]) | (chosen[..., 1:] == -1)).all()
    assert (chosen <= own).all()


def test_strides_and_batch() -> None:
    inputs = make_inputs(CONFIG, length=40, batch=2, seed=7)
    q, k = inputs.q.detach(), inputs.compressed.k.detach()
    odd_q = q.transpose(1, 2).contiguous().transpose(1, 2)
    odd_k = torch.stack([k, k + 1], -1)[..., 0]
    assert not any(x.is_contiguous() for x in (odd_q, odd_k))
    assert torch.equal(select(odd_q, odd_k, CONFIG), reference.select_blocks(q, k, CONFIG))


def test_tiles_fit_every_width() -> None:
    for selected in (1, 3, 16, 64):
        for dtype in (torch.float32, torch.bfloat16):
            for blocks in (0, 1, 20, 1000):
                assert select_tiles(dtype, 6, 128, selected, blocks).blocks >= selected


def test_a_shape_without_a_row_is_untuned() -> None:
    for row in ROWS:
        dtype = torch.float32 if row.fp32 else torch.bfloat16
        assert tile_row(dtype, row.D, row.G) is row
    found = tile_row(torch.float16, 80, 4)
    assert (found.D, found.G, found.measured) == (80, 4, UNTUNED)
