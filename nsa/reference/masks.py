"""Who sees what: the dense masks of the three branches, for one sequence.

T query tokens, S keys, N compressed blocks, J selection blocks, K key/value heads.
Queries stand at positions ``q_start … q_start + T - 1`` of their sequence, keys from 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.config import NSAConfig


def compressed_mask(
    T: int, N: int, config: NSAConfig, q_start: int, device: torch.device
) -> Tensor:
    """``[1, T, 1, N]``: block i is visible to query t iff its last token is: i*d + l - 1 <= t."""
    t = torch.arange(q_start, q_start + T, device=device)[:, None]
    i = torch.arange(N, device=device)[None, :]
    last_token = i * config.compress_stride + config.compress_block - 1
    return (last_token <= t)[None, :, None, :]


def selected_mask(block_idx: Tensor, S: int, config: NSAConfig, q_start: int) -> Tensor:
    """``[B, T, K, S]``: key s is visible to query t iff its block is listed and s <= t."""
    T, device = block_idx.shape[1], block_idx.device
    t = torch.arange(q_start, q_start + T, device=device)[:, None, None]
    s = torch.arange(S, device=device)
    listed = torch.zeros(*block_idx.shape[:3], S, dtype=torch.bool, device=device)
    for slot in range(block_idx.shape[3]):
        listed |= block_idx[..., slot, None] == s // config.select_block
    return listed & (s <= t)


def window_mask(T: int, S: int, config: NSAConfig, q_start: int, device: torch.device) -> Tensor:
    """``[1, T, 1, S]``: key s is visible to query t iff t - w < s <= t."""
    t = torch.arange(q_start, q_start + T, device=device)[:, None]
    s = torch.arange(S, device=device)[None, :]
    return ((t - config.window < s) & (s <= t))[None, :, None, :]
