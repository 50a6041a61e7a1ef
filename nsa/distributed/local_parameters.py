"""What the optimizer of one process updates: its parts of a model's parameters, as plain tensors.

An optimizer of DTensors comes to the same numbers, but asks DTensor's dispatcher about each of
them at every step: 300 parameters take 16 ms of the host, in place of 4.5.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nsa.distributed.mesh import OwnParameters


class LocalParameters(OwnParameters):
    """Parts in the memory of the parameters, which FSDP2 and tensor parallel leave in place.

    Args:
        model: sharded, split, or neither; on its device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._whole = dict(model.named_parameters())
        self.parts = {name: _part(parameter) for name, parameter in self._whole.items()}
        world = dist.get_world_size()
        self._copies = {name: world // _shards(x) for name, x in self._whole.items()}

    def zero_grad(self) -> None:
        # not model.zero_grad(): after a validation the model has what FSDP2 gathered
        for parameter in self._whole.values():
            parameter.grad = None

    def clip(self, limit: float) -> Tensor:
        grads: dict[int, list[Tensor]] = {}
        for name, parameter in self._whole.items():
            grad = parameter.grad
            part = self.parts[name]
            part.grad = None if grad is None else local(grad)
            if part.grad is not None:
                grads.setdefault(self._copies[name], []).append(part.grad)
        squares = [nn.utils.get_total_norm(x).square() / n for n, x in grads.items()]
        total = torch.stack(squares).sum()
        dist.all_reduce(total)
        norm = total.sqrt()
        nn.utils.clip_grads_with_norm_(self.parts.values(), limit, norm)
        return norm

    def whole(self, name: str, value: Tensor) -> Tensor:
        parameter = self._whole[name]
        if not isinstance(parameter, DTensor) or value.shape != self.parts[name].shape:
            return value
        return DTensor.from_local(
            value,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _part(parameter: nn.Parameter) -> nn.Parameter:
    if not isinstance(parameter, DTensor):
        return parameter
    return nn.Parameter(local(parameter.detach()), requires_grad=parameter.requires_grad)


def _shards(tensor: Tensor) -> int:
    """Into how many parts a tensor is split; other processes have copies of them."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if not placement.is_replicate())
