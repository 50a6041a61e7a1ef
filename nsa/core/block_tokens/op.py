"""The tokens of every compressed block, copied or averaged, as operators of ``torch.library``.

B batch, T tokens, N compressed blocks, K key/value heads, D head size, L tokens of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.core.dtypes import accumulation_dtype
from nsa.core.operators import config_of, define
from nsa.core.packing import block_offsets, packed_blocks
from nsa.core.toolchain import has_triton

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def block_tokens(x: Tensor, config: NSAConfig, cu_seqlens: Tensor | None = None) -> Tensor:
    """Copy the tokens of every compressed block.

    Args:
        x: ``[B, T, K, D]``.
        cu_seqlens: int32 ``[n_seq + 1]`` for packed input (B is 1), else None.

    Returns:
        ``[B, N, K, L, D]``; packed, N is ``T // d``, and rows past the last block hold tokens
        that mean nothing; they pass no gradient on.
    """
    # the number of rows is no view's size: a trace would tell T = l and T > l apart
    return _TOKENS(x, cu_seqlens, config.key)


def block_means(x: Tensor, config: NSAConfig, cu_seqlens: Tensor | None = None) -> Tensor:
    """Average the tokens of every compressed block, ``[B, T, K, D]`` -> ``[B, N, K, D]``.

    Rows and arguments as of :func:`block_tokens`; sums are fp32 (fp64 for fp64). An operator, since
    Inductor of torch 2.11 fails on a mean over blocks whose number is symbolic.
    """
    return _MEANS(x, cu_seqlens, config.key)


def num_rows(length: int, config: NSAConfig, *, packed: bool) -> int:
    """Rows N that φ makes of ``length`` tokens; enough for any packing of them."""
    return length // config.compress_stride if packed else config.num_compressed(length)


def _first_tokens(x: Tensor, cu_seqlens: Tensor, config: NSAConfig) -> tuple[Tensor, Tensor]:
    """int64 ``[N]``, the first token of each row's block, and bool ``[N]``, whether it exists."""
    rows = packed_blocks(cu_seqlens, x.shape[1] // config.compress_stride, config)
    real = rows.seq_id < cu_seqlens.numel() - 1
    return cu_seqlens.long()[rows.seq_id] + rows.position * config.compress_stride, real


def _windows(x: Tensor, cu_seqlens: Tensor | None, config: NSAConfig) -> Tensor:
    """``[B, N, K, L, D]``, a view where x is regular."""
    block = config.compress_block
    if num_rows(x.shape[1], config, packed=cu_seqlens is not None) == 0:
        return x.new_empty(x.shape[0], 0, x.shape[2], block, x.shape[3])
    if cu_seqlens is None:
        return x.unfold(1, block, config.compress_stride).transpose(3, 4)
    first, _ = _first_tokens(x, cu_seqlens, config)
    token = first[:, None] + torch.arange(block, device=x.device)
    return x[:, token.clamp_max(x.shape[1] - 1)].transpose(2, 3)


def _gather(x: Tensor, cu_seqlens: Tensor | None, key: str) -> Tensor:
    # an operator returns no view
    return _windows(x, cu_seqlens, config_of(key)).clone(memory_format=torch.contiguous_format)


def _mean(x: Tensor, cu_seqlens: Tensor | None, key: str) -> Tensor:
    blocks = _windows(x, cu_seqlens, config_of(key))
    return blocks.mean(3, dtype=accumulation_dtype(x)).to(x.dtype)


def _scatter(grad: Tensor, cu_seqlens: Tensor | None, T: int, key: str) -> Tensor:
    """Each token's sum over the blocks that hold it, one part of ``stride`` tokens at a time.

    Within a part no token is held twice, so the sum has one order.
    """
    config = config_of(key)
    stride = config.compress_stride
    B, N, K, L, D = grad.shape
    wide = accumulation_dtype(grad)
    total = grad.new_zeros(B, T, K, D, dtype=wide)
    if N == 0:
        return total.to(grad.dtype)
    parts = grad.unflatten(3, (L // stride, stride)).unbind(3)  # [B, N, K, d, D] each
    if cu_seqlens is None:
        for m, part in enumerate(parts):
            tokens = part.transpose(2, 3).reshape(B, N * stride, K, D)
            total[:, m * stride : (m + N) * stride] += tokens
        return total.to(grad.dtype)
    first, real = _first_tokens(total, cu_seqlens, config)
    for m, part in enumerate(parts):
        token = first[:, None] + m * stride + torch.arange(stride, device=grad.device)
        tokens = part.masked_fill(~real[:, None, None, None], 0.0).transpose(2, 3)
        tokens = tokens.reshape(B, N * stride, K, D).to(wide)
        total.index_add_(1, token.flatten().clamp_max(T - 1), tokens)
    return total.to(grad.dtype)


def _mean_backward(grad: Tensor, cu_seqlens: Tensor | None, T: int, key: str) -> Tensor:
    block = config_of(key).compress_block
    shares = grad.to(accumulation_dtype(grad))[:, :, :, None] / block
    return _scatter(shares.expand(-1, -1, -1, block, -1), cu_seqlens, T, key).to(grad.dtype)


def _kernels_take(x: Tensor, rows: int, elements: int) -> bool:
    """Whether the Triton kernels copy so many rows of so many elements."""
    if x.dtype not in _KERNEL_DTYPES or not has_triton():
        return False
    from nsa.core.block_tokens import kernels

    return 0 < rows * elements and rows <= kernels.MOST_ROWS and elements <= kernels.MOST_ELEMENTS


def _gather_cuda(x: Tensor, cu_seqlens: Tensor | None, key: str) -> Tensor:
    """The same copy in one kernel; PyTorch's where that does not take it."""
    config = config_of(key)
    B, T, K, D = x.shape
    N, L = num_rows(T, config, packed=cu_seqlens is not None), config.compress_block
    if not _kernels_take(x, B, N * K * L * D):
        return _gather(x, cu_seqlens, key)
    from nsa.core.block_tokens import kernels

    return kernels.gather(x, L, config.compress_stride, N, _packing(cu_seqlens, config))


def _scatter_cuda(grad: Tensor, cu_seqlens: Tensor | None, T: int, key: str) -> Tensor:
    """The same sums in the same order in one kernel; PyTorch's where that does not take them."""
    if not _kernels_take(grad, grad.shape[0], grad[:1].numel()):
        return _scatter(grad, cu_seqlens, T, key)
    from nsa.core.block_tokens import kernels

    config = config_of(key)
    return kernels.scatter(grad, T, config.compress_stride, _packing(cu_seqlens, config))


def _packing(cu_seqlens: Tensor | None, config: NSAConfig) -> Any:
    """As the kernels take it."""
    if cu_seqlens is None:
        return None
    from nsa.core.block_tokens.kernels import Packing

    return Packing(cu_seqlens.contiguous(), block_offsets(cu_seqlens, config))


def _rows(x: Tensor, cu_seqlens: Tensor | None, key: str) -> int:
    return num_rows(x.shape[1], config_of(key), packed=cu_seqlens is not None)


_BACKWARD_CALL = "(Tensor grad, Tensor? cu_seqlens, SymInt T, str config) -> Tensor"
_CALL = "(Tensor x, Tensor? cu_seqlens, str config) -> Tensor"
_TOKENS_BACKWARD = define(
    f"block_tokens_backward{_BACKWARD_CALL}",
    _scatter,
    lambda grad, cu_seqlens, T, key: grad.new_empty(grad.shape[0], T, grad.shape[2], grad.shape[4]),
    cuda=_scatter_cuda,
)
_TOKENS = define(
    f"block_tokens{_CALL}",
    _gather,
    lambda x, cu_seqlens, key: x.new_empty(
        x.shape[0], _rows(x, cu_seqlens, key), x.shape[2], config_of(key).compress_block, x.shape[3]
    ),
    saved=lambda inputs, outputs: (inputs[1],),
    kept=lambda inputs: (inputs[0].shape[1], inputs[2]),
    gradients=lambda kept, saved, dout: (_TOKENS_BACKWARD(dout, saved[0], *kept), None, None),
    cuda=_gather_cuda,
)
_MEANS_BACKWARD = define(
    f"block_means_backward{_BACKWARD_CALL}",
    _mean_backward,
    lambda grad, cu_seqlens, T, key: grad.new_empty(grad.shape[0], T, grad.shape[2], grad.shape[3]),
)
_MEANS = define(
    f"block_means{_CALL}",
    _mean,
    lambda x, cu_seqlens, key: x.new_empty(
        x.shape[0], _rows(x, cu_seqlens, key), x.shape[2], x.shape[3]
    ),
    saved=lambda inputs, outputs: (inputs[1],),
    kept=lambda inputs: (inputs[0].shape[1], inputs[2]),
    gradients=lambda kept, saved, dout: (_MEANS_BACKWARD(dout, saved[0], *kept), None, None),
)
