"""The configuration of a run: what each setting may be, its files, what two runs differ in."""

import json
from dataclasses import fields, replace

import pytest

from nsa import ConfigError, NSAConfig
from nsa.models import ModelConfig
from nsa.training.config import RunConfig, TrainConfig

TRAIN = {
    "data": "x", "device": "cpu", "precision": "fp32", "seq_len": 8, "batch_size": 1, "steps": 20,
    "lr": 1.0, "warmup": 4, "eval_every": 1, "eval_windows": 1, "save_every": 1, "log_every": 1,
}  # fmt: skip
OTHERS = {
    "data": "y", "split": "files", "device": "cuda", "precision": "bf16", "backend": "sdpa",
    "seq_len": 9, "batch_size": 2, "steps": 21, "lr": 0.5, "warmup": 5, "accumulate": 2,
    "min_lr": 0.2, "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.7, "grad_clip": 2.0,
    "activation_checkpointing": True, "recompute": True, "compile": "blocks", "seed": 1,
    "eval_every": 2, "eval_windows": 3, "save_every": 4, "log_every": 5, "log_attention_every": 6,
    "keep": 7,
}  # fmt: skip
"""Another value for each setting."""
MODEL = ModelConfig(dim=32, num_layers=1, nsa=NSAConfig.preset("tiny"))
MOST = 2**63 - 1

# What is the last value on either side that is allowed, the first that is not, and what is said
LIMITS = [
    *((name, 1, 0, "an int >= 1") for name in (
        "seq_len", "batch_size", "steps", "accumulate", "eval_every", "eval_windows", "save_every",
        "log_every", "log_attention_every", "keep",
    )),
    *((name, 0, -1, "an int >= 0") for name in ("seed", "warmup")),
    *((name, MOST, MOST + 1, f"an int <= {MOST}") for name in (
        "seq_len", "batch_size", "steps", "warmup", "seed", "eval_every", "eval_windows",
        "save_every", "log_every", "log_attention_every", "keep",
    )),
    ("accumulate", 2**16, 2**16 + 1, f"an int <= {2**16}"),
    ("steps", 1, True, "an int >= 1"),
    ("steps", 1, 1.0, "an int >= 1"),
    ("steps", 1, None, "an int >= 1"),
    ("log_attention_every", None, "1", "an int >= 1"),
    ("data", "", 1, "str"),
    ("device", "", None, "str"),
    ("backend", None, 1, "str | None"),
    ("activation_checkpointing", False, 0, "bool"),
    ("recompute", True, None, "bool"),
    ("lr", 1e-9, 0, "a number > 0"),
    ("lr", 1e300, float("inf"), "a number > 0"),
    ("min_lr", 0, -1e-9, "a number in [0, 1]"),
    ("min_lr", 1, 1.1, "a number in [0, 1]"),
    ("weight_decay", 0, -1e-9, "a number >= 0"),
    ("beta1", 0, -1e-9, "a number in [0, 1)"),
    ("beta1", 0.999, 1, "a number in [0, 1)"),
    ("beta2", 0, -1e-9, "a number in [0, 1)"),
    ("beta2", 0.999, 1, "a number in [0, 1)"),
    ("grad_clip", 1e-9, 0, "a number > 0"),
    ("grad_clip", 1.0, float("nan"), "a number > 0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "good", "bad", "expected"), LIMITS)
def test_the_limits_of_a_setting(name, good, bad, expected):
    assert getattr(TrainConfig(**{**TRAIN, name: good}), name) == good
    with pytest.raises(ConfigError) as error:
        TrainConfig(**{**TRAIN, name: bad})
    assert str(error.value) == f"--{name.replace('_', '-')}: expected {expected}, got {bad!r}"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("split", ["bytes", "files"]),
        ("precision", ["fp32", "bf16"]),
        ("compile", ["none", "blocks", "model"]),
    ],
)
def test_settings_with_names(name, known):
    for value in known:
        assert getattr(TrainConfig(**{**TRAIN, name: value}), name) == value
    for bad in ("", None, known[0].upper()):
        with pytest.raises(ConfigError, match=f"^--{name}: expected one of the known names, got "):
            TrainConfig(**{**TRAIN, name: bad})


def test_rates():
    """Linear up, half a cosine down, and the last one for ever."""
    rate = TrainConfig(**{**TRAIN, "lr": 2.0, "min_lr": 0.1}).learning_rate
    assert [rate(step) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rate(8) == pytest.approx(2 * (0.1 + 0.9 * (0.5 + 0.5 * 0.5**0.5)))
    assert rate(12) == pytest.approx(1.1)
    assert rate(20) == rate(30) == pytest.approx(0.2)
    at_once = TrainConfig(**{**TRAIN, "warmup": 0}).learning_rate
    assert at_once(0) == 1.0
    only_warm = TrainConfig(**{**TRAIN, "warmup": 20}).learning_rate
    assert only_warm(19) == only_warm(20) == 1.0
    assert only_warm(21) == pytest.approx(0.1)


def test_a_query_can_see_all_of_a_region():
    """One as long as a sequence is seen by its last query."""
    tokens = 2 * MODEL.nsa.select_block
    model = replace(MODEL, nsa=replace(MODEL.nsa, select_regions=(2, 1)))
    RunConfig(model=model, train=TrainConfig(**{**TRAIN, "seq_len": tokens}))
    limit = f"regions of at most --seq-len={tokens - 1} tokens"
    with pytest.raises(ConfigError) as error:
        RunConfig(model=model, train=TrainConfig(**{**TRAIN, "seq_len": tokens - 1}))
    assert str(error.value) == f"--select-regions: expected {limit}, got {tokens}"


def test_files_hold_every_setting():
    assert OTHERS.keys() == {field.name for field in fields(TrainConfig)}
    config = RunConfig(model=MODEL, train=TrainConfig(**OTHERS))
    written = json.loads(json.dumps(config.to_dict()))
    assert written["train"] == OTHERS
    assert RunConfig.from_dict(written) == config


def test_files_of_earlier_versions():
    """They lack what was added later, and mean what was done then."""
    values = RunConfig(model=MODEL, train=TrainConfig(**OTHERS)).to_dict()
    for name in ("compile", "split", "log_attention_every", "recompute"):
        del values["train"][name]
    train = RunConfig.from_dict(values).train
    found = (train.compile, train.split, train.log_attention_every, train.recompute)
    assert found == ("none", "files", None, False)


def test_files_that_hold_something_else():
    values = RunConfig(model=MODEL, train=TrainConfig(**TRAIN)).to_dict()
    for part in ("model", "train"):
        for bad in (None, [], 3):
            with pytest.raises(ConfigError) as error:
                RunConfig.from_dict({**values, part: bad})
            assert str(error.value) == f"{part}: expected a table of values, got {bad!r}"
        with pytest.raises(ConfigError, match=f"^{part}: expected a table of values, got None$"):
            RunConfig.from_dict({name: values[name] for name in values if name != part})
    told = "^train: expected a value for each setting, got "
    for name in TRAIN:
        rest = {key: value for key, value in values["train"].items() if key != name}
        with pytest.raises(ConfigError, match=f"{told}none for '{name}'$"):
            RunConfig.from_dict({**values, "train": rest})
    with pytest.raises(ConfigError, match=f"{told}an unknown name for 'stepps'$"):
        RunConfig.from_dict({**values, "train": {**values["train"], "stepps": 1}})


@pytest.mark.parametrize("name", OTHERS)
def test_what_two_runs_differ_in(name):
    free = {
        *("data", "device", "eval_every", "eval_windows", "save_every"),
        *("log_every", "log_attention_every", "keep"),
    }
    mine = RunConfig(model=MODEL, train=TrainConfig(**{**TRAIN, "beta1": 0.5}))
    other = replace(mine, train=replace(mine.train, **{name: OTHERS[name]}))
    change = [f"{name} {getattr(mine.train, name)} -> {OTHERS[name]}"]
    assert mine.differences(other) == ([] if name in free or name == "compile" else change)
    assert mine.differences(other, rounding=True) == (change if name == "compile" else [])
    assert mine.differences(mine) == []


def test_what_two_models_differ_in():
    mine = RunConfig(model=MODEL, train=TrainConfig(**TRAIN))
    model = replace(MODEL, num_layers=2, nsa=replace(MODEL.nsa, window=77))
    assert sorted(mine.differences(replace(mine, model=model))) == [
        "num_layers 1 -> 2",
        f"window {MODEL.nsa.window} -> 77",
    ]


@pytest.mark.parametrize(
    ("changes", "flag"),
    [({"backend": "sdpa"}, "--backend"), ({"log_attention_every": 3}, "--log-attention-every")],
)
def test_dense_attention_has_neither_backends_nor_lists(changes, flag):
    dense, (value,) = replace(MODEL, attention="dense"), changes.values()
    RunConfig(model=MODEL, train=TrainConfig(**TRAIN, **changes))
    RunConfig(model=dense, train=TrainConfig(**TRAIN))
    with pytest.raises(ConfigError) as error:
        RunConfig(model=dense, train=TrainConfig(**TRAIN, **changes))
    assert str(error.value) == f"{flag}: expected none with --attention dense, got {value!r}"
