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
from itertools import accumulate
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
        widths = self.widths()
        return [slice(b - width, b) for b, width in zip(accumulate(widths), widths, strict=True)]

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
    """Which rows one rank sends to each other, and how its halos are made of those that come."""

    sent: tuple[tuple[int, slice], ...]
    """In the order of ranks: a pair of tensors by number, and rows of it."""
    halos: tuple[tuple[int, tuple[slice, ...]], ...]
    """For each halo a pair, and its rows among those received, in the order of the whole."""
    sent_rows: tuple[int, ...]
    """To each rank."""
    received_rows: tuple[int, ...]
    """From each rank."""


class ExchangeRows(Transfer):
    """Some rows of pairs of tensors (keys and values) from the ranks that hold them.

    All pairs have rows of the same size. :meth:`receive` returns a pair for each halo. Buffers are
    flat, of ``[rows, B, W]``.
    """

    def __init__(self, exchange: Exchange, group: dist.ProcessGroup | None) -> None:
        super().__init__(group)
        self.exchange = exchange

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """The rows for each rank, in the order of ranks."""
        parts = [
            _side_by_side([x[:, rows] for x in tensors[2 * pair : 2 * pair + 2]])
            for pair, rows in self.exchange.sent
        ]
        return torch.cat(parts).flatten() if parts else tensors[0].new_empty(0)

    def begin(self, buffer: Tensor) -> Pending:
        """All-to-all; ranks that need nothing of each other send nothing."""
        return all_to_all(buffer, *self._splits(), self.group)

    def unpack(self, received: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of each halo."""
        rows = self._rows(received, self.exchange.received_rows)
        found: list[Tensor] = []
        for pair, parts in self.exchange.halos:
            halo = torch.cat([rows[:, :0], *(rows[:, part] for part in parts)], dim=1)
            found += self._keys_and_values(halo, pair)
        return tuple(found)

    def pack_gradients(self, grads: Sequence[Tensor]) -> Tensor:
        """The rows of each rank, in the order of ranks."""
        buffer = grads[0].new_empty(sum(self.exchange.received_rows), *self._row_shape())
        for i, (_, parts) in enumerate(self.exchange.halos):
            row, halo = 0, _side_by_side(grads[2 * i : 2 * i + 2])
            for part in parts:
                end = row + part.stop - part.start
                buffer[part] = halo[row:end]
                row = end
        return buffer.flatten()

    def begin_transposed(self, buffer: Tensor) -> Pending:
        """All-to-all, back."""
        sent, received = self._splits()
        return all_to_all(buffer, received, sent, self.group)

    def unpack_gradients(self, received: Tensor) -> tuple[Tensor, ...]:
        """Zero where no rank was sent a row."""
        grads = [received.new_zeros(shape) for shape in self.shapes]
        returned, row = self._rows(received, self.exchange.sent_rows), 0
        for pair, rows in self.exchange.sent:
            end = row + rows.stop - rows.start
            halves = self._keys_and_values(returned[:, row:end], pair)
            for grad, half in zip(grads[2 * pair : 2 * pair + 2], halves, strict=True):
                grad[:, rows] += half
            row = end
        return tuple(grads)

    def _splits(self) -> tuple[list[int], list[int]]:
        """Elements sent to and received from each rank."""
        size = prod(self._row_shape())
        return (
            [rows * size for rows in self.exchange.sent_rows],
            [rows * size for rows in self.exchange.received_rows],
        )

    def _row_shape(self) -> tuple[int, int]:
        """B and W."""
        return self.shapes[0][0], sum(self.widths()[:2])

    def _rows(self, buffer: Tensor, of_rank: tuple[int, ...]) -> Tensor:
        """A buffer as ``[B, rows, W]``."""
        return buffer.view(sum(of_rank), *self._row_shape()).transpose(0, 1)

    def _keys_and_values(self, rows: Tensor, pair: int) -> list[Tensor]:
        """``[B, rows, W]`` as those of a pair."""
        shapes = [shape[2:] for shape in self.shapes[2 * pair : 2 * pair + 2]]
        halves = rows.split([prod(shape) for shape in shapes], dim=2)
        return [half.unflatten(2, shape) for half, shape in zip(halves, shapes, strict=True)]


def _side_by_side(pair: Sequence[Tensor]) -> Tensor:
    """Keys and values ``[B, rows, …]`` as ``[rows, B, W]``."""
    return torch.cat([x.flatten(2) for x in pair], dim=2).transpose(0, 1)
