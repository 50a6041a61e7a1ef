"""Converting: what is reused, what is new, and two starts."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from nsa import NSAConfig
from nsa.core.inputs import BRANCHES
from nsa.integrations.transformers import NSASelfAttention, convert
from tests.support.tiny_models import CONFIG, KINDS, SHARED, Own, dense, new_parts, tokens

NEW = ("gate_proj", "compress_k", "compress_v")


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("independent_kv", [False, True])
@pytest.mark.parametrize("compression", ["mlp", "linear"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_equal_start_gives_the_dense_model(kind, compression, independent_kv):
    model, ids = dense(kind).double(), tokens(2, 16)
    expected, logits = gradients(model, ids), model(ids).logits
    config = replace(CONFIG, compression=compression, independent_kv=independent_kv)
    made = convert(model, config, start="dense-equal", trainable="all")
    assert made.dense_length == 16
    assert_close(model(ids).logits, logits)
    found = gradients(model, ids)
    for name, grad in expected.items():
        if independent_kv and ("k_proj" in name or "v_proj" in name):
            before, after = name.rsplit(".", 1)
            parts = [found[f"{before}.{branch}.{after}"] for branch in BRANCHES]
            assert_close(sum(parts), grad)
        else:
            assert_close(found[name], grad)


def assert_close(found, expected):
    """In fp64: §6 allows 1e-12 of the terms' norm, of which the sum's is a part."""
    assert (found - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_equal_start_is_as_accurate_as_the_dense_model(kind, dtype):
    """The rule of docs/accuracy.md, the dense model in the same dtype being the plain one."""
    ids, results = tokens(2, 16), []
    for converted, kept in ((False, torch.float64), (False, dtype), (True, dtype)):
        model = dense(kind).to(dtype).to(kept)  # the same weights
        if converted:
            convert(model, SHARED, start="dense-equal", trainable="all")
        results.append((model(ids).logits, gradients(model, ids)))
    (truth, grads), (plain, plain_grads), (found, found_grads) = results
    f = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 4

    def hold(x, x_plain, x_true, c):
        error, allowed = (x.double() - x_true).norm(), (x_plain.double() - x_true).norm()
        assert error <= c * allowed + f * x_true.norm()

    hold(found, plain, truth, 2)
    for name, grad in grads.items():
        hold(found_grads[name], plain_grads[name], grad, 3)


def test_a_dense_equal_start_is_stuck_nowhere():
    model = dense()
    made = convert(model, SHARED, start="dense-equal", trainable="all")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ids = tokens(2, 30)
    before = {name: model.get_parameter(name).detach().clone() for name in made.new}
    for _ in range(3):
        gradients(model, ids)
        optimizer.step()
    still = [name for name in made.new if torch.equal(model.get_parameter(name), before[name])]
    assert still == []


def test_longer_inputs_are_sparse():
    model, ids = dense(), tokens(1, 60)
    logits = model(ids).logits
    convert(model, SHARED, start="dense-equal")
    found = model(ids).logits
    torch.testing.assert_close(found[:, :16], logits[:, :16], atol=1e-4, rtol=1e-4)
    assert (found - logits)[:, 30:].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_is_the_librarys_layers(kind):
    model, ids = dense(kind), tokens(2, 50)
    convert(model, CONFIG)
    new_parts(model)
    torch.testing.assert_close(model(ids).logits, Own(model)(ids), atol=1e-4, rtol=1e-4)


def test_the_paper_start_copies_keys_and_values_and_takes_means():
    model = dense()
    keys = model.model.layers[0].self_attn.k_proj.weight.clone()
    made = convert(model, CONFIG)
    layer = model.model.layers[0].self_attn
    assert set(made.copied) == {
        f"model.layers.{i}.self_attn.{part}.{branch}.weight"
        for i in range(2)
        for part in ("k_proj", "v_proj")
        for branch in ("compressed", "selected")
    }
    for branch in ("compressed", "selected", "window"):
        assert torch.equal(layer.k_proj[branch].weight, keys)
    assert len({layer.k_proj[branch].weight.data_ptr() for branch in layer.k_proj}) == 3
    x = torch.randn(1, 24, 2, 8)
    means = x.unfold(1, 8, 4).mean(-1)
    for phi in (layer.compress_k, layer.compress_v):
        torch.testing.assert_close(phi(x), means)
    assert layer.gate_proj.bias.eq(0).all()
    assert layer.gate_proj.weight.ne(0).all()


def test_the_default_configuration_has_the_models_heads():
    made = convert(dense())
    assert made.config == NSAConfig(num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=None)
    shared = convert(dense(), start="dense-equal")
    assert shared.config == replace(made.config, independent_kv=False)
    assert shared.dense_length == 512


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ("new", lambda name: any(f".{part}." in name and ".mlp." not in name for part in NEW)),
        ("attention", lambda name: ".self_attn." in name),
        ("all", lambda name: True),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_exactly_what_is_trainable(kind, trainable, expected):
    model = dense(kind)
    made = convert(model, CONFIG, trainable=trainable)
    names = {name for name, _ in model.named_parameters()}
    found = gradients(model, tokens(2, 40))
    assert set(found) == {name for name in names if expected(name)} == set(made.trainable)
    assert all(grad.abs().max() > 0 for grad in found.values())
    assert set(made.new) == {name for name in names if expected(name)} or trainable != "new"


def test_scaled_rope_and_biases_are_kept():
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    model, ids = dense(rope_parameters=rope, attention_bias=True), tokens(2, 16)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith("bias"):
                x.normal_()
    logits = model(ids).logits
    convert(model, SHARED, start="dense-equal")
    torch.testing.assert_close(model(ids).logits, logits, atol=1e-4, rtol=1e-4)


def test_the_models_scale_is_taken():
    model, ids = dense(), tokens(1, 16)
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.5
    logits = model(ids).logits
    made = convert(model, SHARED, start="dense-equal")
    assert made.config.scale == 0.5
    torch.testing.assert_close(model(ids).logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "flex_attention", "nsa"])
def test_the_attention_that_a_model_had_does_not_matter(attention):
    model, ids = dense(), tokens(1, 16)
    logits = model(ids).logits
    model.set_attn_implementation(attention)
    convert(model, SHARED, start="dense-equal")
    torch.testing.assert_close(model(ids).logits, logits, atol=1e-4, rtol=1e-4)


def test_half_types_and_backends():
    model = dense().bfloat16()
    made = convert(model, CONFIG, backend="reference")
    layer = model.model.layers[0].self_attn
    assert isinstance(layer, NSASelfAttention)
    assert {model.get_parameter(name).dtype for name in made.new} == {torch.bfloat16}
    assert model(tokens(1, 20)).logits.dtype == torch.bfloat16
    assert layer.resolution.backend == "reference"
