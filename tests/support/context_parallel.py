"""Layers under context parallelism against one process: outputs, and gradients of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from nsa import NSAttention
from nsa.attention import Search, search
from nsa.distributed import Layout, context_parallel
from nsa.distributed.context import attention
from tests.support.layers import Problem, gradients

Make = Callable[..., Layout]


def reversed_segments(tokens: int | tuple[int, ...]) -> Layout:
    """Three short segments for each rank, the last first: no order that a constructor makes."""
    total = tokens if isinstance(tokens, int) else sum(tokens)
    size = dist.get_world_size()
    cuts = [i * total // (3 * size) for i in range(3 * size + 1)]
    found = list(pairwise(cuts))
    return Layout([found[r::size][::-1] for r in range(size)], tokens)


ORDERS: dict[str, Make] = {
    "contiguous": Layout.contiguous,
    "head-tail": Layout.head_tail,
    "reversed": reversed_segments,
}


def tokens_of(case: Problem) -> int | tuple[int, ...]:
    """What a layout takes."""
    if case.cu_seqlens is None:
        return case.x.shape[1]
    return tuple(case.cu_seqlens.diff().tolist())


def across_ranks(
    layer: Callable[[Tensor], Tensor], parameters: dict[str, Tensor], case: Problem, layout: Layout
) -> dict[str, Tensor]:
    """The whole output, and every gradient summed over the ranks."""
    x = layout.shard(case.x.detach()).requires_grad_()
    with context_parallel(layout):
        out = layer(x)
        leaves = {"x": x, **parameters}
        dout = layout.shard(case.dout).to(out.dtype)
        grads = torch.autograd.grad(out, list(leaves.values()), dout)
    found = dict(zip(leaves, grads, strict=True))
    with torch.no_grad():
        whole = {"out": layout.unshard(out), "x": layout.unshard(found.pop("x"))}
    for grad in found.values():
        dist.all_reduce(grad)
    return {**whole, **found}


def in_one_process(layer: NSAttention, case: Problem) -> dict[str, Tensor]:
    """The same of one process."""
    out = layer(case.x, cu_seqlens=case.cu_seqlens)
    return {"out": out.detach(), **gradients(layer, out, case)}


@contextmanager
def recorded_lists() -> Iterator[list[Tensor]]:
    """The lists of every call of a backend's steps that context parallelism makes inside."""
    lists: list[Tensor] = []

    def watched(*args: object, **options: object) -> Search:
        found = search(*args, **options)  # type: ignore[arg-type]
        lists.append(found.block_idx)
        return found

    attention.search = watched
    try:
        yield lists
    finally:
        attention.search = search
