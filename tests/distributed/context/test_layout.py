"""Layouts, and what each rank of one computes and needs, against the definition."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa import NSAConfig, ShapeError
from nsa.distributed import Layout
from nsa.distributed.context.layout import even_segments
from nsa.distributed.context.plan import TOKENS, WINDOW, Plan, plan_of
from tests.support.layers import CONFIG

SEGMENTS = "segments: expected a list for each rank, of its segments (start, stop), got "


def test_segments_of_the_constructors() -> None:
    assert Layout.contiguous(10, size=3).segments == (((0, 3),), ((3, 6),), ((6, 10),))
    assert Layout.head_tail(10, size=2).segments == (((0, 2), (7, 10)), ((2, 5), (5, 7)))
    assert even_segments(30, 4, multiple=4) == [(0, 4), (4, 12), (12, 20), (20, 30)]
    # multiples count from the start of a sequence: 5 + 4 and 16 + 4
    assert even_segments([5, 0, 11, 14], 3, multiple=4) == [(0, 9), (9, 20), (20, 30)]


def test_rows_and_positions() -> None:
    layout = Layout([[(4, 7), (0, 2)], [(2, 4), (7, 9)]], [5, 0, 4], rank=0)
    assert (layout.total, layout.rows, layout.longest) == (9, 5, 5)
    assert layout.positions(torch.device("cpu")).tolist() == [4, 0, 1, 0, 1]
    x = torch.arange(9)[None]
    assert layout.shard(x).tolist() == [[4, 5, 6, 0, 1]]
    assert repr(layout) == (
        "Layout(9 rows of 3 packed sequences, 2 ranks: (((4, 7), (0, 2)), ((2, 4), (7, 9))))"
    )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Layout([[(0, 4)], [(5, 9)]], 9, rank=0), "expected each of the rows 0 … 8 once"),
        (lambda: Layout([[(0, 5)], [(4, 9)]], 9, rank=0), "expected each of the rows 0 … 8 once"),
        (lambda: Layout([[(0, 5)], [(5, 8)]], 9, rank=0), "expected each of the rows 0 … 8 once"),
        (lambda: Layout([[(0, 9), (9, 9)]], 9, rank=0), "expected each of the rows 0 … 8 once"),
        (lambda: Layout([[(0, 9)], []], 9, rank=0), "expected rows for every rank, got none for"),
        (lambda: Layout([[(0, 9)]], 9, rank=1), "rank: expected 0 … 0, got 1"),
        (lambda: Layout([[(0, 9)]], 9, rank="0"), "rank: expected 0 … 0, got '0'"),
        (lambda: Layout([(0, 4), (4, 9)], 9, rank=0), f"{SEGMENTS}[(0, 4), (4, 9)]"),
        (lambda: Layout([[(0, 4.0)], [(4.0, 9)]], 9, rank=0), f"{SEGMENTS}[[(0, 4.0)], [(4.0, 9"),
        (lambda: Layout([[0, 4], [4, 9]], 9, rank=0), f"{SEGMENTS}[[0, 4], [4, 9]]"),
        (lambda: Layout([[(0, 4, 9)]], 9, rank=0), f"{SEGMENTS}[[(0, 4, 9)]]"),
        (lambda: Layout([None, [(4, 9)]], 9, rank=0), f"{SEGMENTS}[None, [(4, 9)]]"),
        (lambda: Layout(None, 9, rank=0), f"{SEGMENTS}None"),
        (lambda: Layout([], 9, rank=0), f"{SEGMENTS}[]"),
        (lambda: Layout.contiguous(0, size=1), "tokens: expected T >= 1 of a regular batch or the"),
        (lambda: Layout.contiguous([3, -1], size=1), "tokens: expected T >= 1 of a regular batch"),
        (lambda: Layout.contiguous("9", size=1), "tokens: expected T >= 1 of a regular batch"),
        (lambda: Layout.head_tail(7, size=4), "expected enough for 8 segments cut at multiples"),
        (lambda: Layout.head_tail(9, size=2, multiple=4), "expected enough for 4 segments cut at"),
        (lambda: Layout.head_tail(9, size=2, multiple=0), "multiple: expected an int >= 1, got 0"),
        (lambda: Layout.contiguous(9, size=0), "size: expected an int >= 1, got 0"),
        (lambda: Layout.head_tail(9, size=0), "size: expected an int >= 1, got 0"),
        (lambda: Layout.head_tail(9, size="2"), "size: expected an int >= 1, got '2'"),
        (lambda: Layout.head_tail(9, size=1.5), "size: expected an int >= 1, got 1.5"),
    ],
)
def test_a_bad_layout_is_refused(make: Any, text: str) -> None:
    with pytest.raises(ShapeError, match=re.escape(text)):
        make()


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.zeros(2, 8), "x: expected [B, 9, …] of this layout, got [2, 8]"),
        (torch.zeros(9), "x: expected [B, 9, …] of this layout, got [9]"),
        ([1, 2, 3], "x: expected a tensor, got list"),
        (torch.zeros(2, 9).to_sparse(), "x: expected a dense tensor, got a sparse_coo one"),
    ],
)
def test_another_batch_is_refused(x: torch.Tensor, text: str) -> None:
    with pytest.raises(ShapeError, match=re.escape(text)):
        Layout.contiguous(9, size=2).shard(x)
    with pytest.raises(ShapeError, match=re.escape("x: expected [1, 9, …] of this layout")):
        Layout.contiguous([4, 5], size=2).shard(torch.zeros(2, 9))


def test_queries_that_share_a_list_are_not_cut_apart() -> None:
    config = NSAConfig.preset("tiny", select_share=4)
    plan_of(Layout.head_tail(100, size=2, multiple=4), config)
    with pytest.raises(ShapeError, match=r"multiples of select_share=4, got a cut at position 75;"):
        plan_of(Layout.head_tail(100, size=2), config)


# Against the definition, for all ranks at once


@st.composite
def layouts(draw: st.DrawFn) -> list[Layout]:
    """One layout, as each of its ranks has it."""
    lengths = draw(st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any))
    total, size = sum(lengths), draw(st.integers(1, 4))
    size = min(size, total)
    cuts = draw(st.sets(st.integers(1, total), max_size=10)) | {total}
    while len(cuts) < size:
        cuts.add(min(set(range(1, total + 1)) - cuts))
    edges = [0, *sorted(cuts)]
    segments = draw(st.permutations([*pairwise(edges)]))
    ranks: list[list[tuple[int, int]]] = [[segment] for segment in segments[:size]]
    for segment in segments[size:]:
        ranks[draw(st.integers(0, size - 1))].append(segment)
    return [Layout(ranks, lengths, rank=rank) for rank in range(size)]


def block_starts(layout: Layout, config: NSAConfig) -> list[int]:
    """The first row of every compressed block of the whole batch."""
    return [
        first + i * config.compress_stride
        for first, end in zip(layout.offsets, layout.offsets[1:], strict=False)
        for i in range(config.num_compressed(end - first))
    ]


def rows_of(layout: Layout, rank: int) -> list[int]:
    return [row for a, b in layout.segments[rank] for row in range(a, b)]


@given(ranks=layouts())
@settings(max_examples=60)
def test_every_rank_gets_the_rows_that_it_needs(ranks: list[Layout]) -> None:
    """An all-to-all by hand: halos made of it are the rows after and before each segment."""
    plans = [plan_of(layout, CONFIG) for layout in ranks]
    exchanges = [plan.exchange for plan in plans]
    if any(exchange is None for exchange in exchanges):
        assert not any(exchanges)
        return
    sent: list[list[list[tuple[int, int]]]] = []
    for layout, exchange in zip(ranks, exchanges, strict=True):
        assert exchange is not None
        entries, own = iter(exchange.sent), rows_of(layout, layout.rank)
        to: list[list[tuple[int, int]]] = []
        for count in exchange.sent_rows:
            rows: list[tuple[int, int]] = []
            while len(rows) < count:
                pair, part = next(entries)
                rows += [(pair, row) for row in own[part]]
            to.append(rows)
        assert next(entries, None) is None
        sent.append(to)
    for layout, exchange in zip(ranks, exchanges, strict=True):
        assert exchange is not None
        came = [sent[rank][layout.rank] for rank in range(layout.size)]
        assert [len(rows) for rows in came] == list(exchange.received_rows)
        flat = [row for rows in came for row in rows]
        halos = [[row for part in parts for row in flat[part]] for _, parts in exchange.halos]
        pairs = [pair for pair, _ in exchange.halos]
        starts = block_starts(layout, CONFIG)
        wanted = []
        for a, b in layout.segments[layout.rank]:
            end = max([b, *(s + CONFIG.compress_block for s in starts if a <= s < b)])
            wanted.append([(TOKENS, row) for row in range(b, end)])
        for a, _ in layout.segments[layout.rank]:
            first = max(layout.offsets[layout.sequence(a)], a - CONFIG.window + 1)
            wanted.append([(WINDOW, row) for row in range(first, a)])
        assert halos == wanted
        assert pairs == [TOKENS] * (len(pairs) // 2) + [WINDOW] * (len(pairs) // 2)


@given(ranks=layouts())
@settings(max_examples=60)
def test_every_block_is_compressed_once(ranks: list[Layout]) -> None:
    config, starts = CONFIG, block_starts(ranks[0], CONFIG)
    order = plan_of(ranks[0], config).blocks.order
    made: list[list[int]] = []
    for layout in ranks:
        plan, own = plan_of(layout, config), rows_of(layout, layout.rank)
        assert plan.blocks.order == order
        found = []
        for (a, b), phi_input in zip(layout.segments[layout.rank], plan.phi_inputs, strict=True):
            row = own[phi_input.rows][0] if own[phi_input.rows] else b
            assert a <= row
            for length in phi_input.lengths:
                count = config.num_compressed(length)
                found += [row + i * config.compress_stride for i in range(count)]
                row += length
        assert len(found) == sum(phi_input.blocks for phi_input in plan.phi_inputs)
        made.append(found)
    assert [made[part.rank][i] for part in order for i in range(*part.rows.indices(999))] == starts


@given(ranks=layouts())
@settings(max_examples=60)
def test_calls_cover_every_row_with_the_keys_it_sees(ranks: list[Layout]) -> None:
    for layout in ranks:
        plan: Plan = plan_of(layout, CONFIG)
        own, row = rows_of(layout, layout.rank), 0
        assert len(plan.calls) <= 2 * len(layout.segments[layout.rank])
        for call in plan.calls:
            assert call.rows.start == row
            row = call.rows.stop
            lengths = call.lengths or (call.q_start + row - call.rows.start,)
            position = [p for n in lengths for p in range(n)][call.q_start :]
            rows = own[call.rows]
            first = [layout.offsets[layout.sequence(r)] for r in rows]
            assert position == [r - f for r, f in zip(rows, first, strict=True)]
            assert (call.keys.start, call.keys.stop) == (first[0], rows[-1] + 1)
            starts = block_starts(layout, CONFIG)
            seen = [i for i, s in enumerate(starts) if s >= first[0]]
            ended = [i for i in seen if starts[i] + CONFIG.compress_block <= rows[-1] + 1]
            whole = range(call.blocks.start, call.blocks.stop)
            assert list(whole) == ended
            assert call.window_start == min(call.q_start, CONFIG.window - 1)
        assert row == layout.rows
