"""Converted models on a GPU: the kernels, graphs of decode apart, do what the CPU does."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from nsa import NSAConfig
from nsa.integrations.transformers import convert
from tests.integrations.transformers.test_listed import m3, run
from tests.support.tiny_models import CONFIG, KINDS, SHARED, Own, dense, new_parts, tokens

pytestmark = pytest.mark.gpu

LARGER = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64}
"""Heads that every kernel takes."""


def larger(kind, **options):
    model = dense(
        kind, hidden_size=256, num_attention_heads=8, num_key_value_heads=2, head_dim=64, **options
    )
    return model.cuda()


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_equal_start(kind):
    model, ids = larger(kind, initializer_range=0.05), tokens(2, 500).cuda()
    expected = model(ids, labels=ids)
    made = convert(model, NSAConfig(**LARGER, independent_kv=False), start="dense-equal")
    assert made.dense_length == 512
    found = model(ids, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-3, rtol=1e-3)
    assert model.model.layers[0].self_attn.resolution.backend == "compiled"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flat", [False, True])
def test_losses_and_gradients_are_the_cpus(kind, flat):
    model = larger(kind, initializer_range=0.05)
    convert(model, NSAConfig(**LARGER, num_selected=4, window=64), trainable="all")
    ids = tokens(1, 900)
    batch = {"input_ids": ids, "labels": ids}
    if flat:
        batch["position_ids"] = torch.cat([torch.arange(n) for n in (400, 70, 430)])[None]
    losses, grads = [], []
    for device in ("cuda", "cpu"):
        model.to(device).zero_grad()
        out = model(**{name: x.to(device) for name, x in batch.items()})
        out.loss.backward()
        losses.append(out.loss.item())
        grads.append({name: x.grad.cpu() for name, x in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, grad in grads[1].items():
        assert (grads[0][name] - grad).norm() <= 2e-2 * grad.norm() + 1e-6, name


@pytest.mark.parametrize("config", [CONFIG, SHARED])
@pytest.mark.parametrize("padded", [False, True])
def test_generation(config, padded):
    model = dense()
    convert(model, config)
    new_parts(model)
    model.cuda()
    lengths = (5, 37, 20) if padded else (37, 37, 37)
    prompts = [tokens(1, T, seed=i)[0].tolist() for i, T in enumerate(lengths)]
    ids = torch.tensor([[0] * (37 - len(prompt)) + prompt for prompt in prompts]).cuda()
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": (ids != 0).long()}
    expected = Own(model.cpu()).generate(prompts, 24)
    for more in ({}, {"cache_implementation": "static"}, {"cache_implementation": "offloaded"}):
        found = model.cuda().generate(ids, **options, **more)
        assert found[:, 37:].tolist() == expected


def test_the_layers_of_minimax_m3():
    ids = tokens(2, 300).cuda()
    options = {"head_dim": 64, "rotary_dim": 32, "index_block_size": 32}
    expected, found = (
        run(m3(name, torch.float32, **options).cuda(), ids) for name in ("eager", "nsa")
    )
    torch.testing.assert_close(found[0], expected[0], atol=2e-3, rtol=2e-3)
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).norm() <= 2e-2 * grad.norm() + 1e-6, name
