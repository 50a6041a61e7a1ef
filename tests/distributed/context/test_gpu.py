"""Layers on the Triton kernels and NCCL, one GPU for each rank, against one GPU."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nsa.distributed import Layout, context_parallel
from tests.support.context_parallel import ORDERS, across_ranks, in_one_process, tokens_of
from tests.support.layers import VARIANTS, agree, by_part, make_layer, problem
from tests.support.processes import run_ranks

PACKED = (13, 0, 3, 21)


def layers(device: str, tolerance: float) -> None:
    for name in ("paper", "shared kv"):
        layer = make_layer(VARIANTS[name], dtype=torch.float32).to(device)
        for lengths in (None, PACKED):
            case = problem(lengths, torch.float32, device)
            want = by_part(in_one_process(layer, case))
            for order in ORDERS.values():
                layout = order(tokens_of(case))
                found = across_ranks(layer, dict(layer.named_parameters()), case, layout)
                agree(by_part(found), want, tolerance)


@pytest.mark.gpu
def test_layers_on_two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    run_ranks(layers, 2, "cuda", 1e-4, device="cuda", timeout=600)


def another_device_is_current() -> None:
    rank = dist.get_rank()
    torch.cuda.set_device(0)
    layer = make_layer(backend="sdpa", dtype=torch.float32).to(f"cuda:{rank}")
    layout = Layout.contiguous(37)
    with context_parallel(layout):
        assert layer(torch.zeros(1, layout.rows, layer.dim, device=f"cuda:{rank}")).isfinite().all()


@pytest.mark.gpu
def test_the_current_device_plays_no_part() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    run_ranks(another_device_is_current, 2, device="cuda", timeout=600)


@pytest.mark.slow
def test_the_same_on_cpus() -> None:
    run_ranks(layers, 2, "cpu", 1e-4)
