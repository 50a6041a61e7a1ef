"""The ``sdpa`` backend: pure PyTorch, any device, memory linear in the number of tokens.

- compressed: folded into plain causal attention (``shared/fold_queries``) and given to PyTorch's
  fused kernel where there is one (``fused_causal``), else, and when packed, to the sliding window;
- select: chunks of folded rows, scores mapped and ranked on the fly (``select``);
- selected: queries sorted by block into equal tiles (``shared/block_tiles``, ``selected``);
- window: chunks of rows over a sliding window of keys (``window``);
- a step of decode: plain products over the cache (``decode``).

The step signature is the one of :mod:`nsa.backends.protocol`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.backends.sdpa.decode import decode_attention
from nsa.backends.sdpa.fused_causal import causal_attention, has_kernel
from nsa.backends.sdpa.select import top_blocks
from nsa.backends.sdpa.selected import EVEN, tiled_attention
from nsa.backends.sdpa.window import SlidingWindow, sliding_window_attention
from nsa.backends.shared.fold_queries import Fold, fold, make_fold, nothing_seen, unfold
from nsa.backends.shared.select_op import select
from nsa.config import NSAConfig
from nsa.core.dtypes import NEG_INF, accumulation_dtype
from nsa.core.packing import packed_blocks, packed_tokens
from nsa.core.padding import pad_heads
from nsa.selection.rules import all_blocks, first_block_only, takes_all, width
from nsa.selection.share import first_sharers

__all__ = [
    "compressed_attention",
    "decode_attention",
    "select_blocks",
    "select_impl",
    "selected_attention",
    "window_attention",
]


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
    """Folded causal attention; see :class:`nsa.backends.protocol.Backend`."""
    B, T, _, D = q.shape
    N, K, V = k.shape[1], k.shape[2], v.shape[3]
    shape = make_fold(T, N, config, cu_seqlens, q_start)
    if cu_seqlens is None and (shape.rows == 0 or N == 0):
        return nothing_seen(q, k, v, accumulation_dtype(q))
    if shape.real is not None:  # whatever stands in surplus rows is not read, NaN included
        real = shape.real[:, None, None]
        k, v = k.where(real, 0.0), v.where(real, 0.0)
    rows = fold(q, cu_seqlens, N, K, config, q_start)
    square = cu_seqlens is None and shape.rows == N and shape.first_row == 0
    if square and has_kernel(q, config.softmax_scale):
        M = rows.shape[3]
        out, lse = causal_attention(
            rows.permute(0, 2, 3, 1, 4).reshape(B * K, M, N, D),
            k.transpose(1, 2).reshape(B * K, N, D),
            v.transpose(1, 2).reshape(B * K, N, V),
            config.softmax_scale,
        )
        out = out.view(B, K, M, N, V).permute(0, 3, 1, 2, 4)
        lse = lse.reshape(B, K, M, N).permute(0, 3, 1, 2)
    else:
        window = _compressed_window(shape, N, max_seqlen, config)
        out, lse = sliding_window_attention(rows, k, v, window, config.softmax_scale)
    out = unfold(out, cu_seqlens, T, N, config, q_start, 0.0)
    lse = unfold(lse[..., None], cu_seqlens, T, N, config, q_start, NEG_INF)
    return out, lse[..., 0]


def _compressed_window(
    shape: Fold, N: int, max_seqlen: int | None, config: NSAConfig
) -> SlidingWindow:
    width = N if max_seqlen is None else min(N, config.num_compressed(max_seqlen))
    reach = shape.first_row + shape.rows if shape.row_seq is None else max(1, width)
    return SlidingWindow(max(1, reach), shape.first_row, shape.row_seq)


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None = None,
    *,
    max_seqlen: int | None = None,
    q_start: int = 0,
    lse: Tensor | None = None,
) -> Tensor:
    """Top-n selection; see :class:`nsa.backends.protocol.Backend`."""
    if lse is None:
        with torch.no_grad():
            q, k_cmp = q.detach(), k_cmp.detach()
            v = k_cmp[..., :1]
            _, lse = compressed_attention(
                q, k_cmp, v, config, cu_seqlens, max_seqlen=max_seqlen, q_start=q_start
            )
    return select("sdpa", q, k_cmp, lse, config, cu_seqlens, max_seqlen, q_start)


def select_impl(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None,
    longest: int,
    q_start: int,
) -> Tensor:
    """See :func:`nsa.backends.shared.select_op.select`."""
    B, T = q.shape[:2]
    N, K, n = k_cmp.shape[1], k_cmp.shape[2], width(longest, config)
    if takes_all(longest, config):
        if cu_seqlens is None:
            position = torch.arange(q_start, q_start + T, device=q.device)
        else:
            position = packed_tokens(cu_seqlens, T).position
        return all_blocks(position, n, config)[:, None].expand(B, T, K, n)
    shape = make_fold(T, N, config, cu_seqlens, q_start)
    if cu_seqlens is None:
        number = torch.arange(shape.first_row, shape.first_row + shape.rows, device=q.device)
    else:
        number = packed_blocks(cu_seqlens, N, config).position
    first_only = first_block_only(n, q.device)
    if shape.rows == 0 or N == 0:
        return first_only.expand(B, T, K, -1)
    window = _compressed_window(shape, N, longest, config)
    chosen = top_blocks(q, k_cmp, lse, config, shape, window, number, longest)
    if cu_seqlens is None:
        chosen = chosen[:, shape.lead : shape.lead + T - shape.skipped]
        blind = first_only.expand(B, shape.skipped, K, -1)
        chosen = torch.cat([blind, chosen], dim=1)
    else:
        assert shape.slots is not None and shape.blind is not None
        chosen = chosen.index_select(1, shape.slots)
        chosen = chosen.where(~shape.blind[:, None, None], first_only)
    if config.select_share == 1:
        return chosen
    return chosen.index_select(1, first_sharers(T, config, cu_seqlens, q.device))


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
    """Tiled attention over listed blocks; see :class:`nsa.backends.protocol.Backend`."""
    V = v.shape[3]
    q, k, v = pad_heads(q, k, v, multiple=EVEN)
    out, lse = tiled_attention(q, k, v, block_idx, config, cu_seqlens, q_start)
    return out[..., :V], lse


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
    """Banded attention; see :class:`nsa.backends.protocol.Backend`."""
    B, T, H, D = q.shape
    K = k.shape[2]
    seq = None if cu_seqlens is None else packed_tokens(cu_seqlens, T).seq_id
    window = SlidingWindow(config.window, q_start, seq)
    rows = q.reshape(B, T, K, H // K, D)
    out, lse = sliding_window_attention(rows, k, v, window, config.softmax_scale)
    return out.reshape(B, T, H, v.shape[3]), lse.reshape(B, T, H)
