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
from nsa.core.operators import config_of, define
from nsa.core.packing import packed_blocks, packed_tokens


class Fold(NamedTuple):
    """How the tokens of one batch map to rows of ``stride`` queries."""

    rows: int
    first_row: int
    """The number of the first row (decode)."""
    stride: int
    skipped: int
    """Tokens in front that see no block (regular)."""
    lead: int
    """Empty slots in front of the first token of the first row (regular)."""
    tokens: Tensor | None = None
    """int64 ``[rows * stride]``, the token at each slot when packed; any token where none is."""
    slots: Tensor | None = None
    """int64 ``[T]``, the slot of each token when packed; any slot for one that sees no block."""
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
    token, row = packed_tokens(cu_seqlens, T), packed_blocks(cu_seqlens, N, config)
    starts = cu_seqlens.long()
    real = row.seq_id < cu_seqlens.numel() - 1
    first = starts[row.seq_id] + row.position * stride + block - 1
    tokens = first[:, None] + torch.arange(stride, device=starts.device)
    since = token.position - (block - 1)
    slots = (row.offsets[token.seq_id] * stride + since).clamp(0, max(N * stride - 1, 0))
    return Fold(
        N,
        0,
        stride,
        0,
        0,
        tokens.flatten().clamp_max(max(T - 1, 0)),
        slots,
        since < 0,
        row.seq_id,
        real,
    )


def fold_rows(x: Tensor, shape: Fold, K: int) -> Tensor:
    """:func:`fold` outside autograd and traces, where the shape is known."""
    B, T, H, D = x.shape
    R, d, G = shape.rows, shape.stride, H // K
    if shape.tokens is not None:
        if T == 0:  # every sequence is empty: something for the surplus rows to read
            x = F.pad(x, (0, 0, 0, 0, 0, 1))
        x = x.index_select(1, shape.tokens).view(B, R, d, K, G, D)
        return x.transpose(2, 3).reshape(B, R, K, d * G, D)
    rows = x.new_empty(B, R, K, d, G, D)
    for at, span in _spans(shape, T):
        here, there = rows[:, at].transpose(2, 3), x[:, span]
        if at.stop - at.start == 1 and there.shape[1] < d:  # a row in part
            lead = shape.lead if at.start == 0 else 0
            here.zero_()
            here[:, 0, lead : lead + there.shape[1]].copy_(there.unflatten(2, (K, G)))
        else:
            here.copy_(there.unflatten(2, (K, G)).unflatten(1, (-1, d)))
    return rows.view(B, R, K, d * G, D)


def _spans(shape: Fold, T: int) -> list[tuple[slice, slice]]:
    """Rows and the tokens they hold: a first row in part, whole rows, a last one in part."""
    d, row, token = shape.stride, 0, shape.skipped
    spans = []
    if shape.lead and token < T:
        end = min(T, token + d - shape.lead)
        spans.append((slice(0, 1), slice(token, end)))
        row, token = 1, end
    whole = (T - token) // d
    if whole > 0:
        spans.append((slice(row, row + whole), slice(token, token + whole * d)))
        row, token = row + whole, token + whole * d
    if token < T:
        spans.append((slice(row, row + 1), slice(token, T)))
    return spans


def _unfold(x: Tensor, shape: Fold, T: int, empty: float) -> Tensor:
    B, R, K, M, D = x.shape
    d, G = shape.stride, M // shape.stride
    x = x.unflatten(3, (d, G)).transpose(2, 3)  # [B, R, d, K, G, D]
    if shape.slots is not None and shape.blind is not None:
        if R == 0:
            return x.new_full((B, T, K * G, D), empty)
        tokens = x.reshape(B, R * d, K * G, D).index_select(1, shape.slots)
        return tokens.masked_fill_(shape.blind[:, None, None], empty)
    result = x.new_empty(B, T, K, G, D)
    result[:, : shape.skipped].fill_(empty)
    for at, span in _spans(shape, T):
        here, there = x[:, at], result[:, span]
        if at.stop - at.start == 1 and there.shape[1] < d:
            lead = shape.lead if at.start == 0 else 0
            there.copy_(here[:, 0, lead : lead + there.shape[1]])
        else:
            there.unflatten(1, (-1, d)).copy_(here)
    return result.view(B, T, K * G, D)


def _fold_forward(
    x: Tensor, cu_seqlens: Tensor | None, N: int, K: int, key: str, q_start: int
) -> Tensor:
    config = config_of(key)
    return fold_rows(x, make_fold(x.shape[1], N, config, cu_seqlens, q_start), K)


def _unfold_forward(
    x: Tensor,
    cu_seqlens: Tensor | None,
    T: int,
    N: int,
    key: str,
    q_start: int,
    empty: float,
) -> Tensor:
    return _unfold(x, make_fold(T, N, config_of(key), cu_seqlens, q_start), T, empty)


def _unfold_back(
    x: Tensor, cu_seqlens: Tensor | None, N: int, K: int, key: str, q_start: int
) -> Tensor:
    """Like fold, and zero in every slot without a query."""
    if cu_seqlens is None:
        return _fold_forward(x, cu_seqlens, N, K, key, q_start)
    B, T, H, D = x.shape
    d, G = config_of(key).compress_stride, H // K
    rows = x.new_zeros(B, N * d, H, D)
    if T and N:
        where = make_fold(T, N, config_of(key), cu_seqlens, q_start)
        assert where.slots is not None and where.blind is not None
        # each slot gets one token at most, and zeros: the sum does not depend on the order
        rows.index_add_(1, where.slots, x.masked_fill(where.blind[:, None, None], 0.0))
    return rows.view(B, N, d, K, G, D).transpose(2, 3).reshape(B, N, K, d * G, D)


def _rows(T: int, N: int, config: NSAConfig, packed: bool, q_start: int) -> int:
    return N if packed else make_fold(T, N, config, None, q_start).rows


def _fold_fake(
    x: Tensor, cu_seqlens: Tensor | None, N: int, K: int, key: str, q_start: int
) -> Tensor:
    B, T, H, D = x.shape
    config = config_of(key)
    R = _rows(T, N, config, cu_seqlens is not None, q_start)
    return x.new_empty(B, R, K, config.compress_stride * (H // K), D)


def _unfold_fake(
    x: Tensor, cu_seqlens: Tensor | None, T: int, N: int, key: str, *rest: object
) -> Tensor:
    B, _, K, M, D = x.shape
    return x.new_empty(B, T, K * (M // config_of(key).compress_stride), D)


_FOLD_SCHEMA = "Tensor x, Tensor? cu_seqlens, SymInt N, int K, str config, SymInt q_start"
_UNFOLD_SCHEMA = (
    "Tensor x, Tensor? cu_seqlens, SymInt T, SymInt N, str config, SymInt q_start, float empty"
)
_FOLD_BACKWARD = define(f"fold_backward({_UNFOLD_SCHEMA}) -> Tensor", _unfold_forward, _unfold_fake)
_UNFOLD_BACKWARD = define(f"unfold_backward({_FOLD_SCHEMA}) -> Tensor", _unfold_back, _fold_fake)
_FOLD = define(
    f"fold({_FOLD_SCHEMA}) -> Tensor",
    _fold_forward,
    _fold_fake,
    saved=lambda inputs, outputs: (inputs[1],),
    kept=lambda inputs: (inputs[0].shape[1], *inputs[2:]),
    gradients=lambda kept, saved, dout: (
        _FOLD_BACKWARD(dout, saved[0], kept[0], kept[1], kept[3], kept[4], 0.0),
        *(None,) * 5,
    ),
)
_UNFOLD = define(
    f"unfold({_UNFOLD_SCHEMA}) -> Tensor",
    _unfold_forward,
    _unfold_fake,
    saved=lambda inputs, outputs: (inputs[1],),
    kept=lambda inputs: (inputs[0].shape[2], *inputs[2:]),
    gradients=lambda kept, saved, dout: (
        _UNFOLD_BACKWARD(dout, saved[0], kept[2], kept[0], kept[3], kept[4]),
        *(None,) * 6,
    ),
)


def fold(
    x: Tensor, cu_seqlens: Tensor | None, N: int, K: int, config: NSAConfig, q_start: int
) -> Tensor:
    """``[B, T, H, D]`` -> ``[B, rows, K, stride*G, D]``, query ``(slot, group head)`` in order.

    Places without a query are zero (regular) or hold any (packed).
    """
    return _FOLD(x, cu_seqlens, N, K, config.key, q_start)


def unfold(
    x: Tensor,
    cu_seqlens: Tensor | None,
    T: int,
    N: int,
    config: NSAConfig,
    q_start: int,
    empty: float,
) -> Tensor:
    """The inverse of :func:`fold`; ``empty`` where no block is seen."""
    return _UNFOLD(x, cu_seqlens, T, N, config.key, q_start, empty)


def nothing_seen(q: Tensor, k: Tensor, v: Tensor, lse_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of queries ``[B, T, H, D]`` that see no block.

    k and v have no rows, or none that is read; zero gradients flow to them and to q.
    """
    B, T, H, _ = q.shape
    nothing = q[:, :0].sum() + k[:, :0].sum() + v[:, :0].sum()
    out = q.new_zeros(B, T, H, v.shape[-1]) + nothing
    return out, q.new_full((B, T, H), float("-inf"), dtype=lse_dtype)
