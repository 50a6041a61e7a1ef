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

COMPRESSED, WINDOW = 0, 1
"""The pairs of keys and values whose rows are exchanged."""


class Call(NamedTuple):
    """One call of a backend's steps for some of this rank's rows: a part of one sequence, or whole
    sequences, the last of which may end early."""

    rows: slice
    """Of this rank's own."""
    keys: slice
    """Rows of the whole batch that the selected branch may read."""
    blocks: slice
    """Compressed blocks of the whole batch that they may see."""
    q_start: int
    """The position of the first row; 0 with whole sequences."""
    window_start: int
    """How many rows before the first the window reads."""
    halo: int
    """The number of the need that holds them."""
    lengths: tuple[int, ...] | None
    """Of whole sequences, more than one."""


class Stretch(NamedTuple):
    """The tokens of one segment's compressed blocks: those that begin in the segment."""

    rows: slice
    """Of this rank's own."""
    lengths: tuple[int, ...]
    """Tokens of each sequence, those of the halo included."""
    blocks: int


class Plan(NamedTuple):
    """The share of one rank."""

    calls: tuple[Call, ...]
    stretches: tuple[Stretch, ...]
    """One for each segment; need i is the halo after segment i."""
    exchange: Exchange | None
    """None where no rank needs anything."""
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
    geometry = Geometry(layout, config)
    _check_share(layout, config)
    own = layout.segments[layout.rank]
    return Plan(
        tuple(geometry.calls(own)),
        tuple(geometry.stretches(own)),
        _exchange(geometry),
        Parts.of(
            layout.segments,
            [[geometry.blocks_in(segment) for segment in rank] for rank in layout.segments],
        ),
    )


class Geometry:
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
        """At most two for each segment."""
        found, row = [], 0
        for i, (start, stop) in enumerate(segments):
            at, halo = start, len(segments) + i
            s = self.layout.sequence(start)
            first = self.layout.offsets[s]
            if start > first:
                at = min(stop, self.layout.offsets[s + 1])
                before = start - self.rows_before((start, stop))[0]
                found.append(self._call(row - start, (start, at), s, s, before, halo))
            if at < stop:
                s, last = self.layout.sequence(at), self.layout.sequence(stop - 1)
                found.append(self._call(row - start, (at, stop), s, last, 0, halo))
            row += stop - start
        return found

    def _call(
        self, shift: int, rows: Segment, first: int, last: int, window_start: int, halo: int
    ) -> Call:
        offsets, blocks = self.layout.offsets, self.block_offsets
        start, stop = rows
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

    def stretches(self, segments: tuple[Segment, ...]) -> list[Stretch]:
        """One for each segment."""
        found, row = [], 0
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
            rows = slice(row + skipped, row + stop - start)
            found.append(Stretch(rows, lengths, self.blocks_in((start, stop))))
            row += stop - start
        return found


def _exchange(geometry: Geometry) -> Exchange | None:
    """What goes to and comes from each rank; a need is a pair and the rows of it."""
    layout = geometry.layout
    held = _Held(layout)
    sent: list[list[tuple[int, slice]]] = [[] for _ in layout.segments]
    received: list[list[tuple[int, int]]] = [[] for _ in layout.segments]
    needs = [_needs(geometry, own) for own in layout.segments]
    came: list[list[tuple[int, int]]] = [[] for _ in needs[layout.rank]]
    for rank, own in enumerate(needs):
        for need, (pair, wanted) in enumerate(own):
            for holder, rows in held.parts(wanted):
                if holder == layout.rank:
                    sent[rank].append((pair, rows))
                if rank == layout.rank:
                    came[need].append((holder, len(received[holder])))
                    received[holder].append((need, rows.stop - rows.start))
    if not any(start < stop for own in needs for _, (start, stop) in own):
        return None
    first_of = (0, *accumulate(map(len, received)))
    return Exchange(
        tuple(entry for entries in sent for entry in entries),
        tuple(entry for entries in received for entry in entries),
        tuple(tuple(first_of[holder] + i for holder, i in entries) for entries in came),
        tuple(pair for pair, _ in needs[layout.rank]),
        tuple(sum(rows.stop - rows.start for _, rows in entries) for entries in sent),
        tuple(sum(count for _, count in entries) for entries in received),
    )


class _Held:
    """Who holds which rows of a layout."""

    def __init__(self, layout: Layout) -> None:
        self._segments = sorted(
            (start, stop, rank, sum(b - a for a, b in own[:i]))
            for rank, own in enumerate(layout.segments)
            for i, (start, stop) in enumerate(own)
        )
        self._starts = [start for start, *_ in self._segments]

    def parts(self, wanted: Segment) -> Iterator[tuple[int, slice]]:
        """The holders of rows, in the order of the rows, and which of a holder's own they are."""
        row, end = wanted
        while row < end:
            start, stop, rank, first = self._segments[bisect_right(self._starts, row) - 1]
            count = min(end, stop) - row
            yield rank, slice(first + row - start, first + row - start + count)
            row += count


def _needs(geometry: Geometry, own: tuple[Segment, ...]) -> list[tuple[int, Segment]]:
    """A rank's, in the order of pairs and of its segments."""
    after = [(COMPRESSED, geometry.rows_after(segment)) for segment in own]
    before = [(WINDOW, geometry.rows_before(segment)) for segment in own]
    return after + before


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
