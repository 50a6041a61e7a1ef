"""What plain PyTorch computes in the backend's own dtype: the yardstick of the accuracy rule.

Explicit softmax over a dense mask, every product in the dtype of its inputs, each branch rounded
to it, the branches combined in fp32. B batch, T query tokens, S keys, H query heads,
K key/value heads, G heads per group, D key size, V value size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.core.dtypes import accumulation_dtype
from nsa.reference.masks import compressed_mask, selected_mask, window_mask
from nsa.reference.packing import spans
from nsa.testing.inputs import Inputs


class BranchOfSequence(NamedTuple):
    """One branch of one sequence, as dense attention."""

    branch: int
    """0 compressed, 1 selected, 2 window."""
    tokens: slice
    q: Tensor
    """``[B, T, H, D]``"""
    k: Tensor
    """``[B, S, K, D]``"""
    v: Tensor
    """``[B, S, K, V]``"""
    mask: Tensor
    """bool, broadcastable to ``[B, T, K, S]``."""


def branches(inputs: Inputs) -> Iterator[BranchOfSequence]:
    """Every branch of every sequence; the block list must be given."""
    config, block_idx = inputs.config, inputs.block_idx
    assert block_idx is not None
    if inputs.cu_seqlens is None:
        cuts = [(slice(None), slice(None))]
    else:
        cuts = [(seq.tokens, seq.blocks) for seq in spans(inputs.cu_seqlens, config)]
    for tokens, blocks in cuts:
        q = inputs.q[:, tokens]
        T, device = q.shape[1], q.device
        if T == 0:
            continue
        k, v = (x[:, blocks] for x in inputs.compressed)
        mask = compressed_mask(T, k.shape[1], config, 0, device)
        if k.shape[1] == 0:
            k, v = F.pad(k, (0, 0, 0, 0, 0, 1)), F.pad(v, (0, 0, 0, 0, 0, 1))
            mask = mask.new_zeros(1, T, 1, 1)
        yield BranchOfSequence(0, tokens, q, k, v, mask)
        k, v = (x[:, tokens] for x in inputs.selected)
        mask = selected_mask(block_idx[:, tokens], T, config, 0)
        yield BranchOfSequence(1, tokens, q, k, v, mask)
        k, v = (x[:, tokens] for x in inputs.window)
        yield BranchOfSequence(2, tokens, q, k, v, window_mask(T, T, config, 0, device))


def plain_scores(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """``[B, T, K, G, S]`` in q's dtype, −inf where hidden."""
    B, T, H, D = q.shape
    K = k.shape[2]
    scores = torch.einsum("btkgd,bskd->btkgs", q.view(B, T, K, H // K, D), k) * scale
    return scores.masked_fill(~mask[..., None, :], float("-inf"))


def plain_softmax(scores: Tensor) -> Tensor:
    """Softmax in the dtype of the scores; a row of −inf gives zeros."""
    hidden = scores == float("-inf")
    empty = hidden.all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(hidden, 0.0)


def plain_attention(inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    """The combined output ``[B, T, H, V]`` and the three lse ``[B, T, H]``, with gradients."""
    B, T, H, _ = inputs.q.shape
    dtype, scale = inputs.q.dtype, inputs.config.softmax_scale
    wide = accumulation_dtype(dtype)
    gates = inputs.gates.to(wide)
    parts: list[list[Tensor]] = [[], [], []]
    lses: list[list[Tensor]] = [[], [], []]
    for part in branches(inputs):
        scores = plain_scores(part.q, part.k, part.mask, scale)
        out = torch.einsum("btkgs,bskv->btkgv", plain_softmax(scores), part.v)
        parts[part.branch].append(out.flatten(2, 3))
        lses[part.branch].append(scores.detach().to(wide).logsumexp(-1).flatten(2))
    outputs = [torch.cat(rows, 1).to(wide) for rows in parts]
    terms = [g[..., None] * o for g, o in zip(gates.unbind(-1), outputs, strict=True)]
    return sum(terms[1:], terms[0]).to(dtype), [torch.cat(rows, 1) for rows in lses]
