"""The window in blocks of rows, as plain PyTorch that Inductor turns into C++.

Rows are cut into blocks of b; a block's keys are those of it and of the blocks before it that the
window reaches, an overlapping view. Memory is linear in the number of tokens.

B batch, T query tokens, S key tokens, H query heads, K key/value heads, G heads per group, D key
size, V value size, R row blocks, b rows of a block, c keys of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.operators import lse_dtype

BLOCK = 128
"""Rows of a block at most."""


def window_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    window: int,
    scale: float,
    q_start: int,
) -> tuple[Tensor, Tensor]:
    """Attention over the last ``window`` tokens.

    Args:
        q: ``[B, T, H, D]``; k: ``[B, S, K, D]``; v: ``[B, S, K, V]``.
        start: int32 ``[T]``, the first token of each token's sequence when packed.
        q_start: the key row of q's first row.

    Returns:
        out ``[B, T, H, V]`` in q's dtype, lse ``[B, T, H]``, natural log, detached.
    """
    B, T, H, D = q.shape
    K, V, wide = k.shape[2], v.shape[3], lse_dtype(q)
    b = min(BLOCK, max(16, window))
    before = -(-(window - 1) // b) * b  # keys in front of a block's own
    R = (T + b - 1) // b + 1  # never one: a trace would make a graph for that
    tail = R * b - T
    rows = F.pad(q.to(wide), (0, 0, 0, 0, 0, tail)).reshape(B, R, b, K, H // K, D)
    first = q_start - before  # the key of the first column
    k_blocks, v_blocks = (_key_blocks(x.to(wide), q_start, T, before, tail, b) for x in (k, v))
    scores = scale * torch.einsum("brikgd,brckd->brkgic", rows, k_blocks)
    row = torch.arange(R * b, device=q.device).view(R, b, 1) + q_start
    column = torch.arange(before + b, device=q.device)
    key = column + (torch.arange(R, device=q.device) * b + first)[:, None, None]
    oldest = row - window + 1
    if start is not None:
        padded = F.pad(start.long(), (0, tail))
        oldest = oldest.maximum(padded.view(R, b, 1))
    # rows of the tail see something, so that no softmax is over nothing
    visible = (key <= row) & (key >= oldest) & (key >= 0) | (row >= q_start + T)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    p = scores.softmax(-1)
    out = torch.einsum("brkgic,brckv->brikgv", p, v_blocks)
    lse = scores.detach().logsumexp(-1).permute(0, 1, 4, 2, 3)
    out = out.reshape(B, R * b, H, V)[:, :T].to(q.dtype)
    return out, lse.reshape(B, R * b, H)[:, :T]


def _key_blocks(x: Tensor, q_start: int, T: int, before: int, tail: int, b: int) -> Tensor:
    """``[B, S, K, D]`` -> ``[B, R, before + b, K, D]``, zero where no token is.

    Slices side by side in place of an overlapping view: the gradient of that is a scatter, which
    Inductor gets wrong on some CPUs (torch 2.13, AVX2).
    """
    x = x[:, max(0, q_start - before) : q_start + T]
    x = F.pad(x, (0, 0, 0, 0, before + T - x.shape[1], tail))
    x = x.unflatten(1, (-1, b))
    blocks = before // b
    R = x.shape[1] - blocks
    return torch.cat([x[:, i : i + R] for i in range(blocks + 1)], dim=2)
