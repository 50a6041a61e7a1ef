"""Layers on the Triton kernels, two ranks against one process, in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from tests.support.context_parallel import ORDERS, across_ranks, in_one_process, tokens_of
from tests.support.layers import agree, by_part, make_layer, problem
from tests.support.processes import run_ranks
from tests.triton_interpreter import triton_fixes

Lengths = tuple[int, ...] | None
PACKED = (13, 0, 3, 21)


def layers(cases: list[tuple[Lengths, str]]) -> None:
    triton_fixes.apply()
    layer = make_layer(backend="compiled", dtype=torch.float32)
    single = make_layer(backend="sdpa", dtype=torch.float32)
    for lengths, order in cases:
        case = problem(lengths, dtype=torch.float32)
        layout = ORDERS[order](tokens_of(case))
        found = across_ranks(layer, dict(layer.named_parameters()), case, layout)
        if dist.get_rank() == 0:
            agree(by_part(found), by_part(in_one_process(single, case)), 1e-5)


def test_a_part_of_a_sequence_and_whole_ones() -> None:
    run_ranks(layers, 2, [(PACKED, "contiguous")])


@pytest.mark.slow
def test_every_order() -> None:
    cases = [(lengths, order) for lengths in (None, PACKED) for order in ORDERS]
    run_ranks(layers, 2, cases, timeout=600)
