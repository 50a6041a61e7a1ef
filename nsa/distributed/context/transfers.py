"""Transfers of rows between ranks, differentiable, each begun early and received late.

``send`` packs tensors into a buffer and begins a collective; ``receive`` waits for it and unpacks
what came. Backward goes the other way: ``receive`` packs the gradients and begins the transposed
collective (reduce-scatter for all-gather), ``send`` waits for that one. What autograd runs between
the two, in either direction, overlaps with the transfer. Autograd runs nodes in the reverse of the
order in which they were made, on every rank, so that all ranks begin the same collectives in the
same order.

B batch, R ranks, W elements of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa.distributed.context.collectives import Pending, all_gather, all_to_all, reduce_scatter


class Transfer:
    """One transfer of some tensors ``[B, rows, …]``, which have one dtype; used once."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.shapes: list[torch.Size] = []
        self.pending: Pending | None = None

    def send(self, *tensors: Tensor) -> Tensor:
        """Begin; the result is for :meth:`receive`."""
        self.shapes = [x.shape for x in tensors]
        buffer: Tensor = _Send.apply(self, *tensors)
        self.pending = self.begin(buffer.detach())
        return buffer

    def receive(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """Wait for what the ranks have sent."""
        received: tuple[Tensor, ...] = _Receive.apply(self, buffer)
        return received

    def wait(self) -> Tensor:
        """The result of what was begun last."""
        assert self.pending is not None
        result, self.pending = self.pending.wait(), None
        return result

    def widths(self) -> list[int]:
        """Elements of a row of each tensor."""
        return [prod(shape[2:]) for shape in self.shapes]

    def columns(self) -> list[slice]:
        """Of a buffer's rows, those of each tensor."""
        ends = [sum(self.widths()[: i + 1]) for i in range(len(self.shapes))]
        return [slice(end - width, end) for end, width in zip(ends, self.widths(), strict=True)]

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """The buffer that this rank sends."""
        raise NotImplementedError

    def begin(self, buffer: Tensor) -> Pending:
        """Begin the collective."""
        raise NotImplementedError

    def unpack(self, received: Tensor) -> tuple[Tensor, ...]:
        """What came."""
        raise NotImplementedError

    def pack_gradients(self, grads: Sequence[Tensor]) -> Tensor:
        """The transpose of :meth:`unpack`."""
        raise NotImplementedError

    def begin_transposed(self, buffer: Tensor) -> Pending:
        """Begin the transposed collective."""
        raise NotImplementedError

    def unpack_gradients(self, received: Tensor) -> tuple[Tensor, ...]:
        """The transpose of :meth:`pack`."""
        raise NotImplementedError


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, transfer: Transfer, *tensors: Tensor) -> Tensor:
        ctx.transfer = transfer
        return transfer.pack(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, unready: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.transfer.unpack_gradients(ctx.transfer.wait())


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, transfer: Transfer, buffer: Tensor) -> tuple[Tensor, ...]:
        ctx.transfer = transfer
        return transfer.unpack(transfer.wait())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        transfer = ctx.transfer
        transfer.pending = transfer.begin_transposed(transfer.pack_gradients(grads))
        if torch.is_anomaly_enabled():  # which reads gradients at once
            transfer.pending.wait()
        return None, transfer.pending.unready


class Part(NamedTuple):
    """Consecutive rows of the whole that one rank holds one after the other."""

    rank: int
    rows: slice
    """Of that rank's own."""


class Parts(NamedTuple):
    """The rows of all ranks in the order of the whole."""

    order: tuple[Part, ...]
    counts: tuple[int, ...]
    """Rows of each rank."""

    @classmethod
    def of(
        cls, segments: Sequence[Sequence[tuple[int, int]]], counts: Sequence[Sequence[int]]
    ) -> Parts:
        """Parts of so many rows, in the order of the segments that they stand for."""
        found = []
        for rank, (own, numbers) in enumerate(zip(segments, counts, strict=True)):
            row = 0
            for (start, _), number in zip(own, numbers, strict=True):
                found.append((start, Part(rank, slice(row, row + number))))
                row += number
        order = tuple(part for _, part in sorted(found, key=lambda entry: entry[0]))
        return cls(order, tuple(map(sum, counts)))

    @property
    def most(self) -> int:
        """Rows of a buffer that all ranks send alike."""
        return max(1, *self.counts)


class GatherRows(Transfer):
    """The rows of all ranks on every rank; gradients return by reduce-scatter, in their dtype."""

    def __init__(self, parts: Parts, group: dist.ProcessGroup | None) -> None:
        super().__init__(group)
        self.parts = parts

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """``[B, most, W]``: the tensors side by side, and rows that nobody reads."""
        B, rows = tensors[0].shape[:2]
        buffer = tensors[0].new_empty(B, self.parts.most, sum(self.widths()))
        buffer[:, rows:].zero_()
        for x, columns in zip(tensors, self.columns(), strict=True):
            buffer[:, :rows, columns].copy_(x.flatten(2) if x.ndim > 2 else x[..., None])
        return buffer

    def begin(self, buffer: Tensor) -> Pending:
        """All-gather."""
        return all_gather(buffer, self.group)

    def unpack(self, received: Tensor) -> tuple[Tensor, ...]:
        """Each tensor in the order of the whole, of ``[R, B, most, W]``."""
        rows = sum(self.parts.counts)
        return tuple(
            torch.cat([received[p.rank][:, p.rows, columns] for p in self.parts.order], dim=1).view(
                shape[0], rows, *shape[2:]
            )
            for shape, columns in zip(self.shapes, self.columns(), strict=True)
        )

    def pack_gradients(self, grads: Sequence[Tensor]) -> Tensor:
        """``[R, B, most, W]`` of gradients in the order of the whole."""
        ranks, B = len(self.parts.counts), grads[0].shape[0]
        buffer = grads[0].new_zeros(ranks, B, self.parts.most, sum(self.widths()))
        for grad, columns in zip(grads, self.columns(), strict=True):
            flat = grad.flatten(2) if grad.ndim > 2 else grad[..., None]
            row = 0
            for rank, rows in self.parts.order:
                end = row + rows.stop - rows.start
                buffer[rank][:, rows, columns].copy_(flat[:, row:end])
                row = end
        return buffer

    def begin_transposed(self, buffer: Tensor) -> Pending:
        """Reduce-scatter."""
        return reduce_scatter(buffer, self.group)

    def unpack_gradients(self, received: Tensor) -> tuple[Tensor, ...]:
        """Each tensor's of ``[B, most, W]``."""
        return tuple(
            received[:, : shape[1], columns].reshape(shape)
            for shape, columns in zip(self.shapes, self.columns(), strict=True)
        )


class Exchange(NamedTuple):
    """Which rows one rank sends to each other, and what it makes of those that come."""

    sent: tuple[tuple[int, slice], ...]
    """In the order of ranks: a pair of tensors by number, and rows of it."""
    received: tuple[tuple[int, int], ...]
    """In the order of ranks: a need by number, and how many rows of it."""
    order: tuple[tuple[int, ...], ...]
    """For each need the entries of ``received`` that it is made of, in the order of the whole."""
    pairs: tuple[int, ...]
    """For each need the pair of tensors that its rows are of."""
    sent_rows: tuple[int, ...]
    """To each rank."""
    received_rows: tuple[int, ...]
    """From each rank."""


class ExchangeRows(Transfer):
    """Some rows of pairs of tensors (keys and values) from the ranks that hold them.

    All pairs have rows of the same size. :meth:`receive` returns a pair for each need.
    """

    def __init__(self, exchange: Exchange, group: dist.ProcessGroup | None) -> None:
        super().__init__(group)
        self.exchange = exchange

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Flat, in the order of the ranks that it goes to."""
        parts = [
            self._row_major([x[:, rows] for x in tensors[2 * pair : 2 * pair + 2]])
            for pair, rows in self.exchange.sent
        ]
        return torch.cat(parts) if parts else tensors[0].new_empty(0)

    def begin(self, buffer: Tensor) -> Pending:
        """All-to-all; ranks that need nothing of each other send nothing."""
        return all_to_all(buffer, *self._splits(), self.group)

    def unpack(self, received: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of each need."""
        B, W = self.shapes[0][0], sum(self.widths()[:2])
        counts = [rows for _, rows in self.exchange.received]
        entries = [
            entry.view(B, rows, W)
            for rows, entry in zip(
                counts, received.split([B * rows * W for rows in counts]), strict=True
            )
        ]
        found = []
        for pair, numbers in zip(self.exchange.pairs, self.exchange.order, strict=True):
            parts = [entries[i] for i in numbers]
            whole = torch.cat(parts, dim=1) if parts else received.new_empty(B, 0, W)
            shapes = self.shapes[2 * pair : 2 * pair + 2]
            halves = whole.split([prod(shape[2:]) for shape in shapes], dim=2)
            found += [x.unflatten(2, shape[2:]) for x, shape in zip(halves, shapes, strict=True)]
        return tuple(found)

    def pack_gradients(self, grads: Sequence[Tensor]) -> Tensor:
        """Flat, in the order of the ranks that the rows came from."""
        entries: dict[int, Tensor] = {}
        for need, numbers in enumerate(self.exchange.order):
            row = 0
            for i in numbers:
                end = row + self.exchange.received[i][1]
                halves = [x[:, row:end] for x in grads[2 * need : 2 * need + 2]]
                entries[i] = self._row_major(halves)
                row = end
        return torch.cat([entries[i] for i in sorted(entries)]) if entries else grads[0].flatten()

    def begin_transposed(self, buffer: Tensor) -> Pending:
        """All-to-all, back."""
        sent, received = self._splits()
        return all_to_all(buffer, received, sent, self.group)

    def unpack_gradients(self, received: Tensor) -> tuple[Tensor, ...]:
        """Zero where no rank was sent a row."""
        grads = [received.new_zeros(shape) for shape in self.shapes]
        W, first = sum(self.widths()[:2]), 0
        for pair, rows in self.exchange.sent:
            shape = self.shapes[2 * pair]
            count = rows.stop - rows.start
            size = shape[0] * count * W
            part = received[first : first + size].view(shape[0], count, W)
            halves = part.split(self.widths()[2 * pair : 2 * pair + 2], dim=2)
            for grad, half in zip(grads[2 * pair : 2 * pair + 2], halves, strict=True):
                grad[:, rows] += half.view(shape[0], count, *grad.shape[2:])
            first += size
        return tuple(grads)

    def _splits(self) -> tuple[list[int], list[int]]:
        """Elements sent to and received from each rank."""
        size = self.shapes[0][0] * sum(self.widths()[:2])
        return (
            [rows * size for rows in self.exchange.sent_rows],
            [rows * size for rows in self.exchange.received_rows],
        )

    @staticmethod
    def _row_major(pair: Sequence[Tensor]) -> Tensor:
        """Keys and values side by side, flat."""
        return torch.cat([x.flatten(2) for x in pair], dim=2).flatten()
