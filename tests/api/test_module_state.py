"""What a layer carries: weights, settings, its last resolution; and how it is copied and saved."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from nsa import CheckpointError, DataError, NSAttention, SettingsError, use_settings
from tests.support.layers import CONFIG, DIM, VARIANTS, make_layer, problem


def saved_and_loaded(layer: NSAttention) -> NSAttention:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = NSAttention(DIM, layer.config, dtype=torch.float64)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize(
    "copied",
    [saved_and_loaded, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["state dict", "deepcopy", "pickle"],
)
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_copy_computes_the_same(
    config: object, copied: Callable[[NSAttention], NSAttention]
) -> None:
    layer, x = make_layer(config), problem(None).x  # type: ignore[arg-type]
    out = layer(x)  # before the copy, so that there is a resolution to take along
    twin = copied(layer)
    assert torch.equal(twin(x), out)
    assert {p.data_ptr() for p in twin.parameters()}.isdisjoint(
        p.data_ptr() for p in layer.parameters()
    )
    with torch.no_grad():
        twin.o_proj.weight.zero_()
    assert torch.equal(layer(x), out)


def test_a_copy_keeps_what_the_layer_is() -> None:
    with use_settings(backend="reference", check=True):
        layer = make_layer()
    layer(problem(None).x)
    twin = copy.deepcopy(layer)
    assert (twin.config, twin.settings, twin.dim) == (layer.config, layer.settings, DIM)
    assert str(twin.resolution) == str(layer.resolution) == "reference (NSA_BACKEND=reference)"


def test_weights_of_another_configuration_are_refused() -> None:
    state = make_layer().state_dict()
    with pytest.raises(RuntimeError, match="Missing key|Unexpected key"):
        make_layer(VARIANTS["shared kv"]).load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_layer(replace(CONFIG, value_dim=4)).load_state_dict(state)


# Versions of a state dict


def versioned(version: object) -> nn.Module:
    """What loads the state of a layer inside a model, saved as of a version; None: without one."""
    saved, model = make_layer(), nn.ModuleDict({"attention": make_layer()})
    state = nn.ModuleDict({"attention": saved}).state_dict()
    if version is None:
        state = dict(state)  # what safetensors keeps
    else:
        state._metadata["attention"]["version"] = version  # type: ignore[attr-defined]
    model.load_state_dict(state)
    assert torch.equal(model["attention"].q_proj.weight, saved.q_proj.weight)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("version", [None, 1])
def test_a_state_of_this_version_or_without_one_loads(version: int | None) -> None:
    model = versioned(version)
    assert model.state_dict()._metadata["attention"] == {"version": 1}  # type: ignore[attr-defined]


@pytest.mark.parametrize("version", [2, 0, True, "1", None])
def test_a_state_of_a_version_that_is_not_known_is_refused(version: object) -> None:
    layer = make_layer()
    state = layer.state_dict()
    state._metadata[""]["version"] = version  # type: ignore[attr-defined]
    message = f"expected a version up to 1, got {version!r}; upgrade nsa-torch"
    with pytest.raises(CheckpointError) as refused:
        layer.load_state_dict(state)
    assert str(refused.value) == f"state_dict of NSAttention: {message}"
    if version is not None:
        with pytest.raises(CheckpointError) as refused:
            versioned(version)
        assert str(refused.value) == f"state_dict of attention: {message}"


# Settings


def test_settings_are_bound_when_the_layer_is_built() -> None:
    x = problem(None).x
    with use_settings(backend="reference"):
        bound = make_layer()
    bound(x)
    free = make_layer()
    with use_settings(backend="reference"):
        free(x)
    assert bound.resolution is not None
    assert free.resolution is not None
    assert (bound.resolution.backend, free.resolution.backend) == ("reference", "sdpa")


def test_checks_are_bound_when_the_layer_is_built() -> None:
    x = torch.full((1, 5, DIM), float("nan"), dtype=torch.float64)
    with use_settings(check=True):
        checked = make_layer()
    with pytest.raises(DataError, match="^x: expected finite values"):
        checked(x)
    unchecked = make_layer()
    with use_settings(check=True):
        assert unchecked(x).isnan().all()


def test_the_argument_beats_the_settings() -> None:
    with use_settings(backend="reference"):
        layer = make_layer(backend="sdpa")
    layer(problem(None).x)
    assert str(layer.resolution) == "sdpa (backend='sdpa')"


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(SettingsError, match="did you mean 'sdpa'"):
        make_layer(backend="spda")(problem(None).x)


# Building


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_the_meta_device(config: object) -> None:
    layer = NSAttention(DIM, config, device="meta")  # type: ignore[arg-type]
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(float("nan"))
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())
    assert not layer.gate_proj.bias.any()
    assert layer(torch.ones(1, 9, DIM)).isfinite().all()


def test_the_dtype_and_device_of_parameters() -> None:
    layer = NSAttention(DIM, CONFIG, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}


def test_reset_parameters_draws_anew() -> None:
    layer = make_layer()
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    same = {name for name, x in layer.state_dict().items() if torch.equal(x, before[name])}
    assert same == set()


def test_the_layer_is_not_in_the_way_of_nn() -> None:
    model = nn.Sequential(make_layer(), nn.Linear(DIM, DIM, dtype=torch.float64))
    assert model(problem(None).x).shape == (2, 37, DIM)


def test_extra_repr_tells_what_it_is() -> None:
    layer = make_layer(backend="sdpa")
    assert layer.extra_repr() == f"dim={DIM}, backend='sdpa', {CONFIG!r}"
    text = repr(layer)
    assert text.startswith("NSAttention(")
    assert "num_selected=3" in text
    assert "(gate_proj): Linear" in text
