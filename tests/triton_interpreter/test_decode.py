"""One step of decode in Triton's interpreter: run with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from nsa import BackendUnavailable, NSAConfig, reference
from nsa.backends.compiled.decode.launch import decode_attention
from nsa.backends.compiled.decode.tiles import DecodeTiles, KeyTiles
from nsa.testing import random_blocks
from tests.support.decoding import Step, make_step, of_sequence
from tests.triton_interpreter import triton_fixes

triton_fixes.apply()

TILES = DecodeTiles(
    compressed=KeyTiles(keys=16, block_n=16),
    window=KeyTiles(keys=16, block_n=16),
    selected=KeyTiles(keys=12, block_n=16),
    select_blocks=8,
    select_programs=8,
)
"""Several parts of everything, at lengths that the interpreter can bear."""
CONFIG = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    value_dim=6,
    compress_block=4,
    compress_stride=2,
    select_block=6,
    num_selected=4,
    num_local=1,
    window=17,
    rope_theta=None,
)


DEFAULT = ((torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 1), (torch.bfloat16, 8))
"""Dtypes and queries of a step that are run by default."""


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no kernel writes is no number, no block and no counter."""
    empty = torch.empty

    def poisoned(*size: Any, **kwargs: Any) -> Tensor:
        x = empty(*size, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else -77)

    monkeypatch.setattr("nsa.backends.compiled.decode.launch.torch.empty", poisoned)
    monkeypatch.setattr("nsa.backends.compiled.decode.tiles.ENOUGH_PROGRAMS", 8)


def run(step: Step, tiles: DecodeTiles | None = TILES) -> tuple[Tensor, Tensor]:
    return decode_attention(step.inputs, step.config, tiles=tiles)


def check(step: Step) -> Tensor:
    out, lists = run(step)
    B, S = step.inputs.q.shape[:2]
    assert out.dtype == step.inputs.q.dtype
    assert lists.dtype == torch.int32
    assert tuple(lists.shape) == (B, S, step.config.num_kv_heads, step.config.num_selected)
    assert step.faults(lists) == []
    step.check(out, lists)
    return lists


@pytest.mark.parametrize(
    ("dtype", "S"),
    [
        pytest.param(dtype, S, marks=[] if (dtype, S) in DEFAULT else pytest.mark.slow)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for S in (1, 3, 8)
    ],
)
def test_equals_a_full_forward(dtype: torch.dtype, S: int) -> None:
    """Sequences of unequal length, one of them new."""
    lengths = (0, 37) if S < 8 else (37,)
    lists = check(make_step(CONFIG, lengths, S, dtype=dtype, page_blocks=4 if S == 3 else 1))
    assert (lists[-1] >= 0).all()


@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=2).map(tuple),
    S=st.sampled_from([1, 2]),
    page_blocks=st.sampled_from([1, 4]),
    surplus=st.sampled_from([0, 3]),
)
@settings(max_examples=4)
def test_lengths(lengths: tuple[int, ...], S: int, page_blocks: int, surplus: int) -> None:
    check(make_step(CONFIG, lengths, S, page_blocks=page_blocks, surplus=surplus))


def test_every_border() -> None:
    """Positions around l, l', w and a page, ends of splits, parts and chunks among them."""
    borders = {edge + step for edge in (4, 12, 17, 36) for step in (-1, 0)}
    check(make_step(CONFIG, tuple(sorted(borders)), page_blocks=2))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "D", "V"), [(1, 1, 8, 8), (3, 3, 4, 6), (16, 1, 8, 4), (20, 1, 6, 20)]
)
def test_heads(heads: int, kv_heads: int, D: int, V: int) -> None:
    config = replace(CONFIG, num_heads=heads, num_kv_heads=kv_heads, head_dim=D, value_dim=V)
    check(make_step(config, (26, 11), 2))


@pytest.mark.parametrize(
    ("geometry", "length"), [((3, 1, 4), 45), ((2, 2, 2), 35), ((6, 2, 6), 60), ((4, 2, 40), 90)]
)
def test_geometry(geometry: tuple[int, int, int], length: int) -> None:
    l, d, select_block = geometry  # noqa: E741
    config = replace(
        CONFIG, compress_block=l, compress_stride=d, select_block=select_block, num_initial=0
    )
    lists = run(make_step(config, (length,)))[1]
    assert lists.unique().numel() > 2
    check(make_step(config, (length,)))


@pytest.mark.parametrize(
    "option",
    [
        {"select_schedule": ((9, 2), (40, 3))},
        {"select_mass": 0.5, "num_selected": 10, "num_local": 2},
        {"select_mass": 0.3, "num_initial": 0, "num_local": 0},
        {"num_selected": 13, "num_initial": 2, "num_local": 3},
        {"num_selected": 1, "num_initial": 0, "num_local": 1},
        {"scale": -0.7},
        {"scale": 0.0},
    ],
    ids=str,
)
def test_options_equal_the_oracle(option: dict[str, Any]) -> None:
    config = replace(CONFIG, **option)
    step = make_step(config, (62, 5))
    lists = check(step)
    for b, x in enumerate(step.sequences):
        want = reference.select_blocks(x.q.detach(), x.compressed.k.detach(), config)
        assert torch.equal(lists[b], want[0, -1:]), b


@pytest.mark.parametrize("initial", [0, 1])
def test_ties_go_to_the_lower_index(initial: int) -> None:
    """With q = 0 all blocks score the same, over chunks of blocks and splits of keys."""
    config = replace(CONFIG, num_initial=initial)
    step = make_step(config, (130,))
    step.inputs = step.inputs._replace(q=torch.zeros_like(step.inputs.q))
    assert run(step)[1][0, 0, 0].tolist() == ([0, 1, 2, 21] if initial else [1, 2, 3, 21])


def test_lists_given() -> None:
    """Any legal lists, of another width, rows that see nothing and blocks to come among them."""
    step = make_step(CONFIG, (40, 3), 3, page_blocks=2)
    lists = [random_blocks(x, 5, seed=b)[:, -3:] for b, x in enumerate(step.sequences)]
    given_lists = torch.cat(lists)
    given_lists[0, 0, 0] = torch.tensor([1, 2, 6, 7, 8])  # 7 and 8 are to come
    given_lists[0, 1, 0] = -1
    step.inputs = step.inputs._replace(block_idx=given_lists)
    out, read = run(step)
    assert torch.equal(read, given_lists)
    step.check(out, read)


@pytest.mark.parametrize("tiles", [TILES, None], ids=["small", "default"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_do_not_depend_on_the_batch(
    tiles: DecodeTiles | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, with a program for every unit and few blocks in one; in a batch, with neither."""
    step = make_step(CONFIG, (80, 9) if tiles else (40, 9), 1, dtype=dtype)
    monkeypatch.setattr("nsa.backends.compiled.decode.tiles.ENOUGH_PROGRAMS", 0)
    out, lists = run(step, tiles)
    monkeypatch.setattr("nsa.backends.compiled.decode.tiles.ENOUGH_PROGRAMS", 1000)
    for b in range(2):
        found = decode_attention(of_sequence(step.inputs, b), CONFIG, tiles=tiles)
        assert torch.equal(found[0][0], out[b])
        assert torch.equal(found[1][0], lists[b])


def test_room_for_no_compressed_block() -> None:
    check(make_step(CONFIG, (1, 0), surplus=0))


def test_nothing_to_do() -> None:
    empty = of_sequence(make_step(CONFIG, (9,)).inputs, 1)
    out, lists = decode_attention(empty, CONFIG)
    assert tuple(out.shape) == (0, 1, 4, 6)
    assert tuple(lists.shape) == (0, 1, 2, 4)


@pytest.mark.parametrize(
    "option", [{"select_regions": (2, 1)}, {"score_dtype": "fp8"}, {"select_block": 130}]
)
def test_refuses_what_it_has_no_kernel_for(option: dict[str, Any]) -> None:
    step = make_step(replace(CONFIG, **option), (9,))
    with pytest.raises(BackendUnavailable, match=f"{next(iter(option))}.*use backend='sdpa'"):
        run(step)
