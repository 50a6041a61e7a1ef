"""Explicit softmax attention over a dense mask: what every branch of the oracle comes down to.

B batch, T query tokens, S keys, H query heads, K key/value heads, G heads per group,
D key size, V value size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Softmax statistics and sums are fp32, fp64 for fp64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax of ``scale * q·k`` over the keys that ``mask`` shows.

    Args:
        q: ``[B, T, H, D]``; query head h reads key head ``h // G``.
        k: ``[B, S, K, D]``, S at least 1.
        mask: bool, broadcastable to ``[B, T, K, S]``; True where the query sees the key.

    Returns:
        ``[B, T, K, G, S]`` probabilities, zero in a row that sees nothing, and the natural
        log-sum-exp ``[B, T, H]``, there −inf; the latter carries no gradient.
    """
    q_BTHD, k_BSKD = q, k
    B, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    dtype = accumulation_dtype(q.dtype)
    q_BTKGD = q_BTHD.to(dtype).reshape(B, T, K, H // K, D)
    scores = scale * torch.einsum("btkgd,bskd->btkgs", q_BTKGD, k_BSKD.to(dtype))
    scores = scores.masked_fill(~mask[..., None, :], float("-inf"))
    highest = scores.detach().amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == float("-inf"), 0.0)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    p_BTKGS = weights / total.masked_fill(empty, 1.0)
    lse = (highest + total.log()).detach()
    return p_BTKGS, lse.reshape(B, T, H)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q over the keys that ``mask`` shows.

    Shapes as in :func:`probabilities`, with v ``[B, S, K, V]``.

    Returns:
        the output ``[B, T, H, V]`` in q's dtype and lse ``[B, T, H]``; a row that sees nothing
        has output 0 and lse −inf.
    """
    if k.shape[1] == 0:  # one key that nobody sees, so that there is an axis to sum over
        k, v = F.pad(k, (0, 0, 0, 0, 0, 1)), F.pad(v, (0, 0, 0, 0, 0, 1))
        mask = mask.new_zeros(*mask.shape[:-1], 1)
    p_BTKGS, lse = probabilities(q, k, mask, scale)
    out_BTKGV = torch.einsum("btkgs,bskv->btkgv", p_BTKGS, v.to(p_BTKGS.dtype))
    return out_BTKGV.flatten(2, 3).to(q.dtype), lse
