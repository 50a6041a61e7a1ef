"""Geometry of compressed and selection blocks, shared by φ and the backends."""

from __future__ import annotations

import torch

from nsa.config import NSAConfig

LONG_LIST = 128
"""Entries of a list that is made as wide as it is asked for, whatever there is to list."""
LARGE_BLOCK = 4096
"""Tokens of a selection block that kernels take as it is, whatever there is to hold."""


def overlap_weights(config: NSAConfig) -> tuple[int, tuple[int, ...]]:
    """Which compressed blocks overlap a selection block, and by how much (paper Eq. 9).

    Returns:
        ``(first, weights)``: compressed block ``i = j * (l'/d) + first + m`` shares
        ``weights[m] * d`` tokens with selection block ``j``; first is ``-(l/d - 1)``. For
        32/16/64: ``(-1, (1, 2, 2, 2, 1))``.
    """
    stride, block = config.compress_stride, config.compress_block
    first = -(block // stride - 1)
    count = (block + config.select_block) // stride - 1
    weights = []
    for m in range(count):
        start = (first + m) * stride
        tokens = min(start + block, config.select_block) - max(start, 0)
        weights.append(tokens // stride)
    return first, tuple(weights)


def num_select_blocks(length: int, config: NSAConfig) -> int:
    """Selection blocks J that ``length`` tokens touch, the last one possibly in part."""
    return -(-length // config.select_block)


def list_width(length: int, config: NSAConfig) -> int:
    """Entries n of the lists of queries of up to ``length`` tokens: ``num_selected``, but no more
    than there are blocks where that is far more."""
    n = config.num_selected
    if n <= LONG_LIST:  # no comparison of a length, which may be a symbol
        return n
    return torch.sym_min(n, torch.sym_max(LONG_LIST, num_select_blocks(length, config)))


def block_size(tokens: int, config: NSAConfig, *, least: int = 1) -> int:
    """Tokens l' of a selection block as it is laid out: ``select_block``, or where that is more
    than all ``tokens`` of a sequence, these rounded up to a power of two; every token is in block 0
    of both. Not below ``least``, for kernels that are made anew for every size."""
    enough = 1 << max(0, tokens - 1).bit_length()
    return min(config.select_block, max(least, enough))
