"""Bytes by arithmetic against those that collectives move."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nsa import NSAConfig
from nsa.distributed import Layout, Traffic, context_parallel, context_traffic
from nsa.distributed.context import collectives
from tests.support.layers import CONFIG, make_layer
from tests.support.processes import run_ranks

NAMES = {"_all_gather": "gather", "_reduce_scatter": "scatter", "all_to_all_single": "exchange"}


class Counted:
    """PyTorch's collectives, and how many bytes of other ranks each gave this one."""

    def __init__(self) -> None:
        self.moved: list[tuple[str, int]] = []
        for name in NAMES:
            where: Any = dist if name == "all_to_all_single" else collectives
            setattr(where, name, self.counted(NAMES[name], getattr(where, name)))

    def counted(self, name: str, function: Any) -> Any:
        def call(result: Tensor, given: Tensor, *splits: list[int], **options: Any) -> Any:
            rank, size = dist.get_rank(), dist.get_world_size()
            elements = {
                "gather": result.numel() * (size - 1) // size,
                "scatter": result.numel() * (size - 1),
                "exchange": sum(splits[0]) - splits[0][rank] if splits else 0,
            }[name]
            self.moved.append((name, elements * given.element_size()))
            return function(result, given, *splits, **options)

        return call


def measured() -> list[tuple[Any, Any]]:
    counted, pairs = Counted(), []
    for tokens, order in ((37, "head_tail"), ([13, 0, 24], "contiguous")):
        layout = getattr(Layout, order)(tokens)
        layer = make_layer(CONFIG, backend="sdpa", dtype=torch.float32)
        batch = 2 if tokens == 37 else 1
        x = torch.randn(batch, layout.rows, layer.dim, requires_grad=True)
        with context_parallel(layout):
            layer(x)  # which also compares the ranks
            counted.moved = []
            out = layer(x)
            forward, counted.moved = counted.moved, []
            out.sum().backward()
        backward, counted.moved = counted.moved, []
        assert [name for name, _ in forward] == ["exchange", "gather", "gather"]
        assert [name for name, _ in backward] == ["scatter", "scatter", "exchange"]
        found = [
            Traffic(there[1], back[1])
            for there, back in zip(forward, reversed(backward), strict=True)
        ]
        wanted = context_traffic(layout, CONFIG, batch=batch, element_size=4)
        pairs.append((dict(zip(("halo", "compressed", "selected"), found, strict=True)), wanted))
    return pairs


@pytest.mark.parametrize("size", [2, 4])
def test_collectives_move_what_the_formula_says(size: int) -> None:
    for pairs in run_ranks(measured, size):
        for found, wanted in pairs:
            assert found == wanted


def test_a_million_tokens() -> None:
    """The numbers of docs/distributed.md."""
    config = NSAConfig(compression="mean")
    width = 4 * (128 + 128) * 2
    for size, rows in ((8, 131072), (64, 16384), (512, 2048)):
        moved = context_traffic(Layout.head_tail(2**20, size=size), config)
        assert prod((size - 1, rows, width)) == moved["selected"].forward
        assert moved["compressed"].backward == (size - 1) * rows // 16 * width
        # two segments: the first begins the batch, and the last ends it
        assert moved["halo"] == Traffic((16 + 511) * width, (16 + 511) * width)


def test_one_rank_moves_nothing() -> None:
    config = replace(CONFIG, compression="mean")
    assert set(context_traffic(Layout.contiguous(40, size=1), config).values()) == {Traffic(0, 0)}
