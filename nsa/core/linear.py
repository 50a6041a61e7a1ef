"""Linear layers that are nothing but linear maps, and several of them as one product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

ROW_ALIGNMENT = 64
"""Elements: every row of a joined product begins at a multiple of it."""
MIN_ROWS_TO_JOIN = 256
"""Rows of x below which weights are not joined, outside a trace: on a CPU (dim 768) 64 rows took
2.65 ms in place of 1.53, 2048 rows the same."""


def is_unmodified(linear: nn.Module) -> bool:
    """Whether calling the module is a product with its weight, plus its bias, and no more.

    Not one that somebody has wrapped, hooked, patched, parametrized, quantized or sharded.
    """
    if type(linear) is not nn.Linear or not is_unhooked(linear):
        return False
    tensors = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
    if not all(type(x) in (nn.Parameter, Tensor) for x in tensors):
        return False
    return torch.compiler.is_compiling() or not torch_module._has_any_global_hook()


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's ``forward``."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return "forward" not in vars(module) and not any(hooks)


def project(x: Tensor, linears: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Apply every layer to x ``[B, T, dim]``: as one product where all are linear maps alone.

    Narrow layers spend most of their time reading x, and in the backward pass each would write a
    gradient of x. If one of them is more than a linear map (:func:`is_unmodified`), each is called
    as it is.
    """
    few = not torch.compiler.is_compiling() and x.shape[0] * x.shape[1] < MIN_ROWS_TO_JOIN
    if few or not all(is_unmodified(linear) for linear in linears.values()):
        return {name: linear(x) for name, linear in linears.items()}
    layers = {name: cast(nn.Linear, linear) for name, linear in linears.items()}
    sizes = [layer.weight.shape[0] for layer in layers.values()]
    product = _product(x, list(layers.values()))
    parts = dict(
        zip(layers, product.split([*sizes, -sum(sizes) % ROW_ALIGNMENT], -1), strict=False)
    )
    for name, layer in layers.items():
        if layer.bias is not None:
            parts[name] = parts[name] + layer.bias.to(product.dtype)
    return parts


def joined_product(
    x: Tensor, linears: Mapping[str, nn.Module], widths: Sequence[int]
) -> tuple[Tensor, Tensor | None] | None:
    """The products of all layers side by side, ``[B, T, P]`` with zeros up to a multiple of
    ROW_ALIGNMENT columns, and the last layer's bias, which is still to be added.

    None where a layer is more than a product, the last one's bias apart, or of another width.
    """
    layers = [cast(nn.Linear, linear) for linear in linears.values() if is_unmodified(linear)]
    if [layer.weight.shape[0] for layer in layers] != list(widths):
        return None
    if any(layer.bias is not None for layer in layers[:-1]):
        return None
    return _product(x, layers), layers[-1].bias


def side_by_side(parts: Mapping[str, Tensor], widths: Sequence[int]) -> Tensor | None:
    """One tensor of all parts ``[B, T, width]``, as of :func:`joined_product`; None of others, or
    of two dtypes."""
    first, *others = parts.values()
    shapes = [(*first.shape[:2], width) for width in widths]
    if [part.shape for part in parts.values()] != shapes:
        return None
    if any(part.dtype != first.dtype for part in others):
        return None
    return F.pad(torch.cat([first, *others], -1), (0, -sum(widths) % ROW_ALIGNMENT))


def _product(x: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    """x times all weights, without biases; zeros in columns up to a multiple of ROW_ALIGNMENT."""
    weights = [layer.weight for layer in layers]
    padding = -sum(weight.shape[0] for weight in weights) % ROW_ALIGNMENT
    if padding:
        weights.append(weights[0].new_zeros(padding, x.shape[-1]))
    return F.linear(x, torch.cat(weights))
