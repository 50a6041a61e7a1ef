"""Whether a linear layer is nothing but a linear map, so that its weight may be used without it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module


def is_plain(linear: nn.Module, *, bias: bool) -> bool:
    """Whether calling the module is a product with its weight, plus a bias or not, and no more.

    Not one that somebody has wrapped, hooked, patched, parametrized, quantized or sharded.
    """
    if type(linear) is not nn.Linear or "forward" in vars(linear):
        return False
    if (linear.bias is not None) != bias:
        return False
    tensors = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
    if not all(type(x) in (nn.Parameter, Tensor) for x in tensors):
        return False
    hooks = (
        linear._forward_hooks,
        linear._forward_pre_hooks,
        linear._backward_hooks,
        linear._backward_pre_hooks,
    )
    if any(hooks):
        return False
    return torch.compiler.is_compiling() or not torch_module._has_any_global_hook()
