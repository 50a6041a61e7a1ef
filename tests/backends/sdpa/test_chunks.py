"""The sdpa backend works in chunks and tiles: any cut gives the same, in linear memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import nsa.backends
from nsa import NSAConfig, nsa_attention, reference, select_blocks
from nsa.backends.sdpa.selected import _even as widened
from nsa.backends.sdpa.selected import chunk_plan
from nsa.backends.sdpa.window import SlidingWindow, chunks
from nsa.backends.shared.block_tiles import Tiles, make_tiles, number_blocks
from nsa.testing import Inputs, attention_parity, make_inputs, random_blocks, selection_faults

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted(Path(nsa.backends.__file__).parent.glob("sdpa/*.py"))
ELEMENTS = "nsa.backends.sdpa.numerics.CPU_CHUNK_ELEMENTS"
ROWS = "nsa.backends.sdpa.selected.TILE_ROWS"  # imported there by name

CONFIG = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    value_dim=6,
    compress_block=4,
    compress_stride=2,
    select_block=6,
    num_selected=3,
    num_local=1,
    window=7,
)
WIDE = replace(CONFIG, num_heads=8, num_kv_heads=1, compress_block=6, window=50, scale=0.7)
SINGLE = replace(CONFIG, num_heads=2, compress_block=2, num_selected=1, num_initial=0)

PROBLEMS = {
    "regular": (CONFIG, {"length": 41, "batch": 2}),
    "wide group": (WIDE, {"length": 37}),
    "group of one": (SINGLE, {"length": 30, "batch": 2}),
    "packed": (CONFIG, {"lengths": (13, 0, 3, 41, 0)}),
    "packed wide": (WIDE, {"lengths": (0, 29, 1)}),
    "long blocks": (replace(CONFIG, select_block=20), {"length": 45}),
}
every_problem = pytest.mark.parametrize("name", PROBLEMS)


def problem(name: str, dtype: torch.dtype = torch.float64, width: int | None = None) -> Inputs:
    """One of PROBLEMS, with random block lists of ``width`` or those that the oracle selects."""
    config, shape = PROBLEMS[name]
    inputs = make_inputs(config, **shape, dtype=dtype, surplus="lengths" in shape)  # type: ignore[arg-type]
    if width is not None:
        return replace(inputs, block_idx=random_blocks(inputs, width))
    q, k = inputs.q.detach(), inputs.compressed.k.detach()
    return replace(inputs, block_idx=reference.select_blocks(q, k, config, inputs.cu_seqlens))


def results(inputs: Inputs) -> dict[str, Tensor]:
    """Output, gradients and selected blocks of the backend."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs.leaves())
    mine = inputs.with_leaves(leaves)
    packing = {"cu_seqlens": mine.cu_seqlens, "max_seqlen": mine.max_seqlen}
    args = (mine.q, mine.compressed, mine.selected, mine.window, mine.gates, mine.config)
    out = nsa_attention(*args, block_idx=mine.block_idx, backend="sdpa", **packing)  # type: ignore[arg-type]
    grads = torch.autograd.grad(out, leaves, mine.dout)
    blocks = select_blocks(mine.q, mine.compressed.k, mine.config, backend="sdpa", **packing)  # type: ignore[arg-type]
    return {"out": out, "blocks": blocks, **dict(zip(Inputs.NAMES, grads, strict=True))}


def agree(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert torch.equal(got.pop("blocks"), want.pop("blocks"))
    for name, x in want.items():
        torch.testing.assert_close(
            got[name], x, rtol=1e-11, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
        )


# Any cut gives the same


@every_problem
@pytest.mark.parametrize("elements", [1, 7, 64, 1000])
def test_any_chunk_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, name: str, elements: int
) -> None:
    inputs = problem(name)
    want = results(inputs)
    monkeypatch.setattr(ELEMENTS, elements)
    agree(results(inputs), want)


@every_problem
@pytest.mark.parametrize("rows", [1, 3, 8, 10_000])
def test_any_tile_gives_the_same(monkeypatch: pytest.MonkeyPatch, name: str, rows: int) -> None:
    inputs = problem(name, width=5)
    want = results(inputs)
    monkeypatch.setattr(ROWS, rows)
    agree(results(inputs), want)


@every_problem
def test_the_band_and_the_fused_kernel_agree(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    inputs = problem(name)
    want = results(inputs)
    monkeypatch.setattr("nsa.backends.sdpa.steps.has_kernel", lambda q, scale: False)
    for elements in (2**19, 50):
        monkeypatch.setattr(ELEMENTS, elements)
        agree(results(inputs), dict(want))


@every_problem
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("elements", "rows"), [(1, 1), (7, 64), (300, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parity_holds_at_any_cut(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    elements: int,
    rows: int,
    fused: bool,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(ELEMENTS, elements)
    monkeypatch.setattr(ROWS, rows)
    if not fused:
        monkeypatch.setattr("nsa.backends.sdpa.steps.has_kernel", lambda q, scale: False)
    inputs = problem(name, dtype, width=3)
    faults = [
        f"{row.name}: error {row.error:.3e} > bound {row.bound:.3e}"
        for row in attention_parity("sdpa", inputs)
        if not row.ok
    ]
    faults += selection_faults("sdpa", inputs)
    assert not faults, "\n".join(faults)


# The cuts themselves


@given(
    rows=st.integers(0, 40) | st.integers(100, 200),
    first_row=st.integers(0, 10),
    width=st.integers(1, 50) | st.integers(130, 200),
    per_row=st.integers(0, 5),
    elements=st.integers(1, 500) | st.just(2**17),
    stretch=st.integers(1, 3),
    lengths=st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=5),
)
def test_chunks_cover_the_band_and_nothing_else(
    rows: int,
    first_row: int,
    width: int,
    per_row: int,
    elements: int,
    stretch: int,
    lengths: list[int] | None,
) -> None:
    """Nor is any smaller than the scores that it may hold would let it be."""
    row_seq = None
    if lengths is not None:
        rows, first_row = sum(lengths), 0
        row_seq = torch.repeat_interleave(torch.tensor(lengths))
    band, keys = SlidingWindow(width, first_row, row_seq), first_row + rows
    r = torch.arange(first_row, first_row + rows)[:, None]
    s = torch.arange(keys)
    visible = (r - width < s) & (s <= r)
    if row_seq is not None:
        visible &= row_seq[:, None] == row_seq
    seen, after = torch.zeros_like(visible), 0
    budget = stretch * elements // max(1, per_row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ELEMENTS, elements)
        for chunk in chunks(rows, band, per_row, torch.device("cpu"), stretch):
            assert chunk.row == after
            after = chunk.row_end
            size, reach = after - chunk.row, min(width, first_row + chunk.row + 1)
            assert size == 1 or size * (size + reach) <= budget
            whole = after == rows or size == max(64, width // 2)
            assert whole or (size + 1) * (size + 1 + reach) > budget
            assert chunk.key == max(0, first_row + chunk.row - width + 1)
            seen[chunk.row : chunk.row_end, chunk.key : chunk.key_end] = ~chunk.hidden[:, 0]
    assert after == rows
    assert torch.equal(seen, visible)


@every_problem
@pytest.mark.parametrize("m", [1, 2, 5, 100])
def test_tiles_hold_every_listed_pair_once(name: str, m: int) -> None:
    inputs = problem(name, width=4)
    config, lists = inputs.config, inputs.block_idx
    assert lists is not None
    lists = lists.flatten(0, 1)
    blocks = number_blocks(inputs.q, inputs.selected.k, config, inputs.cu_seqlens, 0)
    tiles = make_tiles(lists, blocks, 0, m, 1)
    position, base = blocks.position.tolist(), blocks.base.tolist()
    want = {}
    for (token, head, slot), block in zip(
        torch.cartesian_prod(*map(torch.arange, lists.shape)).tolist(),
        lists.flatten().tolist(),
        strict=True,
    ):
        keys = position[token] - block * config.select_block + 1
        if block >= 0 and keys > 0:
            row = head * blocks.total + base[token] + block
            want[token * lists.shape[1] + head, slot] = (row, min(keys, config.select_block))
    got = {}
    visible = tiles.visible.flatten()
    for query, slot in tiles.listed.nonzero().tolist():
        place = int(tiles.slot[query, slot])
        assert int(tiles.rows[place]) == query
        got[query, slot] = (int(tiles.block[place // m]), int(visible[place]))
    assert got == want
    assert int((visible > 0).sum()) == len(want)
    assert tiles.total <= len(want)


@pytest.mark.parametrize(
    ("device", "elements", "stretch"), [("cpu", 2**18, 16), ("meta", 2**26, 2)]
)
@pytest.mark.parametrize("group", [1, 3, 16, 100])
@pytest.mark.parametrize("widest", [1, 48, 2**21])
def test_selected_chunks_fill_the_device(
    device: str, elements: int, stretch: int, group: int, widest: int
) -> None:
    """Partial results of the tokens, and scores of the tiles, as many as there is room for."""
    config = replace(CONFIG, num_heads=2 * group)
    q, k = (torch.empty(1, 9, heads, 8) for heads in (2 * group, 2))
    plan = chunk_plan(
        torch.empty(9, 2, 3, dtype=torch.int32, device=device),
        number_blocks(q, k, config, None, 0),
        group,
        widest,
    )
    assert plan.tile == max(1, 64 // group)
    assert plan.tokens == max(1, stretch * elements // (2 * 3 * group * widest))
    assert plan.tiles == max(1, elements // (plan.tile * group * config.select_block))


@pytest.mark.parametrize("size", [1, 16, 17, 32])
def test_blocks_are_widened_to_a_cache_line(size: int) -> None:
    blocks = torch.ones(2, size, 16)
    wide = widened(blocks)
    assert wide.shape == (2, -(-size // 16) * 16, 16)
    assert torch.equal(wide[:, :size], blocks)


@pytest.mark.parametrize(("elements", "chunks"), [(2**18, 1), (48, 28)])
def test_every_query_is_worked_on_once(
    monkeypatch: pytest.MonkeyPatch, elements: int, chunks: int
) -> None:
    inputs, made = problem("regular", width=4), []

    def counted(block_idx: Tensor, *args: Any) -> Tiles:
        made.append(len(block_idx))
        return make_tiles(block_idx, *args)

    monkeypatch.setattr("nsa.backends.sdpa.selected.make_tiles", counted)
    monkeypatch.setattr(ELEMENTS, elements)
    results(inputs)
    assert sum(made) == 2 * 82  # forward and backward
    assert len(made) == 2 * chunks


def test_tiny_sizes_do_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would prove nothing if the names they patch were not read."""
    inputs = problem("regular")
    assert inputs.block_idx is not None
    lists = inputs.block_idx.flatten(0, 1)
    blocks = number_blocks(inputs.q, inputs.selected.k, CONFIG, None, 0)
    whole = chunk_plan(lists, blocks, CONFIG.group, 8)
    assert whole.tokens >= lists.shape[0]
    assert len(list(chunks(41, SlidingWindow(7), 8, lists.device))) == 1
    monkeypatch.setattr(ELEMENTS, 1)
    monkeypatch.setattr(ROWS, 1)
    assert tuple(chunk_plan(lists, blocks, CONFIG.group, 8)) == (1, 1, 1)
    assert len(list(chunks(41, SlidingWindow(7), 8, lists.device))) == 41


# Memory


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_keys_are_never_repeated_for_the_group(path: Path) -> None:
    assert "repeat_interleave" not in path.read_text(encoding="utf-8")


def test_the_sources_are_found() -> None:
    assert {"steps.py", "window.py", "selected.py"} <= {path.name for path in SOURCES}


# VmHWM, not ru_maxrss: the latter starts at the size of the process that started this one.
GROWTH = """
import sys, torch
from nsa import NSAConfig, nsa_attention
from nsa.testing import make_inputs
torch.set_num_threads(1)

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

def step(length):
    x = make_inputs(NSAConfig(num_heads=4, num_kv_heads=2, head_dim=32), length=length)
    args = x.q, x.compressed, x.selected, x.window, x.gates, x.config
    nsa_attention(*args, backend="sdpa").backward(x.dout)

step(64)  # loads what is loaded on first use
before = peak()
step(int(sys.argv[1]))
print(peak() - before)
"""


def growth(length: int) -> int:
    """Bytes that inputs, forward and backward add to the peak of a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(length)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_is_linear_in_the_number_of_tokens() -> None:
    """Quadratic memory would grow 16-fold from 2,048 to 8,192 tokens."""
    small, middle, large = (growth(length) for length in (2048, 4096, 8192))
    dense_scores = 4 * 4096**2 * 4  # of one branch alone
    assert middle < dense_scores
    assert large < 6 * small
