"""``attn_implementation="nsa"``: attention over blocks that a model lists itself.

MiniMax-M3's layers are such: a learned indexer lists blocks of keys for every query and group of
heads. transformers has kernels for them on one kind of GPU; here any backend of the library runs
them, forward and backward.

B batch, T query tokens, S key tokens, H query heads, K key/value heads, D key size, V value size, n
listed blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from nsa.attention import needs_grad, no_autocast
from nsa.backends.dispatch import plan, settings_in_force
from nsa.backends.protocol import Problem
from nsa.config import NSAConfig
from nsa.errors import ConfigError, ShapeError
from nsa.integrations.transformers.batch import FLASH_ONLY

_ABSENT: Any = object()


def listed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    block_indices: Tensor | None = _ABSENT,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend causally to the blocks that are listed for each query.

    Args:
        module: has the size of a block at ``indexer.block_size``, or ``config.index_block_size``.
        query: ``[B, H, T, D]``; the last of its S keys is the last query's own.
        key, value: ``[B, K, S, D]`` and ``[B, K, S, V]``.
        attention_mask: None, or bool ``[B, 1, T, S]`` of causality and padding to the right.
        dropout: 0.
        scaling: of the scores; None: ``D ** -0.5``.
        block_indices: ``[B, K, T, n]``, in any order, then −1. None: a layer that lists nothing is
            dense, and PyTorch's attention runs it.
        position_ids: ``[B, T]``; where the first query stands among the keys of a static cache.

    Returns:
        ``[B, T, H, V]``, and None.

    Raises:
        ConfigError, ShapeError: a model that lists no blocks, or an argument that is not obeyed.
    """
    if block_indices is _ABSENT:
        raise ConfigError(
            "attn_implementation='nsa': expected a model whose layers list blocks, such as "
            f"MiniMax-M3, got {type(module).__name__}, which passes no block_indices; "
            "nsa.integrations.transformers.convert(model) puts NSA into a dense model"
        )
    if block_indices is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", *FLASH_ONLY):
        if kwargs.get(name) is not None:
            got = type(kwargs[name]).__name__
            raise ShapeError(
                f"{name}: expected None with attn_implementation='nsa', got {got}; "
                "give each text a row of its own, padded to the right"
            )
    if dropout:
        raise ConfigError(f"dropout: expected 0, got {dropout}; set attention_dropout=0")
    _check_padding(attention_mask)
    config = _config(module, query, key, value, block_indices, scaling)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    start = _start(q, k, position_ids)
    settings = settings_in_force()
    grad = needs_grad(q, k, v)
    problem = Problem(config, q.device, q.dtype, k.shape[1], packed=False, needs_grad=grad)
    step = plan(problem, None, settings).step("selected").selected_attention
    with no_autocast(q.device):
        out, _ = step(q, k, v, _ascending(block_indices), config, q_start=start)
    return out, None


def _ascending(block_indices: Tensor) -> Tensor:
    """``[B, K, T, n]`` to int32 ``[B, T, K, n]``, ascending, then −1."""
    lists = block_indices.transpose(1, 2).int()
    last = torch.iinfo(torch.int32).max
    lists = lists.masked_fill(lists < 0, last).sort(-1).values
    return lists.masked_fill(lists == last, -1)


def _config(
    module: Any, query: Tensor, key: Tensor, value: Tensor, lists: Tensor, scaling: float | None
) -> NSAConfig:
    size = getattr(getattr(module, "indexer", None), "block_size", None)
    if size is None:
        size = getattr(getattr(module, "config", None), "index_block_size", None)
    if size is None:
        raise ConfigError(
            f"{type(module).__name__}: expected the size of a block at indexer.block_size or "
            "config.index_block_size, got none"
        )
    H, K, D, T = query.shape[1], key.shape[1], query.shape[3], query.shape[2]
    shape = (query.shape[0], K, T)
    if lists.shape[:3] != shape or lists.ndim != 4 or lists.shape[3] == 0:
        raise ShapeError(
            f"block_indices: expected [{shape[0]}, {K}, {T}, n], got {list(lists.shape)}"
        )
    return NSAConfig(
        num_heads=H,
        num_kv_heads=K,
        head_dim=D,
        value_dim=value.shape[3],
        compress_block=size,
        compress_stride=size,
        select_block=size,
        num_selected=lists.shape[3],
        num_initial=0,
        num_local=0,
        scale=scaling,
        compression="mean",
        rope_theta=None,
    )


def _check_padding(mask: Tensor | None) -> None:
    """Padding to the right is hidden by causality; any other would be read."""
    if mask is None:
        return
    if mask.ndim != 4 or mask.dtype != torch.bool:
        raise ShapeError(
            f"attention_mask: expected bool [B, 1, T, S], got {mask.dtype} {list(mask.shape)}"
        )
    seen = mask[:, :, -1]
    if not bool((seen[..., 0] & ~(seen[..., 1:] & ~seen[..., :-1]).any(-1)).all()):
        raise ShapeError(
            "attention_mask: expected no padding, or padding to the right, got another mask; "
            "tokenizer.padding_side = 'right', and a row for each text"
        )


def _start(q: Tensor, k: Tensor, position_ids: Tensor | None) -> int:
    T, S = q.shape[1], k.shape[1]
    if T == S or position_ids is None:
        return S - T
    return int(position_ids.flatten()[0])
