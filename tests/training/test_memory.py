"""What a run takes at least, beside what there is."""

import math

import pytest

from nsa import ConfigError
from nsa.models import LanguageModel, ModelConfig
from nsa.training import memory
from nsa.training.memory import memory_bytes, num_parameters, require_memory_to_train
from tests.support.training_runs import config_of

SMALL = {"dim": 24, "num_layers": 3}
HEADS = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 8, "value_dim": 12}


@pytest.mark.parametrize(
    ("changes", "nsa"),
    [
        ({}, {}),
        ({"num_layers": 1, "hidden_dim": 7, "vocab_size": 11}, {}),
        ({"tied_embeddings": False}, {"compression": "linear"}),
        ({}, {"compression": "mean", "independent_kv": False}),
        ({"attention": "dense"}, {}),
    ],
)
def test_parameters_are_counted_without_a_model(changes, nsa):
    config = ModelConfig.preset("tiny", **{**SMALL, **changes})
    config = config.replace(nsa=type(config.nsa).preset("tiny", **HEADS, **nsa))
    assert num_parameters(config) == LanguageModel(config).num_parameters()


def test_memory_of_this_machine():
    assert 2**30 < memory_bytes() < 2**50


def test_a_container_has_less(monkeypatch, tmp_path):
    for name, text in (("a", "max\n"), ("b", f"{2**30}\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_LIMITS", (str(tmp_path / "a"), str(tmp_path / "no")))
    assert memory_bytes() > 2**30
    monkeypatch.setattr(memory, "_LIMITS", (str(tmp_path / "a"), str(tmp_path / "b")))
    assert memory_bytes() == 2**30


@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}, {"precision": "bf16"}])
def test_the_least_is_no_more_than_it_takes(tmp_path, monkeypatch, changes):
    """Counted by hand for one layer of d 32, 2 heads of 16 and a hidden layer of 64."""
    checkpointing = changes.pop("activation_checkpointing", False)
    config = config_of(tmp_path, hidden_dim=64, **changes)
    object.__setattr__(config.train, "activation_checkpointing", checkpointing)
    tokens, size = 2 * 48, 2 if changes else 4
    kept = 32 if checkpointing else 32 + 32 + 2 * 64 + 32
    least = 16 * num_parameters(config.model) + 16 * tokens + size * tokens * (kept + 256)
    for there in (least, math.inf):
        monkeypatch.setattr(memory, "memory_bytes", lambda there=there: there)
        require_memory_to_train(config)
    monkeypatch.setattr(memory, "memory_bytes", lambda: least - 1)
    with pytest.raises(ConfigError, match="expected what fits into the 0.0 GiB of memory here, "):
        require_memory_to_train(config)


@pytest.mark.parametrize(
    ("sizes", "least"),
    [
        ({"dp": 2}, 16 // 2 * 1000 + 16 * 96 + 4 * 96 * (32 + 32 + 96 + 256)),
        ({"cp": 2}, 16 // 2 * 1000 + 16 * 192 + 4 * 96 * (32 + 32 + 96 + 256)),
        ({"tp": 2}, 16 // 2 * 1000 + 16 * 192 + 4 * 192 * (32 + 32 + 48 + 256)),
        ({"dp": 2, "cp": 2}, 16 // 4 * 1000 + 16 * 96 + 4 * 48 * (32 + 32 + 96 + 256)),
    ],
)
def test_a_process_of_a_mesh_has_its_part(tmp_path, monkeypatch, sizes, least):
    """One layer of d 32, 2 heads of 16 and a hidden layer of 32, and 4 sequences of 48."""
    config = config_of(tmp_path, hidden_dim=32, batch_size=4)

    def require(there, parameters=1000, here=1):
        monkeypatch.setattr(memory, "num_parameters", lambda model: parameters)
        monkeypatch.setattr(memory, "memory_bytes", lambda: there)
        require_memory_to_train(config, {"dp": 1, "cp": 1, "tp": 1, **sizes}, here)

    require(least)
    require(3 * least, here=3)
    with pytest.raises(ConfigError, match="bytes of text in a pass, which take"):
        require(least - 1)
    with pytest.raises(ConfigError, match="in a pass of each of 3 processes, which take"):
        require(3 * least - 1, here=3)
    whole = 4 * 10**9 + 16 * 4 // sizes.get("dp", 1) * 48  # of a model that is split later
    with pytest.raises(ConfigError):
        require(whole - 1, 10**9)


def test_a_gpu_says_itself_that_it_is_full(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    object.__setattr__(config.train, "device", "cuda")
    least = 4 * num_parameters(config.model) + 16 * 2 * 48
    monkeypatch.setattr(memory, "memory_bytes", lambda: least)
    require_memory_to_train(config)
    monkeypatch.setattr(memory, "memory_bytes", lambda: least - 1)
    with pytest.raises(ConfigError):
        require_memory_to_train(config)
