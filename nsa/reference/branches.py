"""The three branches: attention over compressed, selected and window keys (paper §3.2–3.3).

B batch, T query tokens, S keys, N compressed blocks, H query heads, K key/value heads,
D key size, V value size. ``max_seqlen`` is accepted because every backend has one signature;
the oracle has no use for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.reference.attend import attend
from nsa.reference.masks import compressed_mask, selected_mask, window_mask
from nsa.reference.packing import spans


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None = None,
    *,
    max_seqlen: int | None = None,
    q_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention over the compressed blocks that end at or before the query (Eq. 7).

    Args:
        q: ``[B, T, H, D]``.
        k, v: φ's output, ``[B, N, K, D]`` and ``[B, N, K, V]``; rows past the last block of a
            packed batch are never read.
        cu_seqlens: int32 ``[n_seq + 1]``, B is 1 then.
        q_start: position of q's first row in its sequence.

    Returns:
        out ``[B, T, H, V]`` and lse ``[B, T, H]``; 0 and −inf where no block is visible.
    """
    if cu_seqlens is not None:
        return _join(
            [
                compressed_attention(q[:, seq.tokens], k[:, seq.blocks], v[:, seq.blocks], config)
                for seq in spans(cu_seqlens, config)
            ]
        )
    mask = compressed_mask(q.shape[1], k.shape[1], config, q_start, q.device)
    return attend(q, k, v, mask, config.softmax_scale)


def selected_attention(
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
    """Attention over the tokens ``s <= t`` of the listed blocks (Eq. 11–12).

    Args:
        q: ``[B, T, H, D]``.
        k, v: ``[B, S, K, D]`` and ``[B, S, K, V]``.
        block_idx: int32 ``[B, T, K, width]``, ascending, then padded with −1; block j covers
            tokens ``j*l' … j*l' + l' - 1`` of the query's own sequence.

    Returns:
        out ``[B, T, H, V]`` and lse ``[B, T, H]``; 0 and −inf where nothing is visible.
    """
    if cu_seqlens is not None:
        parts = []
        for seq in spans(cu_seqlens, config):
            q_seq, k_seq, v_seq = q[:, seq.tokens], k[:, seq.tokens], v[:, seq.tokens]
            blocks = block_idx[:, seq.tokens]
            parts.append(selected_attention(q_seq, k_seq, v_seq, blocks, config))
        return _join(parts)
    mask = selected_mask(block_idx, k.shape[1], config, q_start)
    return attend(q, k, v, mask, config.softmax_scale)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None = None,
    *,
    max_seqlen: int | None = None,
    q_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention over the last ``window`` tokens, the query's own included (§3.3.3).

    Shapes as in :func:`selected_attention`.
    """
    if cu_seqlens is not None:
        return _join(
            [
                window_attention(q[:, seq.tokens], k[:, seq.tokens], v[:, seq.tokens], config)
                for seq in spans(cu_seqlens, config)
            ]
        )
    mask = window_mask(q.shape[1], k.shape[1], config, q_start, q.device)
    return attend(q, k, v, mask, config.softmax_scale)


def _join(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)
