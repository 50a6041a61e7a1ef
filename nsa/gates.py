"""The table of gates: how the layer's three branches are weighted (paper Eq. 5).

A new gate is one row, beside its name in :data:`nsa.config.Gate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class GateRow(NamedTuple):
    """One activation of the gates."""

    activate: Callable[[Tensor], Tensor]
    """logits ``[B, T, H, 3]`` -> gates of the same shape and dtype."""
    in_unit_interval: bool
    """Whether every gate is in 0…1, on which kernels rely where the row says so."""


GATES: Mapping[str, GateRow] = {
    "sigmoid": GateRow(torch.sigmoid, in_unit_interval=True),
    "softmax": GateRow(lambda logits: logits.softmax(-1), in_unit_interval=True),
}
"""By the name that ``NSAConfig.gate`` gives."""
