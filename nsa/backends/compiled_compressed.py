"""The compressed branch of ``compiled``: one operator, ``nsa::compressed_attention``.

Few keys: the window's kernel, with keys that stand d tokens apart (:mod:`nsa.kernels.window`); it
reads queries where they are. Many keys: folded (:mod:`.fold`), which costs copies, and given to
cuDNN, whose kernel is the faster one then. Which of them follows from the shapes when it runs, so
that a trace has one graph for both.

B batch, T tokens, N compressed blocks, R folded rows, H query heads, K key/value heads, M queries
of a row and key head, D key size, V value size.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from nsa.backends.dense import causal_attention
from nsa.backends.fold import Fold, fold_rows, make_fold, unfold_rows
from nsa.config import NSAConfig
from nsa.operators import define, lse_dtype
from nsa.varlen import compressed_members, token_members

CUDNN_FROM = 2048
"""Keys from which cuDNN on folded queries is faster than the project's own kernel (H100)."""
_CUDNN_HEAD = 128
"""The largest head whose backward cuDNN has on every GPU from sm80 on."""


def packed_blocks(
    cu_seqlens: Tensor, T: int, N: int, config: NSAConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the queries and the compressed blocks of packed sequences stand.

    Returns:
        start, int32 ``[T]``: the first compressed block of each token's sequence; first, int32
        ``[T]``: the first token of it; seen_from, int32 ``[N]``: the first token that sees each
        block, T for a surplus one.
    """
    token, row = token_members(cu_seqlens, T), compressed_members(cu_seqlens, N, config)
    real = row.seq < cu_seqlens.numel() - 1
    last = cu_seqlens.long()[row.seq] + row.rank * config.compress_stride
    seen_from = (last + config.compress_block - 1).where(real, T)
    return (
        row.starts[token.seq].to(torch.int32),
        token.starts[token.seq].to(torch.int32),
        seen_from.to(torch.int32),
    )


def takes_cudnn(q: Tensor, v: Tensor) -> bool:
    """Whether cuDNN's attention computes it, forward and backward."""
    sizes = q.shape[-1], v.shape[-1]
    return (
        q.is_cuda
        and torch.version.hip is None
        and q.dtype in (torch.float16, torch.bfloat16)
        and all(size % 8 == 0 and size <= _CUDNN_HEAD for size in sizes)
    )


def _folds(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, q_start: int) -> bool:
    regular = start is None and q_start == 0
    return regular and k.shape[1] >= CUDNN_FROM and takes_cudnn(q, v)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    first: Tensor | None,
    seen_from: Tensor | None,
    block: int,
    stride: int,
    scale: float,
    q_start: int,
) -> tuple[Tensor, Tensor]:
    if not _folds(q, k, v, start, q_start):
        kernels = importlib.import_module("nsa.kernels.window")
        blocks = kernels.Blocks(block, stride, first, seen_from)
        window = max(1, k.shape[1])
        return kernels.window_forward(
            q, k, v, window=window, start=start, scale=scale, q_start=q_start, blocks=blocks
        )
    T, K, shape = q.shape[1], k.shape[2], _shape(q, k, block, stride)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *_heads_first(fold_rows(q, shape, K), k, v), None, True, 0.0, True, False, scale=scale
    )
    B, R, M = q.shape[0], shape.rows, stride * (q.shape[2] // K)
    out = out.transpose(1, 2).unflatten(2, (K, M))
    lse = lse.view(B, K, M, R).permute(0, 3, 1, 2)[..., None]
    out = unfold_rows(out, shape, T, 0.0)
    return out, unfold_rows(lse, shape, T, float("-inf"))[..., 0]


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Tensor | None,
    first: Tensor | None,
    seen_from: Tensor | None,
    block: int,
    stride: int,
    scale: float,
    q_start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _folds(q, k, v, start, q_start):
        kernels = importlib.import_module("nsa.kernels.window")
        blocks = kernels.Blocks(block, stride, first, seen_from)
        saved = (dout, q, k, v, out, lse)
        window = max(1, k.shape[1])
        return kernels.window_backward(
            *saved, window=window, start=start, scale=scale, q_start=q_start, blocks=blocks
        )
    T, K, shape = q.shape[1], k.shape[2], _shape(q, k, block, stride)
    rows, k_heads, v_heads = _heads_first(fold_rows(q, shape, K), k, v)
    folded = (fold_rows(x, shape, K).flatten(2, 3).transpose(1, 2) for x in (dout, out))
    lse = fold_rows(lse[..., None], shape, K).flatten(2, 3).transpose(1, 2).contiguous()
    none = torch.zeros((), dtype=torch.int64, device=q.device)  # of a dropout that is not
    drows, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        next(folded),
        rows,
        k_heads,
        v_heads,
        next(folded),
        lse,
        none,
        none,
        None,
        None,
        None,
        shape.rows,
        shape.rows,
        0.0,
        True,
        scale=scale,
    )
    M = stride * (q.shape[2] // K)
    dq = unfold_rows(drows.transpose(1, 2).unflatten(2, (K, M)), shape, T, 0.0)
    return dq, dk.transpose(1, 2).contiguous(), dv.transpose(1, 2).contiguous()


def _shape(q: Tensor, k: Tensor, block: int, stride: int) -> Fold:
    config = NSAConfig(compress_block=block, compress_stride=stride, select_block=block)
    return make_fold(q.shape[1], k.shape[1], config, None)


def _heads_first(rows: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows ``[B, R, K, M, D]``, k, v ``[B, R, K, …]`` as cuDNN has them: ``[B, heads, R, …]``."""
    return rows.flatten(2, 3).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _like_inputs(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Any:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _like_output(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=lse_dtype(q))


_CALL = (
    "Tensor? start, Tensor? first, Tensor? seen_from, int block, int stride, float scale, "
    "SymInt q_start"
)
_BACKWARD = define(
    "compressed_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_CALL}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _like_inputs,
)
compressed_op = define(
    f"compressed_attention(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor)",
    _forward,
    _like_output,
    saved=lambda inputs, outputs: (*inputs[:3], *outputs, *inputs[3:6]),
    gradients=lambda kept, saved, dout: (_BACKWARD(dout, *saved, *kept[6:])) + (None,) * 7,
)
"""``(q [B, T, H, D], k [B, N, K, D], v [B, N, K, V], start, first, seen_from (see
:func:`packed_blocks`) or None, l, d, scale, q_start) -> out [B, T, H, V], lse [B, T, H]``."""


def causal_on_a_cpu(rows: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of R folded rows over R keys by PyTorch's CPU kernel.

    Args:
        rows: ``[B, R, K, M, D]``; k: ``[B, R, K, D]``; v: ``[B, R, K, V]``.

    Returns:
        out ``[B, R, K, M, V]`` and the natural log-sum-exp ``[B, R, K, M]``, detached.
    """
    B, R, K, M, D = rows.shape
    V = v.shape[-1]
    out, lse = causal_attention(
        rows.permute(0, 2, 3, 1, 4).reshape(B * K, M, R, D),
        k.transpose(1, 2).reshape(B * K, R, D),
        v.transpose(1, 2).reshape(B * K, R, V),
        scale,
    )
    out = out.view(B, K, M, R, V).permute(0, 3, 1, 2, 4)
    return out, lse.reshape(B, K, M, R).permute(0, 3, 1, 2)
