"""φ: turns each block of keys or values into one (paper §3.2.1, Eq. 7).

A new φ is one class and one row of :data:`PHI`, beside its oracle in ``nsa/reference`` and its name
in :data:`nsa.config.Compression`.

B batch, T tokens, N compressed blocks, K key/value heads, D head size, L tokens of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsa.config import NSAConfig
from nsa.core.block_tokens.op import block_means, block_tokens
from nsa.core.build import backward, on_meta
from nsa.core.linear import is_unhooked, is_unmodified


class Compress(nn.Module):
    """φ for keys or for values; one set of weights, shared by the heads.

    Args:
        config: ``compress_block`` and ``compress_stride``.
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
        self.build(config.compress_block, head_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def build(self, block: int, head_dim: int, **factory: Any) -> None:
        """Make the parameters for blocks of so many tokens; none here."""

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for module in self.children():
            if isinstance(module, nn.Linear):  # not what a user has wrapped one in
                module.reset_parameters()

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Compress keys or values.

        Args:
            x: ``[B, T, K, D]``, RoPE already applied to keys.
            cu_seqlens: int32 ``[n_seq + 1]`` for packed input (B is 1), else None.

        Returns:
            ``[B, N, K, D]``; packed, N is ``T // d``, and rows past the last block mean nothing.
        """
        raise NotImplementedError


class MeanCompress(Compress):
    """The mean of a block's tokens; no parameters."""

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """See :meth:`Compress.forward`."""
        return block_means(x, self.config, cu_seqlens)


class LinearCompress(Compress):
    """One linear layer over a block's tokens."""

    def build(self, block: int, head_dim: int, **factory: Any) -> None:
        """Make the layer."""
        self.proj = nn.Linear(block * head_dim, head_dim, **factory)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """See :meth:`Compress.forward`."""
        blocks_BNKLD = block_tokens(x, self.config, cu_seqlens)
        return self.proj(blocks_BNKLD.flatten(3))


class MLPCompress(Compress):
    """The paper's: a learned intra-block position embedding, then two layers with GELU."""

    def build(self, block: int, head_dim: int, **factory: Any) -> None:
        """Make the embedding and the layers."""
        self.position = nn.Parameter(torch.empty(block, head_dim, **factory))
        self.up = nn.Linear(block * head_dim, 2 * head_dim, **factory)
        self.down = nn.Linear(2 * head_dim, head_dim, **factory)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.normal_(self.position, std=0.02)
        super().reset_parameters()

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """See :meth:`Compress.forward`."""
        blocks_BNKLD = block_tokens(x, self.config, cu_seqlens)
        position = self.position.to(x.dtype)
        if not is_unmodified(self.up):
            return self.down(F.gelu(self.up((blocks_BNKLD + position).flatten(3))))
        # the same without a sum as large as all blocks
        bias = self.up(position.flatten())
        hidden = F.linear(blocks_BNKLD.flatten(3), self.up.weight, bias)
        return self.down(F.gelu(hidden))

    def is_unmodified(self) -> bool:
        """Whether calling it is two products with biases and a GELU, and no more."""
        return (
            type(self) is MLPCompress
            and is_unhooked(self)
            and type(self.position) in (nn.Parameter, Tensor)
            and all(is_unmodified(x) and x.bias is not None for x in (self.up, self.down))
        )


PHI: Mapping[str, type[Compress]] = {
    "mlp": MLPCompress,
    "linear": LinearCompress,
    "mean": MeanCompress,
}
"""By the name that ``NSAConfig.compression`` gives."""


def compress_both(
    phi_k: Compress, phi_v: Compress, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """φ of keys and of values, ``[B, T, K, D]`` and ``[B, T, K, V]``; as :meth:`Compress.forward`.

    Blocks are few, so that launches are most of the work on a GPU: both go through batched products
    where nothing stands against it.
    """
    if (
        isinstance(phi_k, MLPCompress)
        and isinstance(phi_v, MLPCompress)
        and can_batch(phi_k, phi_v, k, v)
    ):
        return _batched(phi_k, phi_v, k, v, cu_seqlens)
    return phi_k(k, cu_seqlens), phi_v(v, cu_seqlens)


def can_batch(phi_k: MLPCompress, phi_v: MLPCompress, k: Tensor, v: Tensor) -> bool:
    """Whether batched products of keys and values pay, and compute the same."""
    alike = k.shape[3] == v.shape[3] and k.dtype == v.dtype
    return batching_pays(k) and alike and phi_k.is_unmodified() and phi_v.is_unmodified()


def batching_pays(x: Tensor) -> bool:
    """On a GPU, where the products are too small to fill it."""
    return x.is_cuda


def _batched(
    phi_k: MLPCompress, phi_v: MLPCompress, k: Tensor, v: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    blocks_BNKLD = block_tokens(torch.cat([k, v]), phi_k.config, cu_seqlens)
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


def rehearse_compression(
    x: Tensor, config: NSAConfig, cu_seqlens: Tensor | None, *, grad: bool
) -> Tensor:
    """Launch this library's kernels of φ and of its backward for x ``[B, T, K, D]``, a meta tensor;
    the result stands for φ's, ``[B, N, K, D]``."""
    x = on_meta(x, grad=grad)
    launch = block_means if config.compression == "mean" else block_tokens
    blocks = launch(x, config, cu_seqlens)
    if grad:
        backward(blocks)
    shape = (*blocks.shape[:3], x.shape[3])
    return x.new_empty(shape).requires_grad_(grad)
