"""Tensors of the same values, laid out in memory as users' tensors may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nsa.testing import Inputs


def _transposed(x: Tensor) -> Tensor:
    """As a projection's output is, seen head by head."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() > 2 else x


def _last_dimension_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def _every_other(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def _expanded(x: Tensor) -> Tensor:
    """Of other values: one for all of the last dimension."""
    return x if not x.is_floating_point() else x[..., :1].expand(x.shape)


def _one_element_further(x: Tensor) -> Tensor:
    """Contiguous, at an address that is a multiple of nothing."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def _wider_rows(x: Tensor) -> Tensor:
    """Cut out of rows that are longer by one element."""
    return torch.cat([x, x[..., :1]], -1)[..., :-1]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": _transposed,
    "last dimension first": _last_dimension_first,
    "every other element": _every_other,
    "expanded": _expanded,
    "one element further": _one_element_further,
    "wider rows": _wider_rows,
}


def laid_out(inputs: Inputs, layout: str) -> Inputs:
    """The problem with every tensor, the output's gradient and the index tensors in a layout."""
    change = LAYOUTS[layout]
    changed = inputs.with_leaves(tuple(change(x.detach()) for x in inputs.leaves()))
    rest = {name: getattr(inputs, name) for name in ("dout", "block_idx", "cu_seqlens")}
    return replace(changed, **{k: x if x is None else change(x) for k, x in rest.items()})
