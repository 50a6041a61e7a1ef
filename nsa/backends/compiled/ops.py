"""The Triton kernels as operators, one for each branch: ``nsa::compressed_attention`` and others.

Schemas and empty results need torch alone; triton is imported when a kernel first runs. Under
``TRITON_INTERPRET=1`` the same operators take CPU tensors. ``config`` is :attr:`NSAConfig.key`.
A backward looks at ``torch.use_deterministic_algorithms`` when it runs, as torch's own do.

B batch, T query tokens, S key tokens, N compressed blocks, H query heads, K key/value heads, D key
size, V value size, n listed blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa.core import flops
from nsa.core.geometry import LARGE_BLOCK, block_size
from nsa.core.operators import config_of, define_attention

Options = Callable[..., dict[str, Any]]


def _over_keys(options: Options) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of the sliding window's kernels; ``options`` says of k and the call how
    they see its keys."""

    def forward(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
        from nsa.backends.compiled.window.launch import window_forward

        return window_forward(q, k, v, **options(k, *call))

    def backward(dout: Tensor, q: Tensor, k: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        from nsa.backends.compiled.window.launch import window_backward

        v, out, lse, *call = given
        deterministic = torch.are_deterministic_algorithms_enabled()
        return window_backward(
            dout, q, k, v, out, lse, **options(k, *call), deterministic=deterministic
        )

    return forward, backward


def _tokens(k: Tensor, seq_start: Tensor | None, key: str, q_start: int) -> dict[str, Any]:
    config = config_of(key)
    window, scale = config.window, config.softmax_scale
    return {"window": window, "start": seq_start, "scale": scale, "q_start": q_start}


def _blocks(
    k: Tensor,
    cmp_seq_start: Tensor | None,
    seq_start: Tensor | None,
    seen_from: Tensor | None,
    seen_until: Tensor | None,
    key: str,
    q_start: int,
) -> dict[str, Any]:
    """As wide as the keys, which stand d tokens apart."""
    from nsa.backends.compiled.window.bounds import Blocks

    config = config_of(key)
    where = (seq_start, seen_from, seen_until)
    blocks = Blocks(config.compress_block, config.compress_stride, *where)
    call = {"start": cmp_seq_start, "scale": config.softmax_scale, "q_start": q_start}
    return {"window": max(1, k.shape[1]), "blocks": blocks, **call}


window_attention = define_attention(
    "window_attention",
    "Tensor? seq_start, str config, SymInt q_start",
    *_over_keys(_tokens),
    flops.window,
)
"""``(q [B, T, H, D], k [B, S, K, D], v [B, S, K, V], seq_start int32 [T] or None, config, q_start)
-> out, lse``; see :func:`nsa.backends.compiled.window.launch.window_forward`."""

compressed_attention = define_attention(
    "compressed_attention",
    "Tensor? cmp_seq_start, Tensor? seq_start, Tensor? seen_from, Tensor? seen_until, "
    "str config, SymInt q_start",
    *_over_keys(_blocks),
    flops.compressed,
)
"""``(q, k [B, N, K, D], v [B, N, K, V], the four of :func:`nsa.core.packing.block_bounds` or None,
config, q_start) -> out, lse``."""


def _lists(k: Tensor, seq_start: Tensor | None, key: str, q_start: int) -> dict[str, Any]:
    config = config_of(key)
    block, scale = block_size(k.shape[1], config, least=LARGE_BLOCK), config.softmax_scale
    return {"start": seq_start, "select_block": block, "scale": scale, "q_start": q_start}


def _selected(
    q: Tensor, k: Tensor, v: Tensor, block_idx: Tensor, *call: Any
) -> tuple[Tensor, Tensor]:
    from nsa.backends.compiled.selected.launch import selected_forward

    seq_start, _, *rest = call
    return selected_forward(q, k, v, block_idx, **_lists(k, seq_start, *rest))


def _selected_backward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    from nsa.backends.compiled.selected.launch import selected_backward

    *tensors, seq_start, sequences, key, q_start = given
    options = _lists(tensors[2], seq_start, key, q_start)
    return selected_backward(
        *tensors,
        **options,
        sequences=None if seq_start is None else sequences,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


selected_attention = define_attention(
    "selected_attention",
    "Tensor block_idx, Tensor? seq_start, SymInt sequences, str config, SymInt q_start",
    _selected,
    _selected_backward,
    flops.selected,
)
"""``(q, k, v, block_idx int32 [B, T, K, n], seq_start int32 [T] or None, number of packed
sequences, config, q_start) -> out, lse``; see
:func:`nsa.backends.compiled.selected.launch.selected_forward`."""
