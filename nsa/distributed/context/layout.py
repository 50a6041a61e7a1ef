"""Layout: which rows of a batch each rank of a group holds.

B batch, T rows of the whole batch's sequence dimension.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from operator import index
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from nsa.core.validate import check_tensor
from nsa.distributed.context.collectives import check_sendable, rank_and_size
from nsa.distributed.context.transfers import GatherRows, Parts
from nsa.errors import ShapeError, is_int, show

if TYPE_CHECKING:
    from typing_extensions import Self

Segment = tuple[int, int]
"""Rows ``start … stop - 1`` of the whole batch."""


class Layout:
    """Segments of the sequence dimension, one or several for each rank of a process group.

    Args:
        segments: for each rank its segments ``(start, stop)``, in the order in which it holds their
            rows; together they hold each of the T rows once.
        tokens: T of a regular batch ``[B, T, …]``, or the lengths of packed sequences, whose sum is
            T (``cu_seqlens.diff().tolist()``, which reads the device: once for all layers).
        group: the ranks; None is the default group.
        rank: of this process in ``segments``; None takes the group's. With a rank
            ``torch.distributed`` is not called: such a layout is for arithmetic alone
            (:func:`nsa.distributed.context_traffic`).

    Raises:
        ShapeError: segments that overlap or leave rows out, a rank without rows, no group, or one
            of another size.
    """

    def __init__(
        self,
        segments: Sequence[Sequence[Segment]],
        tokens: int | Sequence[int],
        *,
        group: dist.ProcessGroup | None = None,
        rank: int | None = None,
    ) -> None:
        self.packed = not is_int(tokens)
        lengths = _lengths(tokens)
        self.offsets = (0, *accumulate(lengths))
        """The first row of each sequence, then T; a regular batch is one sequence."""
        self.longest = max(lengths)
        self.segments = _segments(segments)
        self.group = group
        self.size = len(self.segments)
        self.for_arithmetic = rank is not None
        if rank is None:
            rank, size = rank_and_size(group)
            if size != self.size:
                raise ShapeError(
                    f"segments: expected those of {size} ranks, as the group has, got those of "
                    f"{self.size}"
                )
        self.rank = rank
        self._check()
        self._tensors: dict[Any, Tensor] = {}
        self.plans: dict[Any, Any] = {}
        """Of :func:`nsa.distributed.context.plan.plan_of`."""

    @classmethod
    def contiguous(
        cls,
        tokens: int | Sequence[int],
        *,
        multiple: int = 1,
        group: dist.ProcessGroup | None = None,
        size: int | None = None,
    ) -> Self:
        """One segment for each rank, in the order of ranks, as even as they can be.

        Causal attention gives the last rank the most to do: :meth:`head_tail` balances that.

        Args:
            tokens, group: as of :class:`Layout`.
            multiple: cut sequences at multiples of so many tokens from their start; it must be a
                multiple of ``select_share``.
            size: so many ranks in place of a group's, for arithmetic; this process is the first.
        """
        cut = even_segments(tokens, _size(group, size), multiple)
        segments = [[segment] for segment in cut]
        return cls(segments, tokens, group=group, rank=None if size is None else 0)

    @classmethod
    def head_tail(
        cls,
        tokens: int | Sequence[int],
        *,
        multiple: int = 1,
        group: dist.ProcessGroup | None = None,
        size: int | None = None,
    ) -> Self:
        """Two segments for each of R ranks: rank r has the r-th of 2R from the start and the r-th
        from the end, so that each has as many late rows, which see the most keys, as early ones.

        Arguments as of :meth:`contiguous`.
        """
        ranks = _size(group, size)
        cut = even_segments(tokens, 2 * ranks, multiple)
        segments = [[cut[r], cut[-1 - r]] for r in range(ranks)]
        return cls(segments, tokens, group=group, rank=None if size is None else 0)

    @property
    def total(self) -> int:
        """T, rows of the whole batch."""
        return self.offsets[-1]

    @property
    def rows(self) -> int:
        """How many of them this rank holds."""
        return sum(b - a for a, b in self.segments[self.rank])

    @cached_property
    def parts(self) -> Parts:
        """Where each rank's rows stand in the whole batch."""
        return Parts.of(self.segments, [[b - a for a, b in own] for own in self.segments])

    def sequence(self, row: int) -> int:
        """The number of the sequence that a row of the whole batch is of."""
        return bisect_right(self.offsets, row) - 1

    def shard(self, x: Tensor) -> Tensor:
        """This rank's rows of ``[B, T, …]``, such as tokens, targets and weights of a loss."""
        self.check_rows("x", x, self.total)
        return torch.cat([x[:, a:b] for a, b in self.segments[self.rank]], dim=1)

    def unshard(self, x: Tensor) -> Tensor:
        """The whole ``[B, T, …]`` on every rank, of rows as :meth:`shard` gives them.

        Gradients are summed over the ranks, as for a loss that is the sum of theirs; ``x`` has them
        on every rank or on none.
        """
        self.check_group()
        self.check_rows("x", x, self.rows)
        check_sendable("x", x)
        gather = GatherRows(self.parts, self.group)
        return gather.receive(gather.send(x))[0]

    def positions(self, device: torch.device) -> Tensor:
        """int64 ``[rows]``: the position of each of this rank's rows in its own sequence."""

        def make() -> Tensor:
            parts = []
            for a, b in self.segments[self.rank]:
                for s in range(self.sequence(a), self.sequence(b - 1) + 1):
                    first, end = self.offsets[s : s + 2]
                    parts.append(torch.arange(max(a, first) - first, min(b, end) - first))
            return torch.cat(parts)

        return self._once("positions", device, make)

    def cu_seqlens(self, lengths: tuple[int, ...], device: torch.device) -> Tensor:
        """int32: 0 and the sums of the first lengths."""
        return self._once(
            lengths, device, lambda: torch.tensor((0, *accumulate(lengths)), dtype=torch.int32)
        )

    def _once(self, key: Any, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """A tensor made for all layers, and brought to the device without waiting for it."""
        if (key, device) not in self._tensors:
            with torch.inference_mode(False):  # it serves training as well
                x = make()
                if device.type == "cuda":
                    x = x.pin_memory().to(device, non_blocking=True)
            self._tensors[key, device] = x
        return self._tensors[key, device]

    def __repr__(self) -> str:
        kind = f"{len(self.offsets) - 1} packed sequences" if self.packed else "a regular batch"
        return f"Layout({self.total} rows of {kind}, {self.size} ranks: {show(self.segments)})"

    def _check(self) -> None:
        if not (is_int(self.rank) and 0 <= self.rank < self.size):
            raise ShapeError(f"rank: expected 0 … {self.size - 1}, got {show(self.rank)}")
        for rank, own in enumerate(self.segments):
            if not any(a < b for a, b in own):
                raise ShapeError(
                    f"segments: expected rows for every rank, got none for rank {rank}; "
                    f"use fewer ranks than {self.size} for {self.total} rows"
                )
        ordered = sorted(segment for own in self.segments for segment in own)
        edges = [0, *(x for segment in ordered for x in segment), self.total]
        wrong = next((i for i in range(0, len(edges), 2) if edges[i] != edges[i + 1]), None)
        if wrong is not None or any(a >= b for a, b in ordered):
            raise ShapeError(
                f"segments: expected each of the rows 0 … {self.total - 1} once, in segments "
                f"(start, stop), got {show(ordered)}"
            )

    def check_group(self) -> None:
        """Refuse to send with a layout that has no ranks to send to."""
        if self.for_arithmetic:
            raise ShapeError(
                "layout: expected the ranks of a process group, got a layout for arithmetic alone; "
                "make it without size and rank"
            )

    def check_rows(self, name: str, x: Tensor, rows: int) -> None:
        """Refuse what is not ``[B, rows, …]``, B = 1 if packed."""
        check_tensor(name, x)
        batch_fits = x.ndim >= 2 and (not self.packed or x.shape[0] == 1)
        if not batch_fits or x.shape[1] != rows:
            wanted = f"[{'1' if self.packed else 'B'}, {rows}, …]"
            raise ShapeError(f"{name}: expected {wanted} of this layout, got {list(x.shape)}")


def even_segments(tokens: int | Sequence[int], count: int, multiple: int = 1) -> list[Segment]:
    """So many segments of consecutive rows, as even as they can be; see :meth:`Layout.contiguous`.

    Raises:
        ShapeError: there are fewer rows than segments.
    """
    _check_count("multiple", multiple)
    offsets = (0, *accumulate(_lengths(tokens)))
    total = offsets[-1]
    cuts = [0]
    for i in range(1, count):
        row = i * total // count
        start = offsets[bisect_right(offsets, row) - 1]
        cuts.append(start + (row - start) // multiple * multiple)
    found = [*pairwise((*cuts, total))]
    if any(a >= b for a, b in found):
        raise ShapeError(
            f"tokens: expected enough for {count} segments cut at multiples of {multiple}, got "
            f"{total}; use fewer ranks, a smaller multiple, or Layout(segments, …)"
        )
    return found


def _lengths(tokens: int | Sequence[int]) -> tuple[int, ...]:
    lengths = tokens if isinstance(tokens, (tuple, list)) else (tokens,)
    if not all(is_int(n) and n >= 0 for n in lengths) or sum(lengths) < 1:
        raise ShapeError(
            "tokens: expected T >= 1 of a regular batch or the lengths of packed sequences, got "
            f"{show(tokens)}"
        )
    return tuple(lengths)


def _segments(given: Sequence[Sequence[Segment]]) -> tuple[tuple[Segment, ...], ...]:
    try:
        found = tuple(tuple((index(a), index(b)) for a, b in own) for own in given)
    except (TypeError, ValueError):
        found = ()
    if not found:
        raise ShapeError(
            "segments: expected a list for each rank, of its segments (start, stop), got "
            f"{show(given)}"
        )
    return found


def _check_count(name: str, value: int) -> None:
    if not (is_int(value) and value >= 1):
        raise ShapeError(f"{name}: expected an int >= 1, got {show(value)}")


def _size(group: dist.ProcessGroup | None, size: int | None) -> int:
    """How many ranks share a batch: those of the group, unless a number is given."""
    if size is None:
        return rank_and_size(group)[1]
    _check_count("size", size)
    return size
