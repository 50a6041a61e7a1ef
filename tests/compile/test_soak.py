"""Thousands of steps of mixed lengths, packed and not: flat memory, and no recompiles."""

from __future__ import annotations

import gc
import itertools
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nsa import NSAConfig, NSAttention
from nsa.core import compile as core_compile
from tests.support.backends import fa2_by_math

CONFIG = NSAConfig.preset("tiny")
DIM = 32
STEPS = 2000
WARM_UP = 300
SHORTEST = 2 * CONFIG.select_block
LONGEST = {"cpu": 160, "cuda": 4096}
MIB = 2**20
BACKENDS = ("sdpa", "fa2-varlen", "compiled")


def targets() -> list[object]:
    return [
        pytest.param(backend, device, marks=mark, id=f"{backend}-{device}")
        for device, mark in (("cpu", pytest.mark.slow), ("cuda", pytest.mark.gpu))
        for backend in BACKENDS
    ]


def step(layer: NSAttention, tokens: int, packed: bool, draw: random.Random) -> None:
    weight = layer.o_proj.weight
    x = torch.randn(1 if packed else 2, tokens, DIM, device=weight.device, dtype=weight.dtype)
    packing = {}
    if packed:
        cuts = sorted(draw.choices(range(tokens + 1), k=draw.randrange(1, 6)))  # some are equal
        bounds = [0, *cuts, tokens]
        packing["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=x.device)
        packing["max_seqlen"] = max(b - a for a, b in itertools.pairwise(bounds))
    layer(x.requires_grad_(), **packing).square().mean().backward()
    layer.zero_grad()


def in_use(device: str) -> tuple[int, int, int]:
    """Tensors alive, and bytes in use and held: of a GPU, or of the process."""
    gc.collect()
    tensors = sum(issubclass(type(x), Tensor) for x in gc.get_objects())
    if device == "cuda":
        torch.cuda.synchronize()
        return tensors, torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    return tensors, resident, resident


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("backend", "device"), targets())
def test_soak(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_compile, "COMPILER", "inductor")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    draw = random.Random(0)
    graphs = torch._dynamo.utils.counters["stats"]
    with fa2_by_math(device):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        layer = NSAttention(DIM, CONFIG, backend=backend, device=device, dtype=dtype)
    for packed in (False, True):
        step(layer, LONGEST[device], packed, draw)
    for number in range(STEPS):
        if number == WARM_UP:
            made, before = graphs["unique_graphs"], in_use(device)
        step(layer, draw.randint(SHORTEST, LONGEST[device]), draw.random() < 0.5, draw)
    after = in_use(device)
    print(f"\n{backend} on {device}: tensors, bytes in use, held: {before} -> {after}")
    assert graphs["unique_graphs"] == made
    assert (made > 0) == (backend == "compiled")
    assert after[0] == before[0]
    assert after[1] <= before[1] + (MIB if device == "cuda" else 16 * MIB)
    assert after[2] <= 1.1 * before[2]
