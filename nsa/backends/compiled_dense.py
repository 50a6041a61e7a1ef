"""The best dense causal kernel for the folded compressed branch.

B batch, R rows (as many as keys), K key/value heads, M queries of a row and key head, D key size,
V value size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.backends.dense import causal_attention

_CUDNN_HEAD = 128
"""The largest head whose backward cuDNN has on every GPU from sm80 on."""


def takes_dense(q: Tensor, v: Tensor, keys: int) -> bool:
    """Whether :func:`dense_attention` has a kernel for q ``[…, D]``, v ``[…, V]`` and N keys."""
    return q.device.type == "cpu" or (keys > 1 and takes_cudnn(q, v))  # cuDNN refuses one


def takes_cudnn(q: Tensor, v: Tensor) -> bool:
    """Whether cuDNN's attention computes it, forward and backward."""
    sizes = q.shape[-1], v.shape[-1]
    return (
        q.is_cuda
        and torch.version.hip is None
        and q.dtype in (torch.float16, torch.bfloat16)
        and all(size % 8 == 0 and size <= _CUDNN_HEAD for size in sizes)
    )


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of R rows over R keys.

    Args:
        q: ``[B, R, K, M, D]``; k: ``[B, R, K, D]``; v: ``[B, R, K, V]``.

    Returns:
        out ``[B, R, K, M, V]`` and the natural log-sum-exp ``[B, R, K, M]``, detached.
    """
    B, R, K, M, D = q.shape
    V = v.shape[-1]
    if takes_cudnn(q, v):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q.reshape(B, R, K * M, D).transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            None,
            True,
            0.0,
            True,
            False,
            scale=scale,
        )
        out = out.transpose(1, 2).reshape(B, R, K, M, V)
        return out, lse.view(B, K * M, R).transpose(1, 2).reshape(B, R, K, M).detach()
    out, lse = causal_attention(
        q.permute(0, 2, 3, 1, 4).reshape(B * K, M, R, D),
        k.transpose(1, 2).reshape(B * K, R, D),
        v.transpose(1, 2).reshape(B * K, R, V),
        scale,
    )
    out = out.view(B, K, M, R, V).permute(0, 3, 1, 2, 4)
    return out, lse.reshape(B, K, M, R).permute(0, 3, 1, 2)
