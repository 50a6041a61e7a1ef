"""Where :mod:`nsa.distributed` steps into layers: what shards their sequences, if anything does."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class SequenceSharding(Protocol):
    """Every process has some rows of a batch; layers attend across all of them."""

    longest: int
    """Tokens of the longest sequence of the whole batch."""
    packed: bool
    """Whether backends are given packed sequences."""

    def check_call(self, layer: Any, x: Tensor, **given: object) -> None:
        """Refuse input ``[B, rows, dim]`` of a layer, and arguments that have no meaning here."""
        ...

    def positions(self, device: torch.device) -> Tensor:
        """int64 ``[rows]``: each row's position in its own sequence."""
        ...

    def attend(self, layer: Any, chosen: Any, *projected: Any) -> Tensor:
        """φ and the gated sum of the branches of this process's rows, ``[B, rows, H, V]``."""
        ...


_ACTIVE: SequenceSharding | None = None
# of the process, not of a thread: autograd runs a forward that it recomputes in threads of its own


def active() -> SequenceSharding | None:
    """What is in force."""
    return _ACTIVE


def activate(sharding: SequenceSharding | None) -> SequenceSharding | None:
    """Put something in force; returns what was."""
    global _ACTIVE
    before, _ACTIVE = _ACTIVE, sharding
    return before
