"""Which pages of a pool the sequences of a batch have: a page table, counts of use, a free list.

A page is ``size`` tokens of every layer at once; layers share one table. Everything is decided on
the host, from lengths that are known there; the table on the device is changed in place.

B sequences, M pages of a sequence at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from nsa.errors import CacheError


class Copies(NamedTuple):
    """Pages that have to be copied, all at once: what ``sources`` hold now goes to ``targets``."""

    sources: list[int]
    targets: list[int]


class Pages:
    """The pages of every sequence.

    Args:
        batch: B.
        per_sequence: M.
        size: tokens of a page.
        pool: pages that all sequences share; None gives every sequence M pages of its own, which
            are never shared and always there.
        device: of the table.
    """

    def __init__(
        self, batch: int, per_sequence: int, size: int, pool: int | None, device: torch.device
    ) -> None:
        self.per_sequence, self.size, self.fixed = per_sequence, size, pool is None
        self.count = batch * per_sequence if pool is None else pool
        """Pages of the pool. One more, the last, is nobody's: what is written there is not read."""
        self.table = torch.full((batch, per_sequence), self.count, dtype=torch.int32, device=device)
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        """The pages of each sequence, in order."""
        self._uses = [0] * self.count
        self._free = list(range(self.count - 1, -1, -1))
        if self.fixed:
            self._own_pages(batch)

    @property
    def free(self) -> int:
        """Pages that no sequence has."""
        return 0 if self.fixed else len(self._free)

    def _own_pages(self, batch: int) -> None:
        M = self.per_sequence
        self.rows = [list(range(b * M, (b + 1) * M)) for b in range(batch)]
        self.table.copy_(torch.tensor(self.rows, dtype=torch.int32).view(batch, M))

    def reserve(self, lengths: Sequence[int], ends: Sequence[int]) -> Copies:
        """Make room for each sequence's tokens from its length to its end.

        A page that other sequences have too is not written to: it is copied first.

        Raises:
            CacheError: the pool has too few pages; nothing has changed.
        """
        if self.fixed:
            return Copies([], [])
        shared = {  # sequences whose next token falls into a page that is not theirs alone
            b: length // self.size
            for b, (length, end) in enumerate(zip(lengths, ends, strict=True))
            if end > length and length % self.size and self._uses[self.rows[b][-1]] > 1
        }
        missing = [max(0, -(-end // self.size) - len(row)) for end, row in zip(ends, self.rows)]  # noqa: B905
        # of a page that several sequences are to leave, the last may keep it
        leaving: dict[int, int] = {}
        for b in shared:
            leaving[self.rows[b][-1]] = leaving.get(self.rows[b][-1], 0) + 1
        spared = sum(1 for page, count in leaving.items() if count == self._uses[page])
        needed = sum(missing) + len(shared) - spared
        if needed > len(self._free):
            raise CacheError(
                f"pool: expected {needed} free pages of {self.size} tokens for this step, got "
                f"{len(self._free)} of {self.count}: free or crop a sequence, or make the pool "
                "larger (pages=)"
            )
        copies = Copies([], [])
        for b, place in shared.items():
            page = self.rows[b][place]
            if self._uses[page] > 1:
                copies.sources.append(page)
                copies.targets.append(self._take())
                self._drop(page)
                self._put(b, place, copies.targets[-1])
        for b, count in enumerate(missing):
            for _ in range(count):
                self._put(b, len(self.rows[b]), self._take())
        return copies

    def truncate(self, b: int, length: int) -> None:
        """Give back what a sequence of so many tokens does not need."""
        if self.fixed:
            return
        row, keep = self.rows[b], -(-length // self.size)
        for page in row[keep:]:
            self._drop(page)
        if len(row) > keep:
            del row[keep:]
            self.table[b, keep:] = self.count

    def select(self, rows: Sequence[int], lengths: Sequence[int]) -> Copies:
        """Make sequence i a copy of what sequence ``rows[i]`` was; B becomes ``len(rows)``.

        Pages of a pool are shared; others are copied (``lengths`` are those before).
        """
        before = self.rows
        if self.fixed:
            B, M = len(rows), self.per_sequence
            if B != len(before):
                self.count = B * M
                self.table = self.table.new_empty(B, M)
            self._own_pages(B)
            moved = [(i, b) for i, b in enumerate(rows) if i != b or B != len(before)]
            used = [-(-length // self.size) for length in lengths]
            return Copies(
                [before[b][m] for i, b in moved for m in range(used[b])],
                [self.rows[i][m] for i, b in moved for m in range(used[b])],
            )
        self.rows = [list(before[b]) for b in rows]
        for row in self.rows:
            for page in row:
                self._uses[page] += 1
        for row in before:
            for page in row:
                self._drop(page)
        filler = [self.count]
        entries = [row + filler * (self.per_sequence - len(row)) for row in self.rows]
        table = torch.tensor(entries, dtype=torch.int32).view(len(rows), self.per_sequence)
        if len(rows) == len(before):
            self.table.copy_(table)
        else:
            self.table = table.to(self.table.device)
        return Copies([], [])

    def restore(self, rows: Sequence[Sequence[int]]) -> None:
        """Give the sequences of a new table these pages."""
        if self.fixed:
            return
        for b, row in enumerate(rows):
            for place, page in enumerate(row):
                if not self._uses[page]:
                    self._free.remove(page)
                self._uses[page] += 1
                self._put(b, place, page)

    def _take(self) -> int:
        page = self._free.pop()
        self._uses[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self._uses[page] -= 1
        if not self._uses[page]:
            self._free.append(page)

    def _put(self, b: int, place: int, page: int) -> None:
        self.rows[b][place:] = [page]
        self.table[b, place] = page
