"""The steps of the FlashAttention-2 backends, bound to a provider.

B batch, T query tokens, S key tokens, N compressed blocks, H query heads, K key/value heads,
D key size, V value size. The step signature is the one of :mod:`nsa.backends.protocol`; selection
itself is looked up in the table (``per_branch["select"]``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from nsa.backends.fa2.calls import Call
from nsa.backends.fa2.op import flash_attention
from nsa.backends.fa2.selected import selected_attention
from nsa.backends.shared.fold_queries import fold, make_fold, nothing_seen, unfold
from nsa.backends.shared.workspace import Store
from nsa.config import NSAConfig
from nsa.core.dtypes import NEG_INF, accumulation_dtype
from nsa.core.packing import block_offsets
from nsa.core.padding import pad_heads


@dataclass(frozen=True)
class Steps:
    """FlashAttention-2 on regular batches, or packed ones where ``cu_seqlens`` is given."""

    source: str
    """The name of the provider, or "auto"."""
    store: Store = field(default_factory=Store)
    """Where the selected branch packs."""

    def compressed_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        config: NSAConfig,
        cu_seqlens: Tensor | None = None,
        *,
        max_seqlen: int | None = None,
        q_start: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Folded into causal attention of blocks over blocks."""
        T, N, K, V = q.shape[1], k.shape[1], k.shape[2], v.shape[3]
        shape = make_fold(T, N, config, cu_seqlens, q_start)
        if cu_seqlens is None and (shape.rows == 0 or N == 0):
            return nothing_seen(q, k, v, accumulation_dtype(q))
        rows = fold(q, cu_seqlens, N, K, config, q_start)
        if shape.real is not None:  # surplus rows are neither read nor written
            real = shape.real[:, None, None]
            k, v = k.where(real, 0.0), v.where(real, 0.0)
            rows = rows.where(real[..., None], 0.0)
        B, R, _, M, _ = rows.shape
        if cu_seqlens is None:
            k, v = k[:, : shape.first_row + R], v[:, : shape.first_row + R]
            call = Call(scale=config.softmax_scale, causal=True, max_q=R, max_k=k.shape[1])
        else:
            cu = block_offsets(cu_seqlens, config).to(cu_seqlens.dtype)
            longest = config.num_compressed(T if max_seqlen is None else max_seqlen)
            longest = max(1, min(longest, N))
            call = Call(
                scale=config.softmax_scale,
                causal=True,
                cu_q=cu,
                cu_k=cu,
                max_q=longest,
                max_k=longest,
            )
        out, lse = self._attend(rows.flatten(2, 3), k, v, call)
        out, lse = out.unflatten(2, (K, M)), lse.unflatten(2, (K, M))[..., None]
        out = unfold(out, cu_seqlens, T, N, config, q_start, 0.0)
        lse = unfold(lse, cu_seqlens, T, N, config, q_start, NEG_INF)[..., 0]
        return out[..., :V], lse

    def selected_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_idx: Tensor,
        config: NSAConfig,
        cu_seqlens: Tensor | None = None,
        *,
        max_seqlen: int | None = None,
        q_start: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """The own block causally, earlier ones in tiles, merged by log-sum-exp."""
        V = v.shape[3]
        q, k, v = pad_heads(q, k, v, multiple=8, equal=True)
        if q.numel() == 0:
            return _nothing(q, k, v, V)
        out, lse = selected_attention(
            q, k, v, block_idx, config, cu_seqlens, q_start, self.source, self.store
        )
        return out[..., :V], lse

    def window_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        config: NSAConfig,
        cu_seqlens: Tensor | None = None,
        *,
        max_seqlen: int | None = None,
        q_start: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """FA-2's sliding window."""
        T = q.shape[1]
        if cu_seqlens is None:
            k, v = k[:, : q_start + T], v[:, : q_start + T]
            max_q, max_k = T, k.shape[1]
        else:
            max_q = max_k = T if max_seqlen is None else max_seqlen
        call = Call(
            scale=config.softmax_scale,
            causal=True,
            window=config.window,
            cu_q=cu_seqlens,
            cu_k=cu_seqlens,
            max_q=max_q,
            max_k=max_k,
        )
        return self._attend(q, k, v, call)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        V = v.shape[3]
        q, k, v = pad_heads(q, k, v, multiple=8, equal=True)
        if q.numel() == 0:
            return _nothing(q, k, v, V)
        if call.cu_q is not None:
            out, lse = flash_attention(q[0], k[0], v[0], call, self.source)
            return out[None, ..., :V], lse[None]
        out, lse = flash_attention(q, k, v, call, self.source)
        return out[..., :V], lse


def _nothing(q: Tensor, k: Tensor, v: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """The result for no rows, through which gradients (of nothing) still flow."""
    out = q[..., :V] + 0 * (k.sum() + v.sum())
    return out, q.detach().sum(-1).to(accumulation_dtype(q))
