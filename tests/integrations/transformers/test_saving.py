"""``save_pretrained`` and ``from_pretrained``, through the Auto classes and without remote code."""

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
)
from transformers.distributed import DistributedConfig

from nsa import CheckpointError, ConfigError
from nsa.integrations.transformers import convert, models
from tests.support.tiny_models import CONFIG, KINDS, SHARED, dense, new_parts, tokens

GREEDY = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def quiet():
    from transformers.utils import logging

    logging.disable_progress_bar()


def converted(kind="Llama", config=CONFIG, **options):
    model = dense(kind, **options)
    convert(model, config)
    new_parts(model)
    return model


@pytest.mark.parametrize("config", [CONFIG, SHARED], ids=["independent", "shared"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_saved_and_loaded(kind, config, tmp_path):
    model, ids = converted(kind, config), tokens(2, 30)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "nsa"
    assert written["base_model_type"] == kind.lower()
    assert written["architectures"] == [f"NSA{kind}ForCausalLM"]
    assert written["nsa_config"] == json.loads(replace(config, rope_theta=None).key)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model) is getattr(models, f"NSA{kind}ForCausalLM")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, x in model.state_dict().items():
        assert torch.equal(x, loaded.state_dict()[name])
    assert loaded.generate(ids, **GREEDY).tolist() == model.generate(ids, **GREEDY).tolist()
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    assert AutoModelForCausalLM.from_config(again)(ids).logits.shape == (2, 30, 61)


def test_the_names_of_parameters():
    """What a checkpoint has: DESIGN's names, beside those of the dense model."""
    before = set(dense("Qwen3").state_dict())
    after = set(converted("Qwen3").state_dict())
    layer = "model.layers.0.self_attn."
    assert {name.removeprefix(layer) for name in before - after if name.startswith(layer)} == {
        "k_proj.weight",
        "v_proj.weight",
    }
    branches = ("compressed", "selected", "window")
    phi = ("position", "up.weight", "up.bias", "down.weight", "down.bias")
    assert {name.removeprefix(layer) for name in after - before if name.startswith(layer)} == {
        *(f"{part}.{branch}.weight" for part in ("k_proj", "v_proj") for branch in branches),
        *(f"{part}.{name}" for part in ("compress_k", "compress_v") for name in phi),
        "gate_proj.weight",
        "gate_proj.bias",
    }


def test_dtypes_and_devices_are_honoured(tmp_path):
    pytest.importorskip("accelerate")
    model, ids = converted(), tokens(1, 30)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {x.dtype for x in half.parameters()} == {torch.bfloat16}
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    torch.testing.assert_close(placed(ids).logits, model(ids).logits)


def test_a_model_split_over_devices(tmp_path):
    """Layers that are offloaded get their inputs moved by accelerate's hooks."""
    pytest.importorskip("accelerate")
    model, ids = converted(), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    model.save_pretrained(tmp_path / "model")
    split = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    split |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=split, offload_folder=tmp_path / "disk"
    )
    options = {**GREEDY, "attention_mask": mask}
    assert placed.generate(ids, **options).tolist() == model.generate(ids, **options).tolist()


def test_other_heads_of_the_model(tmp_path):
    model, ids = converted(tie_word_embeddings=True), tokens(2, 30)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "NSALlamaModel"
    torch.testing.assert_close(loaded(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_no_plan_for_parallel_tensors():
    """Neither of the layers nor of the head, which the dense model has."""
    assert dense().tp_plan
    assert not converted().tp_plan


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"tp_plan": "auto"}, "tp_plan: expected None .*, got 'auto'"),
        ({"tp_size": 2}, "tp_size: expected None .*, got 2"),
        (
            {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=2)},
            "tp_plan: expected None .*, got 'auto'",
        ),
    ],
)
def test_to_split_heads_over_devices_is_refused(tmp_path, options, got):
    """transformers would load the whole model on every device."""
    converted().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"{got}; fully_shard splits its parameters"):
        AutoModelForCausalLM.from_pretrained(tmp_path, **options)


def test_a_sharded_model_is_not_converted():
    model = dense()
    model.model.layers[1].self_attn.k_proj.weight.placements = ()
    with pytest.raises(ConfigError, match="layers.1.self_attn.k_proj: expected a whole weight"):
        convert(model, CONFIG)


def test_a_classifier(tmp_path):
    config = dense().config
    config.num_labels = 3
    model, ids = LlamaForSequenceClassification(config).eval(), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    convert(model, CONFIG)
    expected = model(ids, attention_mask=mask).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    torch.testing.assert_close(loaded(ids, attention_mask=mask).logits, expected)
    torch.testing.assert_close(loaded(ids[:1, 9:]).logits, expected[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head", ["TokenClassification", "QuestionAnswering"])
def test_heads_for_each_token(head, tmp_path):
    model, ids = getattr(transformers, f"LlamaFor{head}")(dense().config).eval(), tokens(2, 30)
    convert(model, CONFIG)
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, f"AutoModelFor{head}").from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    torch.testing.assert_close(loaded(ids)[0], model(ids)[0])


def test_copies_and_pickles():
    model, ids = converted(), tokens(1, 30)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(ids).logits, model(ids).logits)
        assert type(other) is type(model)
        assert other.model.layers[0].self_attn.q_proj is not model.model.layers[0].self_attn.q_proj


@pytest.mark.slow
def test_a_fresh_process_needs_this_import_alone(tmp_path):
    """And without it transformers does not know the model: nothing loads half."""
    model, ids = converted(), tokens(1, 30)
    model.save_pretrained(tmp_path)
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
except ValueError as error:
    assert "model type `nsa`" in str(error), error
else:
    raise SystemExit("loaded without nsa")
import nsa.integrations.transformers
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
print(model.generate(torch.tensor({ids.tolist()}), do_sample=False, max_new_tokens=16).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == model.generate(ids, **GREEDY).tolist()


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_checkpoints_of_another_configuration_are_refused(tmp_path):
    model = converted(config=SHARED)
    model.save_pretrained(tmp_path)
    shared = json.loads((tmp_path / "config.json").read_text())["nsa_config"]
    for changes, error, problem in (
        (
            {"nsa_config": {**shared, "compress_block": 4}},
            CheckpointError,
            "compress_k.position: expected [4, 8], got [8, 8]; nsa_config and sizes",
        ),
        (
            {"nsa_config": {**shared, "independent_kv": True}},
            CheckpointError,
            "k_proj.compressed.weight and 11 others; load a dense model as it is, then convert()",
        ),
        ({"nsa_config": {**shared, "num_heads": 8}}, ConfigError, "expected the model's 4, got 8"),
        ({"nsa_config": {**shared, "windw": 8}}, ConfigError, "did you mean 'window'?"),
        ({"nsa_config": None}, ConfigError, "expected the fields of an NSAConfig"),
        ({"base_model_type": "lama"}, CheckpointError, "a model type of transformers, got 'lama'"),
    ):
        edit(tmp_path, **{"nsa_config": shared, "base_model_type": "llama", **changes})
        with pytest.raises(error) as raised:
            AutoModelForCausalLM.from_pretrained(tmp_path)
        assert problem in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_dense_checkpoint_is_not_loaded_as_a_converted_one(tmp_path):
    dense().save_pretrained(tmp_path)
    config = converted().config
    with pytest.raises(CheckpointError, match="then convert"):
        models.NSALlamaForCausalLM.from_pretrained(tmp_path, config=config)
