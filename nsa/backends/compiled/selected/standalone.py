"""Selected attention alone, without operators or a backend: the face of the package that
``python -m nsa.tools.hub`` builds.

B batch, T tokens, H query heads, K key/value heads, D key size, V value size, n listed blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa.backends.compiled.selected.launch import selected_backward, selected_forward
from nsa.errors import ShapeError

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    *,
    select_block: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention over the tokens of listed blocks (NSA, arXiv 2502.11089, Eq. 11-12).

    Args:
        q: ``[B, T, H, D]``, fp16, bf16 or fp32, on a CUDA device.
        k, v: ``[B, T, K, D]`` and ``[B, T, K, V]``, of q's dtype; K divides H.
        block_idx: int32 ``[B, T, K, n]``, strictly ascending, then −1: block j is the tokens
            ``j * select_block …`` of the query's own sequence. Values are not checked.
        select_block: tokens of a block.
        scale: of the scores; None means ``D ** -0.5``.
        cu_seqlens: int32 ``[n_seq + 1]`` where B is 1 and sequences are packed.

    Returns:
        out ``[B, T, H, V]`` and lse ``[B, T, H]``, fp32, without gradient; 0 and −inf where a query
        sees no token. Gradients of out flow to q, k and v.

    Raises:
        ShapeError: tensors that do not fit together.
    """
    B, T, K, D = k.shape if k.ndim == 4 else (0, 0, 1, 0)
    fits = {
        "q": q.ndim == 4 and (*q.shape[:2], q.shape[3]) == (B, T, D) and q.shape[2] % K == 0,
        "v": v.ndim == 4 and v.shape[:3] == (B, T, K),
        "block_idx": block_idx.ndim == 4 and block_idx.shape[:3] == (B, T, K),
    }
    for name, good in fits.items():
        if not good:
            got = {"q": q, "v": v, "block_idx": block_idx}[name]
            raise ShapeError(
                f"{name}: expected a shape that fits k {list(k.shape)}, got {list(got.shape)}; see "
                "help(selected_attention)"
            )
    if not (q.dtype == k.dtype == v.dtype in _DTYPES and block_idx.dtype == torch.int32):
        raise ShapeError(
            "dtypes: expected q, k and v of one of fp16, bf16, fp32 and block_idx of int32, got "
            f"{[str(x.dtype) for x in (q, k, v, block_idx)]}"
        )
    if cu_seqlens is not None and B != 1:
        raise ShapeError(f"cu_seqlens: expected B = 1, got {B}; put the sequences into one row")
    start = None
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        start = cu_seqlens[:-1].repeat_interleave(lengths, output_size=T).to(torch.int32)
    call = {
        "start": start,
        "select_block": select_block,
        "scale": D**-0.5 if scale is None else scale,
        "sequences": None if cu_seqlens is None else cu_seqlens.numel() - 1,
    }
    out, lse = _Selected.apply(q, k, v, block_idx, call)
    return out, lse


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        *tensors, call = given
        out, lse = selected_forward(*tensors, **call)
        ctx.save_for_backward(*tensors[:3], out, lse, tensors[3])
        ctx.call = call
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        deterministic = torch.are_deterministic_algorithms_enabled()
        grads = selected_backward(dout, *ctx.saved_tensors, **ctx.call, deterministic=deterministic)
        return (*grads, None, None)
