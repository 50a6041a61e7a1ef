"""The kernels under ``torch.use_deterministic_algorithms``, in Triton's interpreter.

It runs programs one after the other; here in more orders than one, as a GPU does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from triton.runtime import interpreter

from nsa import NSAConfig, nsa_attention
from nsa.backends.compiled import steps as compiled
from nsa.backends.compiled.selected import launch as selected_launch
from nsa.backends.compiled.selected import tiles as selected_tiles
from nsa.backends.compiled.selected.tiles import SelectedTiles, tiles_for
from nsa.backends.compiled.window import launch as window_launch
from nsa.backends.compiled.window import tiles as window_tiles
from nsa.testing import Inputs, attention_parity, make_inputs, random_blocks
from nsa.testing.strategies import Case, cases
from tests.support.deterministic import deterministic, results, row, row_of, unequal
from tests.triton_interpreter.test_selected import check, listed, run, tiling

CONFIG = NSAConfig(
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
    value_dim=10,
    compress_block=4,
    compress_stride=2,
    select_block=6,
    num_selected=4,
    num_local=1,
    window=7,
)
LENGTHS = (0, 2, 15, 0)
SHAPES: dict[str, dict[str, Any]] = {
    "fixed-length": {"length": 16},
    "packed": {"lengths": LENGTHS},
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From then on the last program of every launch runs first."""
    builder = interpreter.interpreter_builder

    def run_backwards() -> None:
        def set_grid_idx(x: int, y: int, z: int) -> None:
            type(builder).set_grid_idx(builder, builder.grid_dim[0] - 1 - x, y, z)

        monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)

    return run_backwards


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selected_tiles, "ORDERED_CHUNK", 4)


def problem(shape: dict[str, Any], share: int = 1, select_block: int = 6) -> Inputs:
    config = replace(CONFIG, select_share=share, num_kv_heads=2, select_block=select_block)
    return listed(make_inputs(config, **shape))


@EVERY_SHAPE
@pytest.mark.parametrize(
    ("share", "tiles", "moves"),
    [
        (1, tiling(4, chunk=4), {"dselected.k", "dselected.v"}),
        (1, tiling(4, chunk=100, with_dq=True), {"dq"}),
        (1, tiling(4, chunk=4, ordered=True), set()),
        (1, tiling(4, chunk=4, ordered=True, since=0), set()),
        (3, tiling(3, chunk=6, ordered=True), set()),
    ],
    ids=["any order", "dq in any order", "ordered", "ordered, far blocks", "ordered, shared lists"],
)
def test_the_order_of_programs(
    shape: dict[str, Any],
    share: int,
    tiles: SelectedTiles,
    moves: set[str],
    backwards: Callable[[], None],
) -> None:
    """Moves the last bits of what atomic adds sum, and of nothing else."""
    x = problem(shape, share, 6 if tiles.forward.far is None else 4)
    found = run(x, tiles, share)
    backwards()
    assert set(unequal(found, run(x, tiles, share))) == moves


@pytest.mark.parametrize(("shape", "share"), [("fixed-length", 3), ("packed", 1), ("packed", 3)])
def test_parity_of_ordered_sums(shape: str, share: int) -> None:
    tiles = tiling(3, key_tokens=2, chunk=6, ordered=True)
    check(problem(SHAPES[shape], share), tiles, share)


def test_parity_of_ordered_sums_in_parts() -> None:
    """A block of keys for several programs."""
    config = replace(CONFIG, select_block=20)
    x = listed(make_inputs(config, length=27), 2)
    check(x, tiling(16, key_tokens=8, chunk=8, ordered=True))


@given(case=cases(max_length=12))
@settings(max_examples=2)
def test_parity_of_the_mode(case: Case) -> None:
    """Of the gated sum, over drawn shapes."""
    with pytest.MonkeyPatch.context() as patch, deterministic():
        patch.setattr(selected_tiles, "ORDERED_CHUNK", 4)
        rows = attention_parity("compiled", case.inputs(torch.float32))
    assert [row for row in rows if not row.ok] == []


def test_tiles_of_the_mode() -> None:
    """No atomic adds; and the length, which a pack has of its own, decides nothing."""
    sizes: dict[str, Any] = {"width": 16, "select_block": 64, "dtype": torch.bfloat16}
    for shape in ((64, 64, 6), (128, 128, 16), (192, 128, 16), (64, 64, 1)):
        for share in (1, 16):
            usual, short, long = (
                tiles_for(*shape, **sizes, length=length, share=share, deterministic=mode)
                for length, mode in ((10**6, False), (1, True), (10**6, True))
            )
            assert (long.dkv.ordered, long.dkv.with_dq) == (True, False)
            assert short == long
            assert (usual.forward, usual.dq) == (long.forward, long.dq)
            assert (usual.forward.far is None) == (share > 1 or shape[2] > 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("step", "compiler"), [("selected", None), ("gated", None), ("gated", "aot_eager")]
)
def test_the_mode_may_change_between_calls(
    step: str, compiler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs is what is in force, as with torch's own operators; in compiled code, too."""
    found: list[bool] = []
    inverse_index = selected_launch.inverse_index

    def noted(*args: Any, ordered: bool, **options: Any) -> Any:
        found.append(ordered)
        return inverse_index(*args, ordered=ordered, **options)

    monkeypatch.setattr(selected_launch, "inverse_index", noted)
    x = make_inputs(CONFIG, length=7)
    x = replace(x, block_idx=random_blocks(x, 2))

    def attend(*leaves: Tensor) -> Tensor:
        here = x.with_leaves(leaves)
        if step == "gated":
            return here.attend(nsa_attention, backend="compiled")
        return compiled.selected_attention(*here.branch("selected"))[0]

    run = attend if compiler is None else torch.compile(attend, fullgraph=True, backend=compiler)
    for mode, warn_only in ((False, False), (True, False), (False, False), (True, True)):
        leaves = [y.detach().requires_grad_() for y in x.leaves()]
        with deterministic(mode, warn_only=warn_only):
            run(*leaves).backward(x.dout)
    assert found == [False, True, False, True]


def test_a_row_alone_and_in_a_batch(short_chunks: None) -> None:
    x = make_inputs(CONFIG, length=13, batch=2)
    with deterministic():
        assert unequal(row_of(results(x, "compiled"), 1), results(row(x, 1), "compiled")) == []


@pytest.mark.parametrize("mode", [pytest.param(False, marks=pytest.mark.slow), True])
def test_parts_of_the_compressed_branch(mode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In how many dk and dv are summed depends on the batch, but not in this mode."""
    small = window_tiles.Tiles(16, 16, num_warps=4, num_stages=1)
    monkeypatch.setattr(window_tiles, "FP32", window_tiles.WindowTiles(small, small, small, ""))
    monkeypatch.setattr(window_launch, "PROGRAMS", 2)
    monkeypatch.setattr(window_launch, "ROW_PROGRAMS", 2)
    x = make_inputs(replace(CONFIG, num_heads=16), length=35, batch=2)

    def gradients(x: Inputs) -> dict[str, Tensor]:
        leaves = [y.detach().requires_grad_() for y in (x.q, *x.compressed)]
        out, _ = compiled.compressed_attention(*leaves, x.config)
        return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, x.dout), strict=True))

    with deterministic(mode):
        found = unequal(row_of(gradients(x), 1), gradients(row(x, 1)))
    assert found == ([] if mode else ["dk", "dv"])


@pytest.mark.parametrize(("share", "since"), [(1, None), (1, 13), (3, None)])
def test_selected_attention_packed_and_alone(share: int, since: int | None) -> None:
    x = problem(SHAPES["packed"], share, 6 if since is None else 4)
    tiles = tiling(3, key_tokens=2, chunk=6, ordered=True, since=since)
    packed = run(x, tiles, share)
    for first, end in ((0, 2), (2, 17)):
        alone = tokens(x, first, end)
        here = {name: y[:, first:end] for name, y in packed.items()}
        assert unequal(here, run(alone, tiles, share)) == []


def test_a_sequence_that_begins_at_a_tile(short_chunks: None) -> None:
    """Forward, of all branches; elsewhere docs/backends.md says what may differ."""
    config = replace(CONFIG, num_heads=8)
    x = listed(make_inputs(config, lengths=(4, 13)), 3)
    with torch.no_grad():
        packed, alone = (y.attend(nsa_attention, backend="compiled") for y in (x, tokens(x, 4, 17)))
    assert unequal({"out": packed[:, 4:]}, {"out": alone}) == []


def tokens(x: Inputs, first: int, end: int) -> Inputs:
    """One sequence of a pack, alone."""
    of = x.config.num_compressed
    assert x.cu_seqlens is not None
    blocks = sum(of(n) for n in x.cu_seqlens[x.cu_seqlens <= first].diff().tolist())
    here = (slice(first, end), slice(blocks, blocks + of(end - first)))
    leaves = tuple(y[:, here[i in (1, 2)]] for i, y in enumerate(x.leaves()))
    lists = None if x.block_idx is None else x.block_idx[:, here[0]]
    alone = replace(x.with_leaves(leaves), dout=x.dout[:, here[0]], block_idx=lists)
    return replace(alone, cu_seqlens=None, max_seqlen=None)
