"""Folding: the compressed branch as plain causal attention.

The d queries ``t = i*d + l-1 … i*d + l+d-2`` all see exactly the compressed blocks ``0 … i``. Moved
into one row i, with d*G queries per key head, the branch is causal attention of N rows over N keys.

B batch, T tokens, N rows, H query heads, K key/value heads, G heads per group, D size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.config import NSAConfig
from nsa.varlen import compressed_members, token_members


class Fold(NamedTuple):
    """How the tokens of one batch map to rows of ``stride`` queries."""

    rows: int
    first_row: int
    """The number of the first row (decode)."""
    stride: int
    skipped: int
    """Tokens in front that see no block (regular)."""
    lead: int
    """Empty places in front of the first token of the first row (regular)."""
    tokens: Tensor | None = None
    """int64 ``[rows * stride]``, the token at each place when packed; any token where none is."""
    places: Tensor | None = None
    """int64 ``[T]``, the place of each token when packed; any place for one that sees no block."""
    blind: Tensor | None = None
    """bool ``[T]``, True for a packed token that sees no block."""
    row_seq: Tensor | None = None
    """int64 ``[rows]``, the sequence of each row when packed; n_seq for a surplus row."""
    real: Tensor | None = None
    """bool ``[rows]``, False for a surplus row when packed."""


def make_fold(
    T: int, N: int, config: NSAConfig, cu_seqlens: Tensor | None, q_start: int = 0
) -> Fold:
    """The fold of T queries over N compressed blocks; packed, N counts the surplus rows too."""
    block, stride = config.compress_block, config.compress_stride
    if cu_seqlens is None:
        skipped = max(0, block - 1 - q_start)
        if T <= skipped:  # a branch, so that sizes in a trace are plain
            return Fold(0, 0, stride, T, 0)
        seeing = q_start + skipped - (block - 1)  # tokens since the first that sees a block
        lead, first_row = seeing % stride, seeing // stride
        rows = (T - skipped + lead + stride - 1) // stride
        return Fold(rows, first_row, stride, skipped, lead)
    token, row = token_members(cu_seqlens, T), compressed_members(cu_seqlens, N, config)
    starts = cu_seqlens.long()
    real = row.seq < cu_seqlens.numel() - 1
    first = starts[row.seq] + row.rank * stride + block - 1
    tokens = first[:, None] + torch.arange(stride, device=starts.device)
    since = token.rank - (block - 1)
    places = (row.starts[token.seq] * stride + since).clamp(0, max(N * stride - 1, 0))
    return Fold(
        N,
        0,
        stride,
        0,
        0,
        tokens.flatten().clamp_max(max(T - 1, 0)),
        places,
        since < 0,
        row.seq,
        real,
    )


def fold(x: Tensor, shape: Fold, K: int) -> Tensor:
    """``[B, T, H, D]`` -> ``[B, rows, K, stride*G, D]``, query ``(place, group head)`` in order."""
    B, T, H, D = x.shape
    if shape.tokens is not None:
        if T == 0:  # every sequence is empty: something for the surplus rows to read
            x = F.pad(x, (0, 0, 0, 0, 0, 1))
        x = x.index_select(1, shape.tokens)
    else:
        x = x[:, shape.skipped :]
        tail = shape.rows * shape.stride - shape.lead - x.shape[1]
        x = F.pad(x, (0, 0, 0, 0, shape.lead, tail))
    x = x.reshape(B, shape.rows, shape.stride, K, H // K, D).transpose(2, 3)
    return x.reshape(B, shape.rows, K, shape.stride * (H // K), D)


def unfold(x: Tensor, shape: Fold, T: int, empty: float) -> Tensor:
    """The inverse of :func:`fold`; ``empty`` where no block is seen."""
    B, rows, K, M, D = x.shape
    x = x.view(B, rows, K, shape.stride, M // shape.stride, D).transpose(2, 3)
    x = x.reshape(B, rows * shape.stride, K * (M // shape.stride), D)
    if shape.places is not None and shape.blind is not None:
        if rows == 0:  # padding, not a new tensor, so that gradients (of nothing) still flow
            return F.pad(x, (0, 0, 0, 0, T, 0), value=empty)
        x = x.index_select(1, shape.places)
        return x.masked_fill(shape.blind[:, None, None], empty)
    x = x[:, shape.lead : shape.lead + T - shape.skipped]
    return F.pad(x, (0, 0, 0, 0, shape.skipped, 0), value=empty)


def nothing_seen(q: Tensor, k: Tensor, v: Tensor, lse_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of queries ``[B, T, H, D]`` that see no block.

    k and v have no rows, or none that is read; zero gradients flow to them and to q.
    """
    B, T, H, _ = q.shape
    nothing = q[:, :0].sum() + k[:, :0].sum() + v[:, :0].sum()
    out = q.new_zeros(B, T, H, v.shape[-1]) + nothing
    return out, q.new_full((B, T, H), float("-inf"), dtype=lse_dtype)
