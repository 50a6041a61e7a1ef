"""Packed sequences, the plain way: each one is cut out and computed alone.

The oracle reads ``cu_seqlens`` back from the device; nothing else in the library does.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from nsa.config import NSAConfig


class Span(NamedTuple):
    """Where one sequence lies in the packed tensors."""

    tokens: slice
    blocks: slice
    """Its compressed blocks, which stand one sequence after the other without gaps."""


def spans(cu_seqlens: Tensor, config: NSAConfig) -> list[Span]:
    """One :class:`Span` per sequence, in order."""
    result, first_block = [], 0
    bounds = cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        after = first_block + config.num_compressed(end - start)
        result.append(Span(slice(start, end), slice(first_block, after)))
        first_block = after
    return result
