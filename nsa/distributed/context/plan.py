"""What each rank of a layout computes and needs, in numbers of rows: no tensors.

Rows count from the start of the whole batch, positions from that of a sequence.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

from nsa.config import NSAConfig
from nsa.distributed.context.layout import Layout, Segment
from nsa.distributed.context.transfers import Exchange, Parts
from nsa.errors import ShapeError

TOKENS, WINDOW = 0, 1
"""The pairs of keys and values whose rows are exchanged: what φ compresses, and the window's."""


class Call(NamedTuple):
    """One call of a backend's steps for some of this rank's rows: a part of one sequence, or whole
    sequences, the last of which may end early."""

    rows: slice
    """Of this rank's own."""
    keys: slice
    """Rows of the whole batch that the selected branch may read."""
    blocks: slice
    """Compressed blocks of the whole batch that the rows may see."""
    q_start: int
    """The position of the first row; 0 with whole sequences."""
    window_start: int
    """How many rows before the first the window reads."""
    halo: int
    """The number of the halo that holds them."""
    lengths: tuple[int, ...] | None
    """Of whole sequences, more than one."""


class PhiInput(NamedTuple):
    """The tokens of the compressed blocks that begin in one segment."""

    rows: slice
    """Of this rank's own; the halo after the segment follows."""
    lengths: tuple[int, ...]
    """Tokens of each sequence, those of the halo included."""
    blocks: int


class Plan(NamedTuple):
    """The share of one rank, which has s segments."""

    calls: tuple[Call, ...]
    phi_inputs: tuple[PhiInput, ...]
    """One for each segment."""
    exchange: Exchange | None
    """Halos 0 … s - 1 follow the segments, s … 2s - 1 precede them; None where no rank has any."""
    blocks: Parts
    """Where each rank's compressed blocks stand in the whole batch."""


def plan_of(layout: Layout, config: NSAConfig) -> Plan:
    """What this process computes and needs; the layout keeps it.

    Raises:
        ShapeError: queries that share a list are cut apart.
    """
    if config not in layout.plans:
        layout.plans[config] = _make_plan(layout, config)
    return layout.plans[config]


def _make_plan(layout: Layout, config: NSAConfig) -> Plan:
    _check_share(layout, config)
    geometry = _Geometry(layout, config)
    own = layout.segments[layout.rank]
    blocks = [[geometry.blocks_in(segment) for segment in rank] for rank in layout.segments]
    return Plan(
        tuple(geometry.calls(own)),
        tuple(geometry.phi_inputs(own)),
        _exchange(geometry),
        Parts.of(layout.segments, blocks),
    )


class _Geometry:
    """Sequences, compressed blocks and windows of a layout."""

    def __init__(self, layout: Layout, config: NSAConfig) -> None:
        self.layout, self.config = layout, config
        lengths = (end - start for start, end in pairwise(layout.offsets))
        self.block_offsets = (0, *accumulate(map(config.num_compressed, lengths)))
        """The first compressed block of each sequence, then their number."""

    def blocks_before(self, row: int) -> int:
        """How many compressed blocks begin before a row."""
        if row == self.layout.total:
            return self.block_offsets[-1]
        s = self.layout.sequence(row)
        begun = -(-(row - self.layout.offsets[s]) // self.config.compress_stride)
        return min(self.block_offsets[s] + begun, self.block_offsets[s + 1])

    def blocks_in(self, segment: Segment) -> int:
        """How many compressed blocks begin in a segment."""
        return self.blocks_before(segment[1]) - self.blocks_before(segment[0])

    def rows_after(self, segment: Segment) -> Segment:
        """The rows past a segment that its last compressed block reads."""
        start, stop = segment
        s = self.layout.sequence(stop - 1)
        first = self.layout.offsets[s]
        last = self.blocks_before(stop) - 1
        if last < max(self.blocks_before(start), self.block_offsets[s]):
            return stop, stop
        position = (last - self.block_offsets[s]) * self.config.compress_stride
        return stop, max(stop, first + position + self.config.compress_block)

    def rows_before(self, segment: Segment) -> Segment:
        """The rows before a segment that its first row's window reads."""
        start = segment[0]
        first = self.layout.offsets[self.layout.sequence(start)]
        return max(first, start - self.config.window + 1), start

    def calls(self, segments: tuple[Segment, ...]) -> list[Call]:
        """At most two for each segment: the rest of a sequence that began before, whole ones."""
        found, own_row = [], 0
        for i, (start, stop) in enumerate(segments):
            shift, halo = own_row - start, len(segments) + i
            whole = start  # where whole sequences begin
            s = self.layout.sequence(start)
            if start > self.layout.offsets[s]:
                whole = min(stop, self.layout.offsets[s + 1])
                before = start - self.rows_before((start, stop))[0]
                found.append(self._call((start, whole), shift, before, halo))
            if whole < stop:
                found.append(self._call((whole, stop), shift, 0, halo))
            own_row += stop - start
        return found

    def _call(self, rows: Segment, shift: int, window_start: int, halo: int) -> Call:
        """``shift`` is what makes a row of the whole batch one of this rank's own."""
        offsets, blocks = self.layout.offsets, self.block_offsets
        start, stop = rows
        first, last = self.layout.sequence(start), self.layout.sequence(stop - 1)
        lengths = tuple(min(offsets[s + 1], stop) - offsets[s] for s in range(first, last + 1))
        seen = blocks[last] + self.config.num_compressed(lengths[-1])
        lengths = tuple(n for n in lengths if n)
        return Call(
            rows=slice(start + shift, stop + shift),
            keys=slice(offsets[first], stop),
            blocks=slice(blocks[first], seen),
            q_start=start - offsets[first],
            window_start=window_start,
            halo=halo,
            lengths=lengths if len(lengths) > 1 else None,
        )

    def phi_inputs(self, segments: tuple[Segment, ...]) -> list[PhiInput]:
        """One for each segment."""
        found, own_row = [], 0
        for start, stop in segments:
            s, last = self.layout.sequence(start), self.layout.sequence(stop - 1)
            position = start - self.layout.offsets[s]
            skipped = min(
                -position % self.config.compress_stride,
                min(self.layout.offsets[s + 1], stop) - start,
            )
            begin, end = start + skipped, self.rows_after((start, stop))[1]
            edges = (begin, *self.layout.offsets[s + 1 : last + 1], end)
            lengths = tuple(b - a for a, b in pairwise(edges))
            rows = slice(own_row + skipped, own_row + stop - start)
            found.append(PhiInput(rows, lengths, self.blocks_in((start, stop))))
            own_row += stop - start
        return found

    def halos(self, segments: tuple[Segment, ...]) -> list[tuple[int, Segment]]:
        """Which rows, of which pair, a rank with these segments reads beside them."""
        after = [(TOKENS, self.rows_after(segment)) for segment in segments]
        before = [(WINDOW, self.rows_before(segment)) for segment in segments]
        return after + before


def _exchange(geometry: _Geometry) -> Exchange | None:
    """What this rank sends to each other, and where in its halos it puts what comes."""
    layout, holders = geometry.layout, _Holders(geometry.layout)
    halos_of = [geometry.halos(segments) for segments in layout.segments]
    if not any(start < stop for halos in halos_of for _, (start, stop) in halos):
        return None
    sent = [
        [
            (pair, slice(first, first + count))
            for pair, wanted in halos
            for holder, first, count in holders.parts(wanted)
            if holder == layout.rank
        ]
        for halos in halos_of
    ]
    received = [0] * layout.size
    for _, wanted in halos_of[layout.rank]:
        for holder, _, count in holders.parts(wanted):
            received[holder] += count
    placed = [0, *accumulate(received)]  # rows of each rank follow those of the one before
    halos = []
    for pair, wanted in halos_of[layout.rank]:
        parts = []
        for holder, _, count in holders.parts(wanted):
            parts.append(slice(placed[holder], placed[holder] + count))
            placed[holder] += count
        halos.append((pair, tuple(parts)))
    return Exchange(
        sent=tuple(entry for entries in sent for entry in entries),
        halos=tuple(halos),
        sent_rows=tuple(sum(rows.stop - rows.start for _, rows in entries) for entries in sent),
        received_rows=tuple(received),
    )


class _Holders:
    """Which rank holds which rows of a layout."""

    def __init__(self, layout: Layout) -> None:
        self._segments = sorted(
            (start, stop, rank, sum(b - a for a, b in own[:i]))
            for rank, own in enumerate(layout.segments)
            for i, (start, stop) in enumerate(own)
        )
        self._starts = [start for start, *_ in self._segments]

    def parts(self, wanted: Segment) -> Iterator[tuple[int, int, int]]:
        """Of rows, in their order: the rank that holds them, the first of its own, how many."""
        row, end = wanted
        while row < end:
            start, stop, rank, first = self._segments[bisect_right(self._starts, row) - 1]
            count = min(end, stop) - row
            yield rank, first + row - start, count
            row += count


def _check_share(layout: Layout, config: NSAConfig) -> None:
    share = config.select_share
    for own in layout.segments:
        for start, _ in own:
            position = start - layout.offsets[layout.sequence(start)]
            if position % share:
                raise ShapeError(
                    f"layout: expected sequences cut at multiples of select_share={share}, got a "
                    f"cut at position {position}; use Layout.head_tail(…, multiple={share}) or "
                    "Layout.contiguous with the same"
                )
