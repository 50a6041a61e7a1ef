"""The gated sum of the three branches as one operator: ``nsa::gated_attention``.

Schemas and empty results need torch alone; triton is imported when a kernel first runs.

B batch, T tokens, N compressed blocks, H query heads, K key/value heads, D key size, V value size,
n listed blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa.backends.compiled.selected.tiles import dq_dtype
from nsa.core import flops
from nsa.core.dtypes import accumulation_dtype
from nsa.core.geometry import LARGE_BLOCK, block_size
from nsa.core.operators import config_of, define


def _layout(
    tokens: int,
    seq_start: Tensor | None,
    cmp_seq_start: Tensor | None,
    seen_from: Tensor | None,
    seen_until: Tensor | None,
    sequences: int,
    key: str,
    share: int,
    q_start: int,
    window_start: int,
) -> Any:
    from nsa.backends.compiled.gated.launch import Layout
    from nsa.backends.compiled.window.bounds import Blocks

    config = config_of(key)
    block, stride = config.compress_block, config.compress_stride
    blocks = Blocks(block, stride, seq_start, seen_from, seen_until)
    size, scale = block_size(tokens, config, least=LARGE_BLOCK), config.softmax_scale
    rest = (seq_start, cmp_seq_start, sequences, share, q_start, window_start)
    return Layout(blocks, size, config.window, scale, *rest)


def _forward(q: Tensor, *given: Any) -> tuple[Tensor, ...]:
    from nsa.backends.compiled.gated.launch import Branches, gated_forward

    k, v = Branches(*given[:6:2]), Branches(*given[1:6:2])
    gates, out_cmp, _, block_idx, *call, _ = given[6:]
    return gated_forward(q, k, v, gates, out_cmp, block_idx, _layout(k.selected.shape[1], *call))


def _backward(dout: Tensor, q: Tensor, *given: Any) -> tuple[Tensor, ...]:
    from nsa.backends.compiled.gated.launch import Branches, gated_backward

    k, v = Branches(*given[:6:2]), Branches(*given[1:6:2])
    gates, out_cmp, lse_cmp, out_slc, out_win, lse_slc, lse_win, block_idx, *call = given[6:]
    dq, dk, dv, dgates = gated_backward(
        dout,
        q,
        k,
        v,
        gates,
        Branches(out_cmp, out_slc, out_win),
        Branches(lse_cmp, lse_slc, lse_win),
        block_idx,
        _layout(k.selected.shape[1], *call[:-1]),
        gates_in_unit_interval=call[-1],
        dq_dtype=_dq_dtype(q, given[1]),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk[0], dv[0], dk[1], dv[1], dk[2], dv[2], dgates


def _dq_dtype(q: Tensor, v: Tensor) -> torch.dtype:
    return dq_dtype(q.dtype, q.shape[3], v.shape[3], q.shape[2] // v.shape[2])


def _outputs(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *rest: object) -> tuple[Tensor, ...]:
    out, lse = (*q.shape[:3], v_cmp.shape[3]), q.shape[:3]
    dtype = accumulation_dtype(q)
    return (
        *(q.new_empty(out) for _ in range(3)),
        *(q.new_empty(lse, dtype=dtype) for _ in range(2)),
    )


def _gradients_like(dout: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Like q, then k and v of the compressed, selected and window branch, then the gates."""
    q = inputs[0]
    dtypes = {0: _dq_dtype(q, inputs[2]), 3: torch.float32, 4: torch.float32}
    return tuple(
        x.new_empty(x.shape, dtype=dtypes.get(i, x.dtype)) for i, x in enumerate(inputs[:8])
    )


_INPUTS = (
    "Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor k_slc, Tensor v_slc, Tensor k_win, Tensor v_win, "
    "Tensor gates, Tensor out_cmp, Tensor lse_cmp"
)
_CALL = (
    "Tensor block_idx, Tensor? seq_start, Tensor? cmp_seq_start, Tensor? seen_from, "
    "Tensor? seen_until, SymInt sequences, str config, int share, SymInt q_start, "
    "SymInt window_start, bool gates_in_unit_interval"
)
_TENSORS = 15
"""Inputs up to and with seen_until."""


def _two(x: flops.Arguments) -> int:
    return flops.selected(x) + flops.window(x)


def _three(x: flops.Arguments) -> int:
    return _two(x) + flops.compressed(x)


_BACKWARD = define(
    f"gated_attention_backward(Tensor dout, {_INPUTS}, Tensor out_slc, Tensor out_win, "
    f"Tensor lse_slc, Tensor lse_win, {_CALL}) -> ({', '.join(['Tensor'] * 8)})",
    _backward,
    _gradients_like,
    count=flops.of_backward(_three, "v_win"),
)


def _gradients(
    inputs: tuple[Any, ...], saved: tuple[Tensor, ...], dout: Tensor
) -> tuple[Tensor | None, ...]:
    made = _BACKWARD(dout, *saved, *inputs[_TENSORS:])
    return (*made, *(None,) * (len(inputs) - len(made)))


gated_attention = define(
    f"gated_attention({_INPUTS}, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _outputs,
    saved=lambda inputs, outputs: (*inputs[:10], *outputs[1:], *inputs[10:_TENSORS]),
    gradients=_gradients,
    count=flops.of_forward(_two, "v_win"),
)
"""``(q, k and v of every branch, gates, out and lse of the compressed branch, block_idx, the four
of :func:`nsa.core.packing.block_bounds` or None, the number of packed sequences, config, how many
tokens have one list (:func:`nsa.backends.compiled.selected.launch.selected_forward`), the position
of q's first row and how many keys of the window come before it, whether every gate is in 0…1)
-> sum, out of the selected branch and of the window, their lse``. The gradient of ``out_cmp`` is
part of that of q, k_cmp and v_cmp. See :mod:`nsa.backends.compiled.gated.launch`."""
