"""φ: turns each block of keys or values into one (paper §3.2.1, Eq. 7).

B batch, T tokens, N compressed blocks, K key/value heads, D head size, L tokens of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsa.config import NSAConfig
from nsa.core.linear import is_plain
from nsa.core.operators import define
from nsa.core.packing import compressed_members


def block_tokens(
    x: Tensor, config: NSAConfig, cu_seqlens: Tensor | None = None, *, by: str = ""
) -> Tensor:
    """The tokens of every compressed block.

    Args:
        x: ``[B, T, K, D]``.
        cu_seqlens: int32 ``[n_seq + 1]`` for packed input (B is 1), else None.
        by: the backend that copies, if it has a way of its own (:data:`COPIES`).

    Returns:
        ``[B, N, K, L, D]``; packed, N is ``T // d``, and rows past the last block hold tokens
        that mean nothing; they pass no gradient on.
    """
    # the number of rows is no view's size: a trace would tell T = l and T > l apart
    return _BLOCKS(x, cu_seqlens, config.compress_block, config.compress_stride, by)


def _count(length: int, block: int, stride: int, packed: bool) -> int:
    if packed:
        return length // stride
    return (length - block) // stride + 1 if length >= block else 0


def _first_tokens(x: Tensor, cu_seqlens: Tensor, block: int, stride: int) -> tuple[Tensor, Tensor]:
    """int64 ``[N]``, the first token of each row's block, and bool ``[N]``, whether it exists."""
    rows = compressed_members(
        cu_seqlens,
        x.shape[1] // stride,
        NSAConfig(compress_block=block, compress_stride=stride, select_block=block),
    )
    real = rows.seq < cu_seqlens.numel() - 1
    return cu_seqlens.long()[rows.seq] + rows.rank * stride, real


def _gather(x: Tensor, cu_seqlens: Tensor | None, block: int, stride: int, by: str = "") -> Tensor:
    B, T, K, D = x.shape
    N = _count(T, block, stride, cu_seqlens is not None)
    if N == 0:
        return x.new_empty(B, 0, K, block, D)
    if cu_seqlens is None:
        if by in COPIES and (done := COPIES[by].gather(x, block, stride, N)) is not None:
            return done
        blocks = x.unfold(1, block, stride).transpose(3, 4)
        return blocks.clone(memory_format=torch.contiguous_format)  # an operator returns no view
    first, _ = _first_tokens(x, cu_seqlens, block, stride)
    token = first[:, None] + torch.arange(block, device=x.device)
    return x[:, token.clamp_max(T - 1)].transpose(2, 3).contiguous()


def _scatter(
    grad: Tensor, cu_seqlens: Tensor | None, T: int, block: int, stride: int, by: str = ""
) -> Tensor:
    """Each token's sum over the blocks that hold it, one part of ``stride`` tokens at a time.

    Within a part no token is held twice, so the sum has one order.
    """
    B, N, K, _, D = grad.shape
    if cu_seqlens is None and N > 0 and by in COPIES:
        done = COPIES[by].scatter(grad, T, stride)
        if done is not None:
            return done
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    total = grad.new_zeros(B, T, K, D, dtype=wide)
    if N == 0:
        return total.to(grad.dtype)
    parts = grad.unflatten(3, (block // stride, stride)).unbind(3)  # [B, N, K, d, D] each
    if cu_seqlens is None:
        for m, part in enumerate(parts):
            tokens = part.transpose(2, 3).reshape(B, N * stride, K, D)
            total[:, m * stride : (m + N) * stride] += tokens
        return total.to(grad.dtype)
    first, real = _first_tokens(total, cu_seqlens, block, stride)
    for m, part in enumerate(parts):
        token = first[:, None] + m * stride + torch.arange(stride, device=grad.device)
        tokens = part.masked_fill(~real[:, None, None, None], 0.0).transpose(2, 3)
        tokens = tokens.reshape(B, N * stride, K, D).to(wide)
        total.index_add_(1, token.flatten().clamp_max(T - 1), tokens)
    return total.to(grad.dtype)


class Copies(NamedTuple):
    """A backend's own way to copy the blocks of a regular batch; each may decline with None."""

    gather: Callable[[Tensor, int, int, int], Tensor | None]
    """(x ``[B, T, K, D]``, l, d, N) -> ``[B, N, K, L, D]``"""
    scatter: Callable[[Tensor, int, int], Tensor | None]
    """(gradient of that, T, d) -> ``[B, T, K, D]``, each token's sum over its blocks"""


COPIES: dict[str, Copies] = {}
"""By the name of the backend, which fills it in; PyTorch's own operations for all others."""


_CALL = "Tensor? cu_seqlens, int block, int stride, str by"
_BLOCKS_BACKWARD = define(
    "block_tokens_backward(Tensor grad, Tensor? cu_seqlens, SymInt T, int block, int stride, "
    "str by) -> Tensor",
    _scatter,
    lambda grad, cu_seqlens, T, *rest: grad.new_empty(
        grad.shape[0], T, grad.shape[2], grad.shape[4]
    ),
)
_BLOCKS = define(
    f"block_tokens(Tensor x, {_CALL}) -> Tensor",
    _gather,
    lambda x, cu_seqlens, block, stride, by: x.new_empty(
        x.shape[0],
        _count(x.shape[1], block, stride, cu_seqlens is not None),
        x.shape[2],
        block,
        x.shape[3],
    ),
    saved=lambda inputs, outputs: (inputs[1],),
    kept=lambda inputs: (inputs[0].shape[1], *inputs[2:]),
    gradients=lambda kept, saved, dout: (
        _BLOCKS_BACKWARD(dout, saved[0], *kept),
        None,
        None,
        None,
        None,
    ),
)


class Compress(nn.Module):
    """φ for keys or for values; one set of weights, shared by the heads.

    Args:
        config: ``compression`` picks "mlp" (a learned intra-block position embedding, then two
            layers with GELU), "linear" (one layer) or "mean" (no parameters).
        head_dim: D, the size of the heads it compresses.
    """

    def __init__(
        self,
        config: NSAConfig,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        flat = config.compress_block * head_dim
        if config.compression == "mlp":
            self.position = nn.Parameter(
                torch.empty(config.compress_block, head_dim, device=device, dtype=dtype)
            )
            self.up = nn.Linear(flat, 2 * head_dim, device=device, dtype=dtype)
            self.down = nn.Linear(2 * head_dim, head_dim, device=device, dtype=dtype)
        elif config.compression == "linear":
            self.proj = nn.Linear(flat, head_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        if self.config.compression == "mlp":
            nn.init.normal_(self.position, std=0.02)
            self.up.reset_parameters()
            self.down.reset_parameters()
        elif self.config.compression == "linear":
            self.proj.reset_parameters()

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, *, by: str = "") -> Tensor:
        """Compresses keys or values.

        Args:
            x: ``[B, T, K, D]``, RoPE already applied to keys.
            cu_seqlens: int32 ``[n_seq + 1]`` for packed input (B is 1), else None.
            by: the backend that copies the blocks, see :func:`block_tokens`.

        Returns:
            ``[B, N, K, D]``; packed, N is ``T // d``, and rows past the last block mean nothing.
        """
        blocks_BNKLD = block_tokens(x, self.config, cu_seqlens, by=by)
        if self.config.compression == "mean":
            return blocks_BNKLD.mean(dim=3)
        if self.config.compression == "linear":
            return self.proj(blocks_BNKLD.flatten(3))
        if not is_plain(self.up, bias=True):
            return self.down(F.gelu(self.up((blocks_BNKLD + self.position.to(x.dtype)).flatten(3))))
        # the same without a sum as large as all blocks
        bias = self.up(self.position.to(x.dtype).flatten())
        hidden = F.linear(blocks_BNKLD.flatten(3), self.up.weight, bias)
        return self.down(F.gelu(hidden))

    def _is_plain(self) -> bool:
        """Whether calling it is two products and a GELU, and no more."""
        hooks = (
            self._forward_hooks,
            self._forward_pre_hooks,
            self._backward_hooks,
            self._backward_pre_hooks,
        )
        return (
            type(self) is Compress
            and self.config.compression == "mlp"
            and "forward" not in vars(self)
            and not any(hooks)
            and type(self.position) in (nn.Parameter, Tensor)
            and is_plain(self.up, bias=True)
            and is_plain(self.down, bias=True)
        )


def compress_both(
    phi_k: Compress,
    phi_v: Compress,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    by: str = "",
) -> tuple[Tensor, Tensor]:
    """φ of keys and of values, ``[B, T, K, D]`` and ``[B, T, K, V]``; as :meth:`Compress.forward`.

    Blocks are few, so that launches are most of the work: for a backend that copies in its own way,
    both go through batched products where nothing stands against it.
    """
    alike = k.shape[3] == v.shape[3] and k.dtype == v.dtype
    if not (alike and by in COPIES and phi_k._is_plain() and phi_v._is_plain()):
        return phi_k(k, cu_seqlens, by=by), phi_v(v, cu_seqlens, by=by)
    blocks_BNKLD = block_tokens(torch.cat([k, v]), phi_k.config, cu_seqlens, by=by)
    shape = (k.shape[0], *blocks_BNKLD.shape[1:3])
    size = phi_k.config.compress_block * k.shape[3]
    flat = blocks_BNKLD.reshape(2, shape[0] * shape[1] * shape[2], size)

    up = torch.stack([phi_k.up.weight, phi_v.up.weight]).mT
    up_bias = torch.stack([phi_k.up.bias, phi_v.up.bias])[:, None]
    down = torch.stack([phi_k.down.weight, phi_v.down.weight]).mT
    down_bias = torch.stack([phi_k.down.bias, phi_v.down.bias])[:, None]
    position = torch.stack([phi_k.position, phi_v.position]).to(k.dtype).flatten(1)[:, None]
    hidden = torch.baddbmm(torch.baddbmm(up_bias, position, up), flat, up)
    out = torch.baddbmm(down_bias, F.gelu(hidden), down)
    k_cmp, v_cmp = out.unflatten(1, shape)
    return k_cmp, v_cmp
