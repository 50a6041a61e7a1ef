"""How many keys and values a step of decode has read, counted from what it listed.

B sequences, S new tokens of each, K key/value heads, Y layers, n listed blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.cache import NSACache
from nsa.models.dense_cache import DenseCache


def tokens_read(cache: NSACache | DenseCache) -> Tensor:
    """Key/value tokens that the last query of each sequence has read in a step that has just ended.

    Of NSA the compressed blocks that it sees, the tokens of the blocks that its lists name, up to
    its own, and the window's. Nothing is read back from the device.

    Returns:
        int64 ``[B]``, the sum over layers and key/value heads; means nothing of a freed sequence.
    """
    config, seen = cache.config, cache.position.long()
    lists = len(cache.layers) * config.num_kv_heads
    if isinstance(cache, DenseCache):
        return seen * lists
    listed = torch.stack(
        [layer.listed[:, -1] for layer in cache.layers if layer.listed is not None]
    )
    block = config.select_block
    first = listed.long() * block  # [Y, B, K, n]
    tokens = (seen[:, None, None] - first).clamp(0, block).masked_fill_(listed < 0, 0)
    last = seen - config.compress_block
    blocks = (last.div(config.compress_stride, rounding_mode="floor") + 1).clamp_min_(0)
    return tokens.sum((0, 2, 3)) + lists * (blocks + seen.clamp_max(config.window))
