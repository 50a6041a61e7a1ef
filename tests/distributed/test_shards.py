"""A model sharded by FSDP2 and split by heads beside the same model on one process: a step of each.

In fp64, so that only a mistake is larger than rounding.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from nsa import ConfigError, NSAConfig, NSAttention
from nsa.distributed.data_parallel import shard
from nsa.distributed.tensor_parallel import parallelize, tensor_parallel_plan
from nsa.models import LanguageModel, ModelConfig
from tests.support.processes import run_ranks

HEADS = NSAConfig(
    num_heads=8,
    num_kv_heads=4,
    head_dim=6,
    value_dim=4,
    compress_block=4,
    compress_stride=2,
    select_block=8,
    num_selected=3,
    window=9,
)
CONFIG = ModelConfig(dim=16, num_layers=2, hidden_dim=24, vocab_size=32, nsa=HEADS)
SHARED = CONFIG.replace(nsa=replace(HEADS, independent_kv=False, compression="linear"))
DENSE = CONFIG.replace(attention="dense")
UNTIED = CONFIG.replace(tied_embeddings=False)

CASES: dict[str, dict[str, Any]] = {
    "fsdp": {"dp": 2},
    "fsdp, checkpointing": {"dp": 2, "activation_checkpointing": True},
    "fsdp, recompute": {"dp": 2, "recompute": True},
    "fsdp, packed": {"dp": 2, "packed": True},
    "fsdp, head of its own": {"dp": 2, "config": UNTIED},
    "tp": {"tp": 2},
    "tp, checkpointing": {"tp": 2, "activation_checkpointing": True},
    "tp, packed": {"tp": 2, "packed": True},
    "tp, shared keys and values": {"tp": 2, "config": SHARED},
    "tp, dense": {"tp": 2, "config": DENSE},
    "tp of 4": {"tp": 4},
    "fsdp and tp": {"dp": 2, "tp": 2},
    "fsdp and tp, checkpointing": {"dp": 2, "tp": 2, "activation_checkpointing": True},
}
COMPILED = {
    "fsdp, compiled": {"dp": 2, "compiler": "aot_eager"},
    "tp, compiled": {"tp": 2, "compiler": "aot_eager"},
    "fsdp and tp, compiled": {"dp": 2, "tp": 2, "compiler": "aot_eager"},
}


def processes(case: dict[str, Any]) -> int:
    return case.get("dp", 1) * case.get("tp", 1)


def randomize(model: nn.Module) -> None:
    """Biases and norms too, or a mistake with one would not show."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn(x.shape, generator=generator, dtype=x.dtype), alpha=0.1)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def errors_of_a_step(
    dp: int = 1,
    tp: int = 1,
    packed: bool = False,
    config: ModelConfig = CONFIG,
    compiler: str | None = None,
    **options: Any,
) -> dict[str, float]:
    """How far loss and gradients are from those of one process, and which shapes differ."""
    torch.manual_seed(0)
    make = functools.partial(LanguageModel, config, dtype=torch.float64)
    alone, model = make(), make(**options)
    randomize(alone)
    model.load_state_dict(alone.state_dict())
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    if tp > 1:
        parallelize(model, mesh["tp"])
    if compiler is not None:
        model.compile_blocks(backend=compiler, dynamic=False)
    if dp > 1:
        shard(model, mesh["dp"])
    shapes = {name: x.shape for name, x in alone.state_dict().items()}
    assert {name: x.shape for name, x in model.state_dict().items()} == shapes

    generator = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(32, (4, 45), generator=generator) for _ in range(2))
    rank = mesh.get_local_rank("dp")
    mine = slice(rank * 4 // dp, (rank + 1) * 4 // dp)
    packing: dict[str, Any] = {}
    parts = tokens[mine], targets[mine]
    if packed:  # every sequence alone, one of them empty
        tokens, targets, *parts = (x.reshape(1, -1) for x in (tokens, targets, *parts))
        packing = {"cu_seqlens": _ends(45, 4 // dp), "max_seqlen": 45}
    wanted = alone.loss(tokens, targets, **(packing and {"cu_seqlens": _ends(45, 4)}))
    found = model.loss(*parts, **packing)
    wanted.backward()
    found.backward()
    mean = found.detach().clone()
    dist.all_reduce(mean)
    errors = {"loss": abs(float(mean / dist.get_world_size() - wanted))}
    for (name, x), (other, y) in zip(
        alone.named_parameters(), model.named_parameters(), strict=True
    ):
        assert name == other
        assert x.grad is not None
        assert y.grad is not None
        errors[name] = float((whole(y.grad) - x.grad).abs().max())
    return errors


def _ends(length: int, count: int) -> Tensor:
    ends = [length * i for i in range(count + 1)]
    return torch.tensor([*ends[:2], *ends[1:]], dtype=torch.int32)


def errors_of(names: list[str]) -> dict[str, dict[str, float]]:
    return {name: errors_of_a_step(**{**CASES, **COMPILED}[name]) for name in names}


@functools.cache
def together(count: int) -> dict[str, dict[str, float]]:
    """All cases of so many processes, which are started once."""
    names = [name for name, case in CASES.items() if processes(case) == count]
    return run_ranks(errors_of, count, names)[0]


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_one_process(name: str) -> None:
    errors = together(processes(CASES[name]))[name]
    assert len(errors) > 10
    assert max(errors.values()) < 1e-12, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_a_step_with_compiled_blocks(name: str) -> None:
    errors = run_ranks(errors_of, processes(COMPILED[name]), [name], timeout=300)[0][name]
    assert max(errors.values()) < 1e-12, errors


# A model of the user's own


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = NSAttention(16, HEADS, dtype=torch.float64)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).double()
        self.second = NSAttention(16, HEADS, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return self.second(x + self.mlp(x))


def own_model() -> tuple[list[str], float, float, int]:
    torch.manual_seed(0)
    alone, model = Own(), Own()
    randomize(alone)
    model.load_state_dict(alone.state_dict())
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = tensor_parallel_plan(model)
    parallelize_module(model, mesh["tp"], plan)
    fully_shard(model, mesh=mesh["dp"])
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    rank = mesh.get_local_rank("dp")
    wanted, found = alone(x), model(x[rank : rank + 1])
    wanted.square().mean().backward()
    found.square().mean().backward()
    error = max(
        float((whole(y.grad) - z.grad).abs().max())
        for y, z in zip(model.parameters(), alone.parameters(), strict=True)
    )
    heads = model.second.config.num_kv_heads
    return sorted(plan), float((found - wanted[rank : rank + 1]).abs().max()), error, heads


def test_the_plan_for_a_model_of_ones_own() -> None:
    names, output, gradients, heads = run_ranks(own_model, 4)[0]
    assert names == ["first", "second"]
    assert output < 1e-12
    assert gradients < 1e-12
    assert heads == 2  # of four


# What cannot be split


def refusals() -> dict[str, str]:
    two = init_device_mesh("cpu", (2,))
    told: dict[str, str] = {}

    def note(name: str, model: nn.Module) -> None:
        with pytest.raises(ConfigError) as caught:
            parallelize(model, two)
        told[name] = str(caught.value)

    odd = replace(HEADS, num_heads=6, num_kv_heads=3)
    note("heads", NSAttention(16, odd))
    note("recompute", NSAttention(16, HEADS, recompute=True))
    layer = NSAttention(16, HEADS)
    layer.o_proj = nn.Linear(32, 16)
    note("bias", layer)
    layer = NSAttention(16, HEADS)
    layer.k_proj["window"] = nn.Sequential(nn.Linear(16, 24))
    note("stand-in", layer)
    note("twice", parallelize(NSAttention(16, HEADS), two))
    note("features", LanguageModel(CONFIG.replace(hidden_dim=23)))
    return told


def test_what_cannot_be_split_is_refused() -> None:
    assert run_ranks(refusals, 2)[0] == {
        "heads": "tp: expected a divisor of num_kv_heads=3 (1, 3), got 2: the query heads of a "
        "group stay with their key/value head",
        "recompute": "recompute: expected False with tensor parallel, got True; checkpoint the "
        "block instead (activation_checkpointing)",
        "bias": "NSAttention.o_proj: expected no bias, which every process would add, got one",
        "stand-in": "NSAttention.k_proj.window: expected an nn.Linear to split, got Sequential",
        "twice": "NSAttention.q_proj.weight: expected a whole parameter, got a sharded one; apply "
        "tensor parallel once, and before fully_shard",
        "features": "SwiGLU.gate_proj: expected 2 processes to divide its 23 features, got a rest",
    }
