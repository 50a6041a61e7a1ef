"""The compressed branch of ``compiled`` on a CPU: folded (:mod:`.fold`), by PyTorch's own kernel.

B batch, R rows (as many as keys), K key/value heads, M queries of a row and key head, D key size,
V value size.
"""

from __future__ import annotations

from torch import Tensor

from nsa.backends import load
from nsa.backends.dense import causal_attention
from nsa.backends.fold import fold, make_fold, nothing_seen, unfold
from nsa.config import NSAConfig
from nsa.operators import lse_dtype


def folded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    q_start: int,
) -> tuple[Tensor, Tensor]:
    """See :class:`nsa.backends.contract.Backend`; ``sdpa`` takes packed batches and decode."""
    T, N, K = q.shape[1], k.shape[1], k.shape[2]
    if cu_seqlens is None:
        shape = make_fold(T, N, config, None, q_start)
        if shape.rows == 0 or N == 0:
            return nothing_seen(q, k, v, lse_dtype(q))
        if shape.rows == N and shape.first_row == 0:
            rows = fold(q, None, N, K, config, q_start)
            out, lse = _causal(rows, k, v, config.softmax_scale)
            out = unfold(out, None, T, N, config, q_start, 0.0)
            lse = unfold(lse[..., None], None, T, N, config, q_start, float("-inf"))
            return out, lse[..., 0]
    step = load("sdpa").compressed_attention
    return step(q, k, v, config, cu_seqlens, max_seqlen=max_seqlen, q_start=q_start)


def _causal(rows: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """rows ``[B, R, K, M, D]``, k and v ``[B, R, K, …]`` -> out ``[B, R, K, M, V]`` and lse."""
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
