"""What a split layer is besides its step: copied, saved, tied, frozen, and how much it sends."""

from __future__ import annotations

import collections
import copy
import functools
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from nsa import ConfigError, NSAConfig, NSAttention
from nsa.distributed.data_parallel import shard
from nsa.distributed.tensor_parallel import (
    SplitHeads,
    SplitModule,
    parallelize,
    tensor_parallel_plan,
)
from nsa.models import LanguageModel
from tests.distributed.test_shards import CONFIG, HEADS, randomize, whole
from tests.support.processes import run_ranks


def attention(config: NSAConfig = HEADS) -> NSAttention:
    torch.manual_seed(0)
    layer = NSAttention(16, config, dtype=torch.float64)
    randomize(layer)
    return layer


def example() -> Tensor:
    return torch.randn(2, 40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def error_of_a_step(alone: nn.Module, split: nn.Module) -> float:
    """How far output and gradients, its input's too, are apart."""
    found = []
    for module in (alone, split):
        module.zero_grad()
        x = example().requires_grad_()
        out = module(x)
        out.square().mean().backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        found.append({"": out.detach(), "x": x.grad, **grads})
    assert found[0].keys() == found[1].keys()
    error = 0.0
    for name, wanted in found[0].items():
        if wanted is None:
            assert found[1][name] is None, name
        else:
            error = max(error, float((whole(found[1][name]) - wanted).abs().max()))
    return error


def errors_of_copies(mesh: DeviceMesh) -> dict[str, float]:
    """Whose weights does a copy of a split layer compute with, and whose gradients does it make?"""
    errors = {}
    for name, copied in (
        ("deepcopy", copy.deepcopy),
        ("pickle", lambda module: pickle.loads(pickle.dumps(module))),
    ):
        alone = attention()
        split = parallelize(attention(), mesh)
        other = copied(split)
        with torch.no_grad():
            for x in split.parameters():
                x.zero_()
        errors[name] = error_of_a_step(alone, other)
        assert all(x.grad is None for x in split.parameters())
    return errors


def errors_of_ties(mesh: DeviceMesh) -> dict[str, float]:
    def weights(layer: NSAttention) -> None:
        layer.k_proj["window"].weight = layer.k_proj["selected"].weight
        layer.compress_v.up.weight = layer.compress_k.up.weight

    def modules(layer: NSAttention) -> None:
        layer.k_proj["window"] = layer.k_proj["selected"]

    errors = {}
    for name, tie in (("weights", weights), ("modules", modules)):
        layers = [attention(replace(HEADS, value_dim=6)) for _ in range(2)]
        for layer in layers:
            tie(layer)
        parallelize(layers[1], mesh)
        errors[name] = error_of_a_step(*layers)
        tied = layers[1].k_proj
        assert tied["window"].weight is tied["selected"].weight
    return errors


def error_with_frozen(mesh: DeviceMesh) -> float:
    layers = [attention(), attention()]
    for layer in layers:
        layer.q_proj.requires_grad_(False)
        layer.compress_k.up.requires_grad_(False)
    parallelize(layers[1], mesh)
    return error_of_a_step(*layers)


class Scaled(nn.Module):
    """Whole parameters of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(16, 8, dtype=torch.float64)
        self.down = nn.Linear(8, 16, bias=False, dtype=torch.float64)
        self.coarse = nn.Parameter(torch.rand(16))
        self.fine = nn.Parameter(torch.rand(16, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x)) * self.coarse.double() * self.fine


def error_of_own_module(mesh: DeviceMesh) -> float:
    split = SplitModule(rows=("up",), columns=("down",))._apply(Scaled(), mesh)
    return error_of_a_step(Scaled(), split)


class Collectives(TorchDispatchMode):
    """Counts operators that send."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in op.namespace and "wait" not in op.name():
            self.counts[op.name()] += 1
        return op(*args, **(kwargs or {}))


def collectives_of_a_step(mesh: DeviceMesh) -> tuple[dict[str, int], dict[str, int]]:
    """Forward and backward of a model of two layers."""
    model = parallelize(LanguageModel(CONFIG), mesh)
    tokens = torch.zeros(1, 40, dtype=torch.int64)
    with Collectives() as forward:
        loss = model.loss(tokens, tokens)
    with Collectives() as backward:
        loss.backward()
    return dict(forward.counts), dict(backward.counts)


def told_by(call: Any, *arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return str(caught.value)


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    told = {}
    layer = attention()
    layer.o_proj.weight = nn.Parameter(layer.q_proj.weight.detach()[:16, :32].clone())
    layer.k_proj["window"].weight = nn.Parameter(torch.zeros(16, 32))
    layer.o_proj.weight = layer.k_proj["window"].weight
    told["two splits of one weight"] = told_by(parallelize, layer, mesh)
    model = LanguageModel(CONFIG)
    model.blocks[1].mlp.up_proj.weight = model.blocks[0].mlp.up_proj.weight
    told["two layers"] = told_by(tensor_parallel_plan, model)
    model = LanguageModel(CONFIG)
    model.head = nn.Linear(16, 24, bias=False)
    model.head.weight = model.blocks[0].mlp.up_proj.weight
    told["a layer and the head"] = told_by(tensor_parallel_plan, model)
    two = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    layer, unnamed = attention(), init_device_mesh("cpu", (1, 2))
    told["no mesh"] = told_by(parallelize, layer, None)
    told["two dimensions"] = told_by(parallelize, layer, two)
    told["two without names"] = told_by(parallelize_module, layer, unnamed, SplitHeads())
    told["no layer"] = told_by(parallelize, nn.Linear(4, 4), mesh)
    told["no model"] = told_by(shard, nn.Linear(4, 4), mesh)
    told["a group to shard over"] = told_by(shard, LanguageModel(CONFIG), "dp")
    parallelize(layer, mesh).recompute = True
    told["recompute, later"] = told_by(layer, example())
    told["input by another name"] = told_by(
        lambda: parallelize(attention(), mesh)(hidden_states=example())
    )
    return told


def everything() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    functions = (
        errors_of_copies,
        errors_of_ties,
        error_with_frozen,
        error_of_own_module,
        collectives_of_a_step,
        refusals,
    )
    return {function.__name__: function(mesh) for function in functions}


@functools.cache
def found() -> dict[str, Any]:
    return run_ranks(everything, 2)[0]


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_computes_with_its_own_weights(way: str) -> None:
    assert found()["errors_of_copies"][way] < 1e-12


@pytest.mark.parametrize("tied", ["weights", "modules"])
def test_what_shares_a_weight_in_a_layer_shares_its_part(tied: str) -> None:
    assert found()["errors_of_ties"][tied] < 1e-12


def test_frozen_parameters_get_no_gradient() -> None:
    assert found()["error_with_frozen"] < 1e-12


def test_whole_parameters_of_two_dtypes() -> None:
    assert found()["error_of_own_module"] < 1e-6


def test_a_layer_sends_twice_forward_and_three_times_backward() -> None:
    """Each half's output; each half's input, and all of φ at once."""
    forward, backward = found()["collectives_of_a_step"]
    assert forward == {"_c10d_functional::all_reduce": 2 * 2}
    assert backward == {"_c10d_functional::all_reduce": 2 * 3}


def test_what_is_refused() -> None:
    assert found()["refusals"] == {
        "two splits of one weight": "NSAttention.o_proj.weight: expected a weight that is split "
        "one way, got one that is k_proj.window.weight, too; untie them",
        "two layers": "blocks.0.mlp.up_proj.weight: expected a weight of one layer to split, got "
        "one that is blocks.1.mlp.up_proj.weight, too; untie them",
        "a layer and the head": "blocks.0.mlp.up_proj.weight: expected a weight of one layer to "
        "split, got one that is head.weight, too; untie them",
        "no mesh": "mesh: expected a DeviceMesh of one dimension, got None; "
        'init_device_mesh("cuda", (processes,)) makes one',
        "two dimensions": "mesh: expected one dimension, got 2; take mesh['tp']",
        "two without names": "mesh: expected one dimension, got 2; take a mesh with "
        "mesh_dim_names, by one name",
        "no layer": "model: expected a layer to split (NSAttention, DenseAttention or SwiGLU of "
        "nsa), got none in Linear; parallelize_module splits others",
        "no model": "model: expected a LanguageModel, got Linear; fully_shard of "
        "torch.distributed.fsdp takes any other",
        "a group to shard over": "mesh: expected a DeviceMesh of one dimension, got 'dp'; "
        'init_device_mesh("cuda", (processes,)) makes one',
        "input by another name": "NSAttention: expected its input as the first argument with "
        "tensor parallel, got hidden_states; such a layer cannot be split",
        "recompute, later": "recompute: expected False with tensor parallel, got True; checkpoint "
        "the block instead (activation_checkpointing)",
    }
