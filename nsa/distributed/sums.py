"""Sums over the processes that share a layer, differentiable and traceable by ``torch.compile``.

Each is one collective. The operators are those of DTensor, called without it: a DTensor for every
operand would take a process longer than a small layer's arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor


def sum_parts(parts: Tensor, group: str) -> Tensor:
    """Sum a tensor over the processes of a group, by its name.

    What reads the sum is the same on every process, and so is its gradient: that is each part's.
    """
    result: Tensor = _SumParts.apply(parts, group)
    return result


def sum_gradients(x: Tensor, group: str) -> Tensor:
    """A tensor that is the same on every process; its gradient is the sum of what each has."""
    result: Tensor = _SumGradients.apply(x, group)
    return result


def local_parts(parameters: Sequence[DTensor], group: str) -> list[Tensor]:
    """This process's part of each parameter, a plain tensor.

    Of those that are whole on every process the gradients are summed, all of a dtype at once.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    parts = iter(_LocalParts.apply(group, *trained) if trained else ())
    return [next(parts) if p.requires_grad else p.to_local() for p in parameters]


def _sum(x: Tensor, group: str) -> Tensor:
    # in place, as dist.all_reduce is, the gradients of a compiled block are wrong (torch 2.11)
    operators = torch.ops._c10d_functional
    result: Tensor = operators.wait_tensor(operators.all_reduce(x.contiguous(), "sum", group))
    return result


class _SumParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: str) -> Tensor:
        return _sum(parts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


class _LocalParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: str, *parameters: DTensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.layouts = [(p.device_mesh, p.placements, p.shape, p.stride()) for p in parameters]
        return tuple(parameter.to_local().detach() for parameter in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        summed = list(grads)
        whole: dict[torch.dtype, list[int]] = {}
        for i, (_, placements, *_) in enumerate(ctx.layouts):
            if placements[0].is_replicate():
                whole.setdefault(grads[i].dtype, []).append(i)
        for numbers in whole.values():
            flat = _sum(torch.cat([grads[i].flatten() for i in numbers]), ctx.group)
            parts = flat.split([grads[i].numel() for i in numbers])
            for i, part in zip(numbers, parts, strict=True):
                summed[i] = part.view(grads[i].shape)
        return None, *(
            DTensor.from_local(grad, mesh, placements, run_check=False, shape=shape, stride=stride)
            for grad, (mesh, placements, shape, stride) in zip(summed, ctx.layouts, strict=True)
        )
