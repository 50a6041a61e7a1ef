"""One step of decode in Triton's interpreter: run with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
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
from nsa.config import KV
from nsa.core.inputs import DecodeInputs
from nsa.testing import Inputs, expected, make_inputs, random_blocks
from nsa.testing.selection import _sequence_faults
from tests.triton_interpreter import triton_fixes

triton_fixes.apply()

TILES = DecodeTiles(
    compressed=KeyTiles(keys=16, block_n=16),
    window=KeyTiles(keys=16, block_n=16),
    selected=KeyTiles(keys=12, block_n=16),
    select_blocks=8,
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


@dataclass
class Step:
    """A step of sequences that are known in full, and the cache as it is then."""

    sequences: list[Inputs]
    """Each to the end of the step."""
    inputs: DecodeInputs
    config: NSAConfig

    def run(self, tiles: DecodeTiles | None = TILES) -> tuple[Tensor, Tensor]:
        return decode_attention(self.inputs, self.config, tiles=tiles)

    def faults(self, lists: Tensor) -> list[str]:
        """The acceptance rule of :func:`nsa.testing.selection_faults`."""
        found = []
        S = lists.shape[1]
        for b, x in enumerate(self.sequences):
            q, k = x.q.detach(), x.compressed.k.detach()
            chosen = reference.select_blocks(q, k, self.config)
            chosen[:, -S:] = lists[b]
            found += _sequence_faults(q, k, chosen, self.config)
        return found

    def check(self, out: Tensor, lists: Tensor) -> None:
        """Holds the output, with the lists that were read, to the accuracy rule."""
        S = lists.shape[1]
        for b, x in enumerate(self.sequences):
            T = x.q.shape[1]
            blocks = lists.new_full((1, T, *lists.shape[2:]), -1)
            blocks[:, -S:] = lists[b]
            gates = x.gates.detach().clone()
            gates[:, :-S] = 0.0  # nothing but the step's rows counts
            want = expected(replace(x, gates=gates.requires_grad_(), block_idx=blocks))["out"]
            found = torch.zeros_like(want.truth)
            found[:, -S:] = out[b]
            assert want.error(found) <= want.bound, f"{b}: {want.error(found)} > {want.bound}"


def make_step(
    config: NSAConfig,
    lengths: tuple[int, ...],
    S: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    page_blocks: int = 1,
    surplus: int = 3,
) -> Step:
    """Sequences of ``lengths`` tokens before the step; all that means nothing is no number.

    Pages are in no order, and there is room for ``surplus`` more blocks, pages and ring rows.
    """
    generator = torch.Generator().manual_seed(sum(lengths))
    sequences = [
        make_inputs(config, length=length + S, dtype=dtype, seed=7 * b + length)
        for b, length in enumerate(lengths)
    ]
    L, K, B = page_blocks * config.select_block, config.num_kv_heads, len(lengths)
    pages = -(-max(x.q.shape[1] for x in sequences) // L) + surplus
    N = max(x.compressed.k.shape[1] for x in sequences) + surplus
    R = config.window + S - 1 + surplus

    def nowhere(*size: int) -> KV:
        k = torch.full((*size, K, config.head_dim), float("nan"), dtype=dtype)
        return KV(k, torch.full((*size, K, config.dv), float("nan"), dtype=dtype))

    compressed, pool, ring = nowhere(B, N), nowhere(B * pages + 1, L), nowhere(B, R)
    free = torch.randperm(B * pages + 1, generator=generator, dtype=torch.int32)
    table = torch.full((B, pages), 2**30, dtype=torch.int32)
    for b, x in enumerate(sequences):
        T = x.q.shape[1]
        table[b, : -(-T // L)] = free[b * pages :][: -(-T // L)]
        token = torch.arange(T)
        for part in range(2):
            compressed[part][b, : x.compressed[part].shape[1]] = x.compressed[part][0].detach()
            pool[part][table[b, token // L].long(), token % L] = x.selected[part][0].detach()
            late = token[-R:]
            ring[part][b, late % R] = x.window[part][0, late].detach()
    q = torch.cat([x.q.detach()[:, -S:] for x in sequences])
    gates = torch.cat([x.gates.detach()[:, -S:] for x in sequences])
    position = torch.tensor(lengths, dtype=torch.int32)
    return Step(sequences, DecodeInputs(q, position, gates, compressed, pool, table, ring), config)


def check(step: Step, tiles: DecodeTiles | None = TILES) -> Tensor:
    out, lists = step.run(tiles)
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
    lists = check(make_step(CONFIG, (0, 37), S, dtype=dtype, page_blocks=4 if S == 3 else 1))
    assert (lists[1] >= 0).all()


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
    lists = make_step(config, (length,)).run()[1]
    assert lists.unique().numel() > 2
    check(make_step(config, (length,)))


@pytest.mark.parametrize(
    "option",
    [
        {"select_schedule": ((9, 2), (40, 3))},
        {"select_mass": 0.6},
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
    assert step.run()[1][0, 0, 0].tolist() == ([0, 1, 2, 21] if initial else [1, 2, 3, 21])


def test_lists_given() -> None:
    """Any legal lists, of another width, rows that see nothing and blocks to come among them."""
    step = make_step(CONFIG, (40, 3), 3, page_blocks=2)
    lists = [random_blocks(x, 5, seed=b)[:, -3:] for b, x in enumerate(step.sequences)]
    given_lists = torch.cat(lists)
    given_lists[0, 0, 0] = torch.tensor([1, 2, 6, 7, 8])  # 7 and 8 are to come
    given_lists[0, 1, 0] = -1
    step.inputs = step.inputs._replace(block_idx=given_lists)
    out, read = step.run()
    assert torch.equal(read, given_lists)
    step.check(out, read)


@pytest.mark.parametrize("tiles", [TILES, None], ids=["small", "default"])
def test_rows_do_not_depend_on_the_batch(tiles: DecodeTiles | None) -> None:
    step = make_step(CONFIG, (40, 9), 2, dtype=torch.bfloat16)
    out, lists = step.run(tiles)
    x = step.inputs
    for b in range(2):
        part = slice(b, b + 1)
        alone = x._replace(
            q=x.q[part],
            position=x.position[part],
            gates=x.gates[part],
            compressed=KV(*(y[part] for y in x.compressed)),
            page_table=x.page_table[part],
            window=KV(*(y[part] for y in x.window)),
        )
        found = decode_attention(alone, CONFIG, tiles=tiles)
        assert torch.equal(found[0], out[part])
        assert torch.equal(found[1], lists[part])


def test_room_for_no_compressed_block() -> None:
    check(make_step(CONFIG, (1, 0), surplus=0))


def test_nothing_to_do() -> None:
    step = make_step(CONFIG, (9,))
    x = step.inputs
    empty = x._replace(
        q=x.q[:0],
        position=x.position[:0],
        gates=x.gates[:0],
        compressed=KV(*(y[:0] for y in x.compressed)),
        page_table=x.page_table[:0],
        window=KV(*(y[:0] for y in x.window)),
    )
    out, lists = decode_attention(empty, CONFIG)
    assert tuple(out.shape) == (0, 1, 4, 6)
    assert tuple(lists.shape) == (0, 1, 2, 4)


@pytest.mark.parametrize("option", [{"select_regions": (2, 1)}, {"score_dtype": "fp8"}])
def test_refuses_what_it_has_no_kernel_for(option: dict[str, Any]) -> None:
    step = make_step(replace(CONFIG, **option), (9,))
    with pytest.raises(BackendUnavailable, match=f"{next(iter(option))}.*use backend='sdpa'"):
        step.run()
