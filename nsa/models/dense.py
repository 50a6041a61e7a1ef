"""Dense causal attention, the layer that NSA is compared with.

Shapes: B batch, T tokens, H query heads, K key/value heads, D key size, V value size.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nsa.config import NSAConfig
from nsa.core.dtypes import accumulation_dtype
from nsa.core.rope import apply_rope
from nsa.core.sharding import active
from nsa.errors import CacheError, ShapeError, show
from nsa.models.dense_cache import DenseLayer


class DenseAttention(nn.Module):
    """Causal grouped-query attention over every earlier token, with one shared K/V projection.

    Heads, head sizes, scale and RoPE come from the NSA configuration, so that a dense model and an
    NSA model differ in nothing but what a query reads.
    """

    def __init__(
        self,
        dim: int,
        config: NSAConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        heads, kv_heads = config.num_heads, config.num_kv_heads

        linear = functools.partial(nn.Linear, bias=False, device=device, dtype=dtype)
        self.q_proj = linear(dim, heads * config.head_dim)
        self.k_proj = linear(dim, kv_heads * config.head_dim)
        self.v_proj = linear(dim, kv_heads * config.dv)
        self.o_proj = linear(heads * config.dv, dim)

    def reset_parameters(self) -> None:
        """Draw the projections anew, as ``nn.Linear`` does."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            projection.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: DenseLayer | None = None,
        counts: list[int] | None = None,
    ) -> Tensor:
        """Attend over a regular batch.

        Args:
            x: ``[B, T, dim]``.
            cu_seqlens, max_seqlen: must be None: packed input needs block-diagonal attention, which
                this layer does not have.
            cache: this layer's of a :class:`nsa.models.DenseCache`, without gradients: x are the
                next tokens of its sequences, which are added to it.
            counts: with a cache, how many of the T tokens, from the left, each sequence has; None:
                all. Rows of the output past them mean nothing.

        Returns:
            ``[B, T, dim]``.

        Raises:
            ShapeError: for packed input, and under :func:`nsa.distributed.context_parallel`.
            CacheError: a cache that does not fit, or has no room.
        """
        if cu_seqlens is not None or max_seqlen is not None:
            raise ShapeError(
                "expected a regular batch [B, T, dim] for dense attention, got packed sequences "
                "(cu_seqlens); unpack them, or use attention='nsa'"
            )
        if active() is not None:
            raise ShapeError(
                "expected attention='nsa' under context_parallel, got dense attention, which sees "
                "this rank's rows alone"
            )
        batch, length, _ = x.shape
        config = self.config
        q_BTHD = self.q_proj(x).view(batch, length, config.num_heads, config.head_dim)
        k_BTKD = self.k_proj(x).view(batch, length, config.num_kv_heads, config.head_dim)
        v_BTKV = self.v_proj(x).view(batch, length, config.num_kv_heads, config.dv)
        angles = None
        if cache is not None:
            _check(cache, x)
            angles = cache.angles(length, accumulation_dtype(x))
        if config.rope_theta is not None:
            q_BTHD = apply_rope(q_BTHD, config.rope_theta, angles)
            k_BTKD = apply_rope(k_BTKD, config.rope_theta, angles)
        if cache is not None:
            out_BTHV = cache.attend(q_BTHD, k_BTKD, v_BTKV, counts)
            return self.o_proj(out_BTHV.flatten(2))
        out_BHTV = F.scaled_dot_product_attention(
            q_BTHD.transpose(1, 2),
            k_BTKD.transpose(1, 2),
            v_BTKV.transpose(1, 2),
            is_causal=True,
            scale=config.softmax_scale,
            enable_gqa=config.group > 1,
        )
        return self.o_proj(out_BHTV.transpose(1, 2).reshape(batch, length, -1))


def _check(layer: object, x: Tensor) -> None:
    if not isinstance(layer, DenseLayer):
        raise CacheError(
            f"cache: expected a layer of a DenseCache (cache.layers[i]), got {show(layer)}"
        )
    if torch.is_grad_enabled():
        raise CacheError(
            "cache: expected torch.no_grad() or torch.inference_mode() around the call"
        )
    sequences, device = layer.cache.batch_size, layer.cache.device
    if (len(x), x.device) != (sequences, device):
        raise CacheError(
            f"cache: expected input of {sequences} sequences on {device}, as it has, got {len(x)} "
            f"on {x.device}"
        )
