"""The Triton kernels as operators, one for each branch: ``nsa::compressed_attention`` and others.

Schemas and empty results need torch alone; triton is imported when a kernel first runs. Under
``TRITON_INTERPRET=1`` the same operators take CPU tensors.

B batch, T query tokens, S key tokens, N compressed blocks, H query heads, K key/value heads, D key
size, V value size, n listed blocks.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from nsa.core.operators import define, lse_dtype


def _window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    window: int,
    scale: float,
    q_start: int,
) -> tuple[Tensor, Tensor]:
    kernels = importlib.import_module("nsa.backends.compiled.window.launch")
    return kernels.window_forward(q, k, v, window=window, start=start, scale=scale, q_start=q_start)


def _window_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Tensor | None,
    window: int,
    scale: float,
    q_start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = importlib.import_module("nsa.backends.compiled.window.launch")
    return kernels.window_backward(
        dout, q, k, v, out, lse, window=window, start=start, scale=scale, q_start=q_start
    )


def _like_inputs(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Any:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _like_output(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return (
        q.new_empty(*q.shape[:3], v.shape[3]),
        q.new_empty(q.shape[:3], dtype=lse_dtype(q)),
    )


_WINDOW_CALL = "Tensor? start, SymInt window, float scale, SymInt q_start"
_WINDOW_BACKWARD = define(
    "window_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_WINDOW_CALL}) -> (Tensor, Tensor, Tensor)",
    _window_backward,
    _like_inputs,
)


def _window_gradients(
    inputs: tuple[Any, ...], saved: tuple[Tensor, ...], dout: Tensor
) -> tuple[Tensor | None, ...]:
    return (*_WINDOW_BACKWARD(dout, *saved, *inputs[4:]), None, None, None, None)


window_attention = define(
    f"window_attention(Tensor q, Tensor k, Tensor v, {_WINDOW_CALL}) -> (Tensor, Tensor)",
    _window,
    _like_output,
    saved=lambda inputs, outputs: (*inputs[:3], *outputs, inputs[3]),
    gradients=_window_gradients,
)
"""``(q [B, T, H, D], k [B, S, K, D], v [B, S, K, V], start int32 [T] or None, window, scale,
q_start) -> out, lse``; see :func:`nsa.backends.compiled.window.launch.window_forward`."""


def _selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    start: Tensor | None,
    sequences: int,
    select_block: int,
    scale: float,
    q_start: int,
) -> tuple[Tensor, Tensor]:
    call = {"start": start, "select_block": select_block, "scale": scale, "q_start": q_start}
    kernels = importlib.import_module("nsa.backends.compiled.selected.launch")
    return kernels.selected_forward(q, k, v, block_idx, **call)


def _selected_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_idx: Tensor,
    start: Tensor | None,
    sequences: int,
    select_block: int,
    scale: float,
    q_start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    call = {"start": start, "select_block": select_block, "scale": scale, "q_start": q_start}
    kernels = importlib.import_module("nsa.backends.compiled.selected.launch")
    call["sequences"] = None if start is None else sequences
    return kernels.selected_backward(dout, q, k, v, out, lse, block_idx, **call)


_SELECTED_CALL = (
    "Tensor block_idx, Tensor? start, SymInt sequences, int select_block, float scale, "
    "SymInt q_start"
)
_SELECTED_BACKWARD = define(
    "selected_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_SELECTED_CALL}) -> (Tensor, Tensor, Tensor)",
    _selected_backward,
    _like_inputs,
)


def _selected_gradients(
    inputs: tuple[Any, ...], saved: tuple[Tensor, ...], dout: Tensor
) -> tuple[Tensor | None, ...]:
    return (*_SELECTED_BACKWARD(dout, *saved, *inputs[5:]), *(None,) * 6)


selected_attention = define(
    f"selected_attention(Tensor q, Tensor k, Tensor v, {_SELECTED_CALL}) -> (Tensor, Tensor)",
    _selected,
    _like_output,
    saved=lambda inputs, outputs: (*inputs[:3], *outputs, *inputs[3:5]),
    gradients=_selected_gradients,
)
"""``(q, k, v, block_idx int32 [B, T, K, n], start int32 [T] or None, number of packed sequences,
select_block, scale, q_start) -> out, lse``; see
:func:`nsa.backends.compiled.selected.launch.selected_forward`."""


def _over_blocks(
    k: Tensor,
    start: Tensor | None,
    first: Tensor | None,
    seen_from: Tensor | None,
    seen_until: Tensor | None,
    block: int,
    stride: int,
    scale: float,
    q_start: int,
) -> dict[str, Any]:
    """The window that the compressed branch is: as wide as the keys, which stand d tokens apart."""
    kernels = importlib.import_module("nsa.backends.compiled.window.launch")
    blocks = kernels.Blocks(block, stride, first, seen_from, seen_until)
    window = max(1, k.shape[1])
    call = {"start": start, "scale": scale, "q_start": q_start}
    return {"window": window, "blocks": blocks, **call}


def _compressed(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    kernels = importlib.import_module("nsa.backends.compiled.window.launch")
    return kernels.window_forward(q, k, v, **_over_blocks(k, *call))


def _compressed_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *call: Any
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = importlib.import_module("nsa.backends.compiled.window.launch")
    return kernels.window_backward(dout, q, k, v, out, lse, **_over_blocks(k, *call))


_COMPRESSED_CALL = (
    "Tensor? start, Tensor? first, Tensor? seen_from, Tensor? seen_until, int block, int stride, "
    "float scale, SymInt q_start"
)
_COMPRESSED_BACKWARD = define(
    "compressed_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_COMPRESSED_CALL}) -> (Tensor, Tensor, Tensor)",
    _compressed_backward,
    _like_inputs,
)


def _compressed_gradients(
    inputs: tuple[Any, ...], saved: tuple[Tensor, ...], dout: Tensor
) -> tuple[Tensor | None, ...]:
    return (*_COMPRESSED_BACKWARD(dout, *saved, *inputs[7:]), *(None,) * 8)


compressed_attention = define(
    f"compressed_attention(Tensor q, Tensor k, Tensor v, {_COMPRESSED_CALL}) -> (Tensor, Tensor)",
    _compressed,
    _like_output,
    saved=lambda inputs, outputs: (*inputs[:3], *outputs, *inputs[3:7]),
    gradients=_compressed_gradients,
)
"""``(q, k [B, N, K, D], v [B, N, K, V], start, first, seen_from, seen_until, l, d, scale,
q_start) -> out, lse``; the four are those of :func:`nsa.core.packing.block_places`, or None."""
