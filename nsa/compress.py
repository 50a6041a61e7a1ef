"""φ: turns each block of keys or values into one (paper §3.2.1, Eq. 7).

B batch, T tokens, N compressed blocks, K key/value heads, D head size, L tokens of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsa.config import NSAConfig
from nsa.varlen import compressed_members


def block_tokens(x: Tensor, config: NSAConfig, cu_seqlens: Tensor | None = None) -> Tensor:
    """The tokens of every compressed block.

    Args:
        x: ``[B, T, K, D]``.
        cu_seqlens: int32 ``[n_seq + 1]`` for packed input (B is 1), else None.

    Returns:
        ``[B, N, K, L, D]``; packed, N is ``T // d``, and rows past the last block hold tokens
        that mean nothing.
    """
    length, block, stride = x.shape[1], config.compress_block, config.compress_stride
    if cu_seqlens is None:
        if length >= block:
            return x.unfold(1, block, stride).transpose(3, 4)
        return x[:, :0, :, None].expand(-1, -1, -1, block, -1)
    rows = compressed_members(cu_seqlens, length // stride, config)
    first = cu_seqlens.long()[rows.seq] + rows.rank * stride
    token = first[:, None] + torch.arange(block, device=x.device)
    return x[:, token.clamp_max(length - 1)].transpose(2, 3)


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

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Compresses keys or values.

        Args:
            x: ``[B, T, K, D]``, RoPE already applied to keys.
            cu_seqlens: int32 ``[n_seq + 1]`` for packed input (B is 1), else None.

        Returns:
            ``[B, N, K, D]``; packed, N is ``T // d``, and rows past the last block mean nothing.
        """
        blocks_BNKLD = block_tokens(x, self.config, cu_seqlens)
        if self.config.compression == "mean":
            return blocks_BNKLD.mean(dim=3)
        if self.config.compression == "linear":
            return self.proj(blocks_BNKLD.flatten(3))
        flat = (blocks_BNKLD + self.position.to(x.dtype)).flatten(3)
        return self.down(F.gelu(self.up(flat)))
