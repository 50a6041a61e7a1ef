"""PyTorch's fused causal attention with its log-sum-exp, where there is a kernel for the problem.

``scaled_dot_product_attention`` does not return the log-sum-exp that selection needs; the operators
it dispatches to do, and carry its gradients.

X batch, M query heads on one key head, N rows and keys, D key size, V value size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.core.padding import pad_heads

_FLASH_ALIGNMENT = 8
_EFFICIENT_ALIGNMENT = {torch.float32: 4, torch.float16: 8, torch.bfloat16: 8}


def has_kernel(q: Tensor, scale: float) -> bool:
    """Whether :func:`causal_attention` has a fused kernel for this device, dtype and scale."""
    if scale <= 0:  # they mask, and take the maximum, before they scale
        return False
    if q.device.type == "cpu":
        return q.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if q.is_cuda and torch.version.hip is None:
        return q.dtype in _EFFICIENT_ALIGNMENT
    return False


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of N rows over N keys.

    Args:
        q: ``[X, M, N, D]``; k: ``[X, N, D]``; v: ``[X, N, V]``; N at least 1.

    Returns:
        out ``[X, M, N, V]`` in q's dtype and the natural log-sum-exp ``[X, M, N]``, detached.
    """
    M, N, value_dim = q.shape[1], q.shape[2], v.shape[-1]
    dtype = q.dtype
    k = k[:, None].expand(-1, M, -1, -1)
    v = v[:, None].expand(-1, M, -1, -1)
    if q.device.type == "cpu":
        if dtype in (torch.float16, torch.bfloat16):
            # the gradients of the M copies of a key are rounded before they are summed
            q, k, v = q.float(), k.float(), v.float()
        q, k, v = pad_heads(q, k, v, multiple=1, equal=True)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, True, scale=scale
        )
    elif q.dtype != torch.float32 and max(q.shape[-1], value_dim) <= 256:
        q, k, v = pad_heads(q, k, v, multiple=_FLASH_ALIGNMENT, equal=True)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, True, False, scale=scale
        )
    else:
        q, k, v = pad_heads(q, k, v, multiple=_EFFICIENT_ALIGNMENT[q.dtype])
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, True, scale=scale
        )
    return out[..., :value_dim].to(dtype), lse[..., :N].detach()
