"""Sliding-window attention in chunks of rows: the window, and packed compression.

Row r sees the keys ``r - window < s <= r`` of its own sequence, itself at least. Rows and keys are
numbered alike; a row carries M queries per key head (G for the window, d*G for the folded
compressed branch).

B batch, R rows, S keys, K key heads, M queries per row and key head, D key size, V value size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.backends.sdpa.numerics import (
    bmm,
    chunk_elements,
    heads_first,
    operand_dtype,
)
from nsa.core import flops
from nsa.core.dtypes import NEG_INF, accumulation_dtype
from nsa.core.operators import define_attention


class SlidingWindow(NamedTuple):
    """Which keys a row sees."""

    width: int
    """Keys per row at most, the row's own included."""
    first_row: int = 0
    """The number of q's first row (decode); keys are numbered from 0."""
    row_seq: Tensor | None = None
    """int64 ``[R]``, the sequence of each row when packed; keys are numbered like rows."""


class Chunk(NamedTuple):
    """Rows ``[row, row_end)`` and the keys ``[key, key_end)`` that any of them sees."""

    row: int
    row_end: int
    key: int
    key_end: int
    hidden: Tensor
    """bool ``[rows, 1, keys]``, True where the row does not see the key."""


def chunks(
    rows: int,
    window: SlidingWindow,
    per_row: int,
    device: torch.device,
    stretch: int = 1,
) -> Iterator[Chunk]:
    """Cuts the rows so that a chunk's scores fit; ``per_row`` is B*K*M.

    ``stretch`` allows that many times more scores, for steps whose cost is in the calls.
    """
    budget = max(1, stretch * chunk_elements(device) // max(1, per_row))
    row_end = 0
    while row_end < rows:
        row = row_end
        reach = min(window.width, window.first_row + row + 1)
        # rows * (rows + reach) scores a chunk
        size = max(1, int(((reach * reach + 4 * budget) ** 0.5 - reach) / 2))
        size = min(size, max(64, window.width // 2))  # more would be scores that the window hides
        row_end = min(row + size, rows)
        first, last = window.first_row + row, window.first_row + row_end - 1
        key, key_end = max(0, first - window.width + 1), last + 1
        r = torch.arange(first, last + 1, device=device)[:, None]
        s = torch.arange(key, key_end, device=device)
        hidden = (s > r) | (s <= r - window.width)
        if window.row_seq is not None:
            hidden |= window.row_seq[row:row_end, None] != window.row_seq[key:key_end]
        yield Chunk(row, row_end, key, key_end, hidden[:, None])


def _scores(q: Tensor, k: Tensor, chunk: Chunk, M: int, scale: float) -> Tensor:
    """``[B*K, rows*M, keys]``, −inf where hidden."""
    scores = bmm(q[:, chunk.row * M : chunk.row_end * M], k[:, chunk.key : chunk.key_end].mT)
    scores.mul_(scale)
    shape = (scores.shape[0], chunk.row_end - chunk.row, M, chunk.key_end - chunk.key)
    scores.view(shape).masked_fill_(chunk.hidden, NEG_INF)
    return scores


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_seq: Tensor | None,
    width: int,
    first_row: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    window = SlidingWindow(width, first_row, row_seq)
    B, R, K, M, _ = q.shape
    V = v.shape[-1]
    dtype = operand_dtype(q)
    q_rows, k_rows, v_rows = _rows(q, dtype), heads_first(k, dtype), heads_first(v, dtype)
    out = q.new_empty(B * K, R * M, V)
    lse = q.new_empty(B * K, R * M, dtype=accumulation_dtype(q.dtype))
    for chunk in chunks(R, window, B * K * M, q.device):
        here = slice(chunk.row * M, chunk.row_end * M)
        p = _scores(q_rows, k_rows, chunk, M, scale)
        m_i = p.amax(-1, keepdim=True)
        p.sub_(m_i).exp_()
        l_i = p.sum(-1, keepdim=True)
        weighted = bmm(p.to(dtype), v_rows[:, chunk.key : chunk.key_end])
        out[:, here] = weighted.div_(l_i)
        lse[:, here] = l_i.log_().add_(m_i)[..., 0]
    return out.view(B, K, R, M, V).transpose(1, 2), lse.view(B, K, R, M).transpose(1, 2)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, row_seq: Tensor | None, *sizes: object
) -> tuple[Tensor, Tensor]:
    B, R, K, M, _ = q.shape
    out = q.new_empty(B, K, R, M, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(B, K, R, M, dtype=accumulation_dtype(q)).transpose(1, 2)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    row_seq: Tensor | None,
    width: int,
    first_row: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    window = SlidingWindow(width, first_row, row_seq)
    B, R, K, M, D = q.shape
    S, V = v.shape[1], v.shape[-1]
    dtype = operand_dtype(q)
    q_rows, k_rows, v_rows = _rows(q, dtype), heads_first(k, dtype), heads_first(v, dtype)
    dout_rows = _rows(dout, dtype)
    delta = (dout.to(lse.dtype) * out).sum(-1).transpose(1, 2).reshape(B * K, R * M, 1)
    lse_rows = lse.transpose(1, 2).reshape(B * K, R * M, 1)
    dq = torch.zeros_like(q_rows, dtype=lse.dtype)
    dk = torch.zeros_like(k_rows, dtype=lse.dtype)
    dv = torch.zeros_like(v_rows, dtype=lse.dtype)
    for chunk in chunks(R, window, B * K * M, q.device):
        rows = slice(chunk.row * M, chunk.row_end * M)
        keys = slice(chunk.key, chunk.key_end)
        p = _scores(q_rows, k_rows, chunk, M, scale).sub_(lse_rows[:, rows]).exp_()
        dv[:, keys] += bmm(p.to(dtype).mT, dout_rows[:, rows])
        ds = bmm(dout_rows[:, rows], v_rows[:, keys].mT).sub_(delta[:, rows])
        ds = ds.mul_(p).mul_(scale).to(dtype)
        dq[:, rows] = bmm(ds, k_rows[:, keys])
        dk[:, keys] += bmm(ds.mT, q_rows[:, rows])
    return (
        dq.view(B, K, R, M, D).transpose(1, 2).to(q.dtype).contiguous(),
        dk.view(B, K, S, D).transpose(1, 2).to(k.dtype).contiguous(),
        dv.view(B, K, S, V).transpose(1, 2).to(v.dtype).contiguous(),
    )


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, R, K, M, D]`` -> contiguous ``[B*K, R*M, D]``."""
    B, R, K, M, D = x.shape
    x = x.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)
    return x.reshape(B * K, R * M, D)


def _pairs(x: flops.Arguments) -> int:
    B, R, K, M, _ = x["q"]
    return B * K * M * flops.window_pairs(R, x["width"], x["first_row"])


_WINDOW = define_attention(
    "band",
    "Tensor? row_seq, SymInt width, SymInt first_row, float scale",
    _forward,
    _backward,
    _pairs,
    fake=_forward_fake,
)


def sliding_window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: SlidingWindow, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each row over its window.

    q ``[B, R, K, M, D]``, k ``[B, S, K, D]``, v ``[B, S, K, V]`` -> out ``[B, R, K, M, V]``,
    lse ``[B, R, K, M]``.
    """
    return _WINDOW(q, k, v, window.row_seq, window.width, window.first_row, scale)
