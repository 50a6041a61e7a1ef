"""``recompute=True``: the same gradients to the bit, less kept for the backward pass."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from nsa import ConfigError, NSAttention, use_settings
from nsa.backends.sdpa import steps
from nsa.core import compile as core_compile
from nsa.models import LanguageModel, ModelConfig
from tests.support.layers import CONFIG, DIM

CASES = {
    "mlp": {},
    "linear, softmax": {"compression": "linear", "gate": "softmax"},
    "mean, shared, no RoPE": {
        "compression": "mean",
        "independent_kv": False,
        "rope_theta": None,
    },
}


def gradients(layer: NSAttention, x: torch.Tensor, call) -> list[torch.Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = call(x)
    out.backward(torch.ones_like(out).cumsum(1))
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters())]


def pair(backend: str, **changes) -> tuple[NSAttention, NSAttention]:
    """The layer that keeps, and the one that computes again, of the same weights."""
    with use_settings(fa2_provider="math"):
        layers = [
            NSAttention(DIM, replace(CONFIG, **changes), backend=backend, recompute=again)
            for again in (False, True)
        ]
    layers[1].load_state_dict(layers[0].state_dict())
    return layers[0], layers[1]


@pytest.mark.parametrize("packed", [False, True], ids=["regular", "packed"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["sdpa", "fa2-varlen", "reference"])
def test_gradients_are_the_same_to_the_bit(backend: str, case: str, packed: bool) -> None:
    x = torch.randn(1 if packed else 2, 50, DIM)
    where = {"cu_seqlens": torch.tensor([0, 20, 50], dtype=torch.int32)} if packed else {}
    keeps, again = pair(backend, **CASES[case])
    expected = gradients(keeps, x, lambda x: keeps(x, **where))
    for mine, theirs in zip(
        gradients(again, x, lambda x: again(x, **where)), expected, strict=True
    ):
        assert torch.equal(mine, theirs)


def test_the_lists_are_not_selected_again(monkeypatch) -> None:
    select, calls = steps.select_impl, []

    def counted(*inputs):
        calls.append(1)
        return select(*inputs)

    monkeypatch.setattr(steps, "select_impl", counted)
    _, again = pair("sdpa")
    gradients(again, torch.randn(1, 50, DIM), again)
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_in_a_whole_graph() -> None:
    torch._dynamo.reset()
    keeps, again = pair("sdpa")
    x = torch.randn(1, 50, DIM)
    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(again, x, compiled), gradients(keeps, x, keeps))
    assert again.resolution is not None
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_where_the_layer_compiles_itself(monkeypatch, caplog) -> None:
    monkeypatch.setattr(core_compile, "COMPILER", "aot_eager")
    keeps, again = pair("compiled")
    x = torch.randn(1, 50, DIM)
    torch.testing.assert_close(gradients(again, x, again), gradients(keeps, x, keeps))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    torch._dynamo.reset()


def test_a_model_whose_layers_compute_again() -> None:
    found = []
    for again in (False, True):
        torch.manual_seed(3)
        model = LanguageModel(
            ModelConfig(dim=DIM, num_layers=2, nsa=CONFIG), backend="sdpa", recompute=again
        )
        tokens = torch.arange(40)[None]
        model.loss(tokens, tokens.roll(1)).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("options", "attention", "other"),
    [
        ({"activation_checkpointing": True}, "nsa", "activation_checkpointing=True"),
        ({}, "dense", "dense attention"),
    ],
)
def test_a_model_that_cannot_gain_refuses(options, attention, other) -> None:
    config = ModelConfig(dim=DIM, num_layers=1, nsa=CONFIG, attention=attention)
    with pytest.raises(ConfigError, match=f"recompute: expected False with {other}, got True"):
        LanguageModel(config, recompute=True, **options)


def test_a_value_that_is_no_bool() -> None:
    with pytest.raises(ConfigError, match="recompute: expected True or False, got 'yes'"):
        NSAttention(DIM, CONFIG, recompute="yes")  # type: ignore[arg-type]
