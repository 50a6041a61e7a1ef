"""The Triton kernels as operators, one for each branch: ``nsa::compressed_attention`` and others.

Schemas and empty results need torch alone; triton is imported when a kernel first runs. Under
``TRITON_INTERPRET=1`` the same operators take CPU tensors. ``config`` is :attr:`NSAConfig.key`.

B batch, T query tokens, S key tokens, N compressed blocks, H query heads, K key/value heads, D key
size, V value size, n listed blocks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nsa.core import flops
from nsa.core.operators import config_of, define_attention

Triple = tuple[Tensor, Tensor, Tensor]


def _window_call(seq_start: Tensor | None, config: str, q_start: int) -> dict[str, Any]:
    asked = config_of(config)
    call = {"window": asked.window, "scale": asked.softmax_scale, "q_start": q_start}
    return {"start": seq_start, **call}


def _window(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    from nsa.backends.compiled.window.launch import window_forward

    return window_forward(q, k, v, **_window_call(*call))


def _window_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *call: Any
) -> Triple:
    from nsa.backends.compiled.window.launch import window_backward

    return window_backward(dout, q, k, v, out, lse, **_window_call(*call))


window_attention = define_attention(
    "window_attention",
    "Tensor? seq_start, str config, SymInt q_start",
    _window,
    _window_backward,
    flops.window,
)
"""``(q [B, T, H, D], k [B, S, K, D], v [B, S, K, V], seq_start int32 [T] or None, config, q_start)
-> out, lse``; see :func:`nsa.backends.compiled.window.launch.window_forward`."""


def _selected_call(seq_start: Tensor | None, config: str, q_start: int) -> dict[str, Any]:
    asked = config_of(config)
    call = {"select_block": asked.select_block, "scale": asked.softmax_scale, "q_start": q_start}
    return {"start": seq_start, **call}


def _selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    seq_start: Tensor | None,
    sequences: int,
    *call: Any,
) -> tuple[Tensor, Tensor]:
    from nsa.backends.compiled.selected.launch import selected_forward

    return selected_forward(q, k, v, block_idx, **_selected_call(seq_start, *call))


def _selected_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_idx: Tensor,
    seq_start: Tensor | None,
    sequences: int,
    *call: Any,
) -> Triple:
    from nsa.backends.compiled.selected.launch import selected_backward

    options = _selected_call(seq_start, *call)
    options["sequences"] = None if seq_start is None else sequences
    return selected_backward(dout, q, k, v, out, lse, block_idx, **options)


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


def _compressed_call(
    k: Tensor,
    cmp_seq_start: Tensor | None,
    seq_start: Tensor | None,
    seen_from: Tensor | None,
    seen_until: Tensor | None,
    config: str,
    q_start: int,
) -> dict[str, Any]:
    """Compressed attention as a sliding window: as wide as the keys, which stand d tokens apart."""
    from nsa.backends.compiled.window.bounds import Blocks

    asked = config_of(config)
    block, stride = asked.compress_block, asked.compress_stride
    blocks = Blocks(block, stride, seq_start, seen_from, seen_until)
    call = {"start": cmp_seq_start, "scale": asked.softmax_scale, "q_start": q_start}
    return {"window": max(1, k.shape[1]), "blocks": blocks, **call}


def _compressed(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    from nsa.backends.compiled.window.launch import window_forward

    return window_forward(q, k, v, **_compressed_call(k, *call))


def _compressed_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *call: Any
) -> Triple:
    from nsa.backends.compiled.window.launch import window_backward

    return window_backward(dout, q, k, v, out, lse, **_compressed_call(k, *call))


compressed_attention = define_attention(
    "compressed_attention",
    "Tensor? cmp_seq_start, Tensor? seq_start, Tensor? seen_from, Tensor? seen_until, "
    "str config, SymInt q_start",
    _compressed,
    _compressed_backward,
    flops.compressed,
)
"""``(q, k [B, N, K, D], v [B, N, K, V], the four of :func:`nsa.core.packing.block_bounds` or None,
config, q_start) -> out, lse``."""
