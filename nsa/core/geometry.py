"""Geometry of compressed and selection blocks, shared by φ and the backends."""

from __future__ import annotations

from nsa.config import NSAConfig


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
