"""What a run logs of its attention: scalars, warnings, and no change of what is trained."""

import json

import pytest
import torch

from nsa import ConfigError
from nsa.inspection import Brief, complaints, record
from nsa.tools.train import __main__ as train
from nsa.training.attention_log import AttentionLog
from nsa.training.config import RunConfig
from nsa.training.data import load_corpus, validation_batches
from nsa.training.trainer import Trainer
from tests.support.training_runs import config_of, flags, metrics, write_texts


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data"))


@pytest.fixture
def trainer(data):
    config = config_of(data, num_layers=2)
    return Trainer(config, load_corpus(config.train.data))


def test_training_is_the_same_with_it_and_without(data, tmp_path, capsys):
    for name, more in (("with", ["--log-attention-every", "3"]), ("without", [])):
        assert train.main([*flags(data=data, steps=6), *more, "--out", str(tmp_path / name)]) == 0
    capsys.readouterr()
    lines = metrics(tmp_path / "with")
    attention = [line for line in lines if "attention.0.gate.window" in line]
    assert [line["step"] for line in attention] == [3, 6]
    assert [line for line in lines if line not in attention] == metrics(tmp_path / "without")
    assert set(attention[0]) == {
        *("step", "attention.seconds"),
        *(f"attention.0.gate.{branch}" for branch in ("compressed", "selected", "window")),
        *(f"attention.0.{x}" for x in ("overlap_token", "mass_kept", "same_a_block_later")),
    }
    del attention[0]["step"], attention[0]["attention.seconds"]
    assert all(0 <= x <= 1 for x in attention[0].values())


def test_the_sequence_is_always_the_same_and_nothing_is_drawn(trainer):
    log = AttentionLog(trainer)
    state = torch.get_rng_state()
    first, again = log.metrics()[0], log.metrics()[0]
    assert first.pop("attention.seconds") > 0
    assert again.pop("attention.seconds") > 0
    assert again == first
    assert torch.equal(torch.get_rng_state(), state)
    ((tokens, _),) = validation_batches(trainer.corpus, count=1, batch_size=1, seq_len=48)
    with torch.no_grad(), record(trainer.model) as recording:
        trainer.model(tokens)
    gates = recording.calls[1].gates[..., 2].mean()
    assert first["attention.1.gate.window"] == pytest.approx(float(gates), abs=1e-4)


def test_a_shut_gate_is_told_once(trainer):
    log = AttentionLog(trainer)
    assert log.metrics()[1] == []
    layer = trainer.model.blocks[1].attention
    with torch.no_grad():
        layer.gate_proj.weight.zero_()
        layer.gate_proj.bias.zero_()[0::3] = -4.0  # the compressed branch of every head
    _, told = log.metrics()
    text = "the compressed branch's gate is below 0.05 on average in layer 1 (0.018)"
    assert told == [text]
    assert log.metrics()[1] == []
    with torch.no_grad():
        layer.gate_proj.bias.zero_()
    assert log.metrics()[1] == []
    with torch.no_grad():
        layer.gate_proj.bias[0::3] = -4.0
    assert log.metrics()[1] == [text]


def test_lists_that_ignore_the_query_are_told(trainer):
    """Queries that are all zero score every block alike."""
    with torch.no_grad():
        for block in trainer.model.blocks:
            block.attention.q_proj.weight.zero_()
    (text,) = AttentionLog(trainer).metrics()[1]
    assert text.startswith("lists no longer depend on the query")
    assert text.endswith("at least 0.98 in layers 0-1 (1.000 to 1.000)")


def test_layers_are_named_in_runs():
    gates = dict.fromkeys(("compressed", "selected", "window"), 0.5)
    layers = [
        Brief(
            layer="",
            gates=gates | {"window": gate},
            overlap_token=None,
            mass_kept=None,
            same_a_block_later=None,
        )
        for gate in (0.01, 0.02, 0.5, 0.03)
    ]
    (text,) = complaints(layers)
    assert text.endswith("window branch's gate is below 0.05 on average in layers 0-1, 3 "
                         "(0.010 to 0.030)")  # fmt: skip


def test_it_may_change_on_resume_and_older_runs_have_none(data):
    stored = config_of(data)
    assert stored.differences(config_of(data, log_attention_every=5)) == []
    values = json.loads(json.dumps(stored.to_dict()))
    del values["train"]["log_attention_every"]
    assert RunConfig.from_dict(values) == stored


def test_mistakes_are_told(data):
    with pytest.raises(ConfigError, match="--log-attention-every: expected an int >= 1, got 0"):
        config_of(data, log_attention_every=0)
    text = "--log-attention-every: expected none with --attention dense, got 5"
    with pytest.raises(ConfigError, match=text):
        config_of(data, log_attention_every=5, attention="dense")
