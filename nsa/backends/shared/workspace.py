"""Room for what a step packs: made anew, or kept between calls and grown.

A kept workspace belongs to one device and stream (on a CPU: one thread), whose order makes reuse
safe. It is leased for the length of one forward or backward and holds nothing between two: what a
backward needs is packed again, so activation checkpointing may run forwards in any order.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from nsa.errors import SettingsError

_LOG = logging.getLogger("nsa")

Kind = Literal["rows", "keys", "other"]
"""What a buffer's first dimension counts; the first two can be pre-sized."""


class Space:
    """Where buffers come from: here, new tensors each time."""

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        kind: Kind = "other",
    ) -> Tensor:
        """A contiguous buffer that nothing else of this lease uses; it holds anything."""
        return torch.empty(shape, dtype=dtype, device=device)


FRESH = Space()


@dataclass
class Kept(Space):
    """Buffers by name, each as large as it ever had to be."""

    rows: int = 0
    """Rows that a buffer of rows holds from the start (``NSA_PREALLOC_VARLEN_N``)."""
    keys: int = 0
    """Keys that a buffer of keys holds from the start (``NSA_PREALLOC_VARLEN_K``)."""
    grown: int = 0
    """How often a buffer had to be made or made larger."""
    most: dict[str, int] = field(default_factory=lambda: {"rows": 0, "keys": 0})
    """The most rows and keys ever asked for: what to pre-size."""
    _buffers: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        kind: Kind = "other",
    ) -> Tensor:
        """See :class:`Space`."""
        count = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if kind != "other":
            self.most[kind] = max(self.most[kind], shape[0])
        if buffer is None or buffer.numel() < count:
            least = {"rows": self.rows, "keys": self.keys, "other": 0}[kind]
            size = max(count, least * math.prod(shape[1:]))
            del buffer
            self._buffers.pop((name, dtype), None)  # freed before its successor is made
            try:
                with torch.inference_mode(mode=False):  # a training step may come next
                    buffer = torch.empty(size, dtype=dtype, device=device)
            except RuntimeError as error:  # out of memory; on a CPU it has no class of its own
                if size == count:
                    raise
                flag = f"NSA_PREALLOC_VARLEN_{'N' if kind == 'rows' else 'K'}"
                raise SettingsError(
                    f"{flag}: expected what fits in memory, got {least}, {size * dtype.itemsize} "
                    f"bytes on {device} for {name!r} alone; the call needs {shape[0]}"
                ) from error
            self._buffers[name, dtype] = buffer
            self.grown += 1
            _LOG.debug(
                "varlen workspace on %s: %s grows to %s; NSA_PREALLOC_VARLEN_N=%d "
                "NSA_PREALLOC_VARLEN_K=%d would hold all so far",
                device,
                name,
                f"{size * dtype.itemsize / 2**20:.1f} MiB",
                self.most["rows"],
                self.most["keys"],
            )
        return buffer[:count].view(shape)

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(x.numel() * x.element_size() for x in self._buffers.values())


_kept: dict[tuple[object, ...], Kept] = {}
_kept_lock = threading.Lock()


@dataclass(frozen=True)
class Store:
    """Leases the workspaces of one setting; ``kept`` False gives new tensors."""

    kept: bool = False
    rows: int = 0
    keys: int = 0

    @property
    def numbers(self) -> list[int]:
        """This store as an operator's ``int[]``."""
        return [self.rows, self.keys] if self.kept else []

    @classmethod
    def of(cls, numbers: list[int]) -> Store:
        """The inverse of :attr:`numbers`."""
        return cls(True, *numbers) if numbers else cls()

    @contextmanager
    def lease(self, device: torch.device) -> Iterator[Space]:
        """The workspace of this device and stream, for this thread alone.

        While a CUDA graph is captured there is none: what a graph replays must not be memory that
        a later call may outgrow and free.
        """
        if not self.kept or _capturing(device):
            yield FRESH
            return
        with _kept_lock:
            space = _kept.setdefault(
                (*_place(device), self.rows, self.keys), Kept(self.rows, self.keys)
            )
        with space._lock:
            yield space


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _place(device: torch.device) -> tuple[object, ...]:
    if device.type == "cuda":
        return (device, torch.cuda.current_stream(device).cuda_stream)
    return (device, threading.get_ident())


def kept_workspaces() -> dict[tuple[object, ...], Kept]:
    """Every workspace that is kept now."""
    with _kept_lock:
        return dict(_kept)


def release_workspaces() -> None:
    """Gives all kept memory back; the next call makes its workspace anew."""
    with _kept_lock:
        _kept.clear()
