"""The gated sum of the three branches as one operator: ``nsa::gated_attention``.

Schemas and empty results need torch alone; triton is imported when a kernel first runs.

B batch, T tokens, N compressed blocks, H query heads, K key/value heads, D key size, V value size,
n listed blocks.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from nsa.backends.compiled.selected.tiles import dq_dtype
from nsa.core.operators import define, lse_dtype


def _layout(
    start: Tensor | None,
    cmp_start: Tensor | None,
    first: Tensor | None,
    seen_from: Tensor | None,
    seen_until: Tensor | None,
    sequences: int,
    compress_block: int,
    compress_stride: int,
    select_block: int,
    window: int,
    scale: float,
) -> Any:
    kernels = importlib.import_module("nsa.backends.compiled.gated.launch")
    blocks = kernels.Blocks(compress_block, compress_stride, first, seen_from, seen_until)
    return kernels.Layout(blocks, select_block, window, scale, start, cmp_start, sequences)


def _forward(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    out_cmp: Tensor,
    lse_cmp: Tensor,
    block_idx: Tensor,
    *call: Any,
) -> tuple[Tensor, ...]:
    kernels = importlib.import_module("nsa.backends.compiled.gated.launch")
    k = kernels.Branches(k_cmp, k_slc, k_win)
    v = kernels.Branches(v_cmp, v_slc, v_win)
    return kernels.gated_forward(q, k, v, gates, out_cmp, block_idx, _layout(*call[:-1]))


def _backward(
    dout: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    out_cmp: Tensor,
    lse_cmp: Tensor,
    out_slc: Tensor,
    out_win: Tensor,
    lse_slc: Tensor,
    lse_win: Tensor,
    block_idx: Tensor,
    *call: Any,
) -> tuple[Tensor, ...]:
    kernels = importlib.import_module("nsa.backends.compiled.gated.launch")
    dq, dk, dv, dgates = kernels.gated_backward(
        dout,
        q,
        kernels.Branches(k_cmp, k_slc, k_win),
        kernels.Branches(v_cmp, v_slc, v_win),
        gates,
        kernels.Branches(out_cmp, out_slc, out_win),
        kernels.Branches(lse_cmp, lse_slc, lse_win),
        block_idx,
        _layout(*call[:-1]),
        gates_in_unit_interval=call[-1],
        dq_dtype=dq_dtype(q.dtype, q.shape[3]),
    )
    return dq, dk[0], dv[0], dk[1], dv[1], dk[2], dv[2], dgates


def _outputs(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *rest: object) -> tuple[Tensor, ...]:
    out, lse = (*q.shape[:3], v_cmp.shape[3]), q.shape[:3]
    dtype = lse_dtype(q)
    return (
        *(q.new_empty(out) for _ in range(3)),
        *(q.new_empty(lse, dtype=dtype) for _ in range(2)),
    )


def _gradients_like(
    dout: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    *rest: object,
) -> tuple[Tensor, ...]:
    return (
        q.new_empty(q.shape, dtype=dq_dtype(q.dtype, q.shape[3])),
        k_cmp.new_empty(k_cmp.shape),
        v_cmp.new_empty(v_cmp.shape),
        k_slc.new_empty(k_slc.shape, dtype=torch.float32),
        v_slc.new_empty(v_slc.shape, dtype=torch.float32),
        k_win.new_empty(k_win.shape),
        v_win.new_empty(v_win.shape),
        gates.new_empty(gates.shape),
    )


_INPUTS = (
    "Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor k_slc, Tensor v_slc, Tensor k_win, Tensor v_win, "
    "Tensor gates, Tensor out_cmp, Tensor lse_cmp"
)
_CALL = (
    "Tensor block_idx, Tensor? start, Tensor? cmp_start, Tensor? first, Tensor? seen_from, "
    "Tensor? seen_until, SymInt sequences, int compress_block, int compress_stride, "
    "int select_block, SymInt window, float scale, bool within_one"
)
_TENSORS = 16
"""Inputs up to and with seen_until."""
_BACKWARD = define(
    f"gated_attention_backward(Tensor dout, {_INPUTS}, Tensor out_slc, Tensor out_win, "
    f"Tensor lse_slc, Tensor lse_win, {_CALL}) -> ({', '.join(['Tensor'] * 8)})",
    _backward,
    _gradients_like,
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
)
"""``(q, k and v of every branch, gates, out and lse of the compressed branch, block_idx, the first
token and the first block of each token's sequence and the block bounds of
:func:`nsa.core.packing.block_places`, or None, the number of packed sequences, geometry, scale,
whether every gate is in 0…1) -> sum, out of the selected branch and of the window, their lse``. The
gradient of ``out_cmp`` is part of that of q, k_cmp and v_cmp. See
:mod:`nsa.backends.compiled.gated.launch`."""
