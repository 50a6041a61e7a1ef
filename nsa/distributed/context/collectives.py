"""PyTorch's collectives as context parallelism uses them: begun at once, waited for by the caller.

A collective reads and writes buffers of its own stream until :meth:`Pending.wait`; both are kept
until then. On a GPU waiting makes the current stream wait, not the host. Buffers go to PyTorch
flat, in which all its versions and engines agree.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nsa.errors import ShapeError, show

# renamed in torch 2.13, whose old names warn
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """The rank of this process in a group, and how many the group has.

    Raises:
        ShapeError: no group, or one that this process is not in.
    """
    if group is None and not dist.is_initialized():
        raise ShapeError(
            "group: expected torch.distributed to be initialized (torchrun, init_process_group), "
            "got no processes; for arithmetic alone give a size or rank"
        )
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ShapeError(
            "group: expected a process group that this process is in, or None, got "
            f"{show(group)}; a DeviceMesh has mesh.get_group()"
        )
    return dist.get_rank(group), dist.get_world_size(group)


def check_sendable(name: str, x: Tensor) -> None:
    """Refuse a tensor without values."""
    if x.is_meta:
        raise ShapeError(
            f"{name}: expected values that ranks can send each other, got the meta device, which "
            "has none"
        )


class Pending:
    """A collective that is under way."""

    def __init__(self, work: Any, given: Tensor, result: Tensor) -> None:
        self._work, self._result = work, result
        self._given: Tensor | None = given

    @property
    def unready(self) -> Tensor:
        """The result, which must not be read before :meth:`wait`."""
        return self._result

    def wait(self) -> Tensor:
        """The result."""
        if self._work is not None:
            self._work.wait()
            self._work = self._given = None
        return self._result


def all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Pending:
    """``[…]`` of every rank -> ``[ranks, …]``."""
    result = x.new_empty(dist.get_world_size(group), *x.shape)
    work = _all_gather(result.view(-1), x.view(-1), group=group, async_op=True)
    return Pending(work, x, result)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup | None) -> Pending:
    """``[ranks, …]`` of every rank -> ``[…]``: the sum of all ranks' parts for this one."""
    result = torch.empty(x.shape[1:], dtype=x.dtype, device=x.device)
    work = _reduce_scatter(result.view(-1), x.view(-1), group=group, async_op=True)
    return Pending(work, x, result)


def all_to_all(
    x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None
) -> Pending:
    """Flat parts of ``sent`` elements for each rank -> those of ``received`` from each rank."""
    result = x.new_empty(sum(received))
    work = dist.all_to_all_single(result, x, received, sent, group=group, async_op=True)
    return Pending(work, x, result)
