"""What a trainer starts from, gives to a checkpoint, and takes back."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nsa import CheckpointError
from nsa.training.checkpoint_format import Checkpoint
from nsa.training.data import load_corpus, validation_batches
from nsa.training.trainer import GROUPS, Trainer
from nsa.training.trainer import config_of as config_in
from tests.support.training_runs import config_of, write_texts


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data"))


def trainer_of(data, **changes):
    return Trainer(config_of(data, **changes), load_corpus(str(data)))


def checkpoint_of(trainer, **changes):
    tensors = {group: dict(named) for group, named in trainer.tensors().items()}
    values = {"path": Path("P"), "step": trainer.step, "state": trainer.state(), "tensors": tensors}
    return Checkpoint(**{**values, **changes})


@pytest.mark.parametrize(("seed", "of_numpy"), [(5, 5), (2**32 + 6, 6), (2**32 - 1, 2**32 - 1)])
def test_a_seed_decides_every_generator(data, seed, of_numpy):
    trainers = [trainer_of(data, seed=seed) for _ in range(2)]
    drawn = random.random(), np.random.random_sample()
    assert drawn == (random.Random(seed).random(), np.random.RandomState(of_numpy).random_sample())
    torch.manual_seed(1)
    trainers += [trainer_of(data, seed=seed), trainer_of(data, seed=seed + 1)]
    first, second, third, other = (trainer.model.state_dict() for trainer in trainers)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        assert torch.equal(tensor, third[name])
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_a_new_trainer(data):
    trainer = trainer_of(data, batch_size=3, accumulate=2, seq_len=40)
    assert (trainer.step, trainer.tokens_per_step) == (0, 3 * 2 * 40)
    assert trainer.device == torch.device("cpu")
    assert trainer.corpus.source == str(data)
    assert all(group["fused"] for group in trainer.optimizer.param_groups)


def test_its_model_is_that_of_the_configuration(data):
    model = trainer_of(data, backend="reference").model
    model(torch.zeros(1, 40, dtype=torch.int64))
    assert model.resolution.backend == "reference"


def test_modes_of_the_model(data):
    trainer, seen = trainer_of(data), []
    trainer.model.register_forward_pre_hook(lambda model, _: seen.append(model.training))
    trainer.validate()
    trainer.train_step()
    assert seen == [False, False, True]
    assert trainer.model.training


def test_gradients_of_before_are_forgotten(data):
    results = []
    for before in (None, 1e3):
        trainer = trainer_of(data)
        for parameter in trainer.model.parameters():
            parameter.grad = None if before is None else torch.full_like(parameter, before)
        results.append(float(trainer.train_step().grad_norm))
    assert results[0] == results[1]


def test_validation_is_the_mean_over_its_windows(data):
    """Batches of 3, 3 and 1."""
    trainer = trainer_of(data, eval_windows=7, batch_size=3)
    windows = list(validation_batches(trainer.corpus, count=7, batch_size=1, seq_len=48))
    assert len(windows) == 7
    with torch.no_grad():
        losses = [float(trainer.model.eval().loss(*window)) for window in windows]
    assert trainer.validate() == pytest.approx(sum(losses) / 7, rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_precision(data, precision):
    trainer, seen = trainer_of(data, precision=precision), []

    def look(*_):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))

    trainer.model.register_forward_pre_hook(look)
    torch.set_autocast_dtype("cpu", torch.float16)
    try:
        trainer.train_step()
    finally:
        torch.set_autocast_dtype("cpu", torch.bfloat16)
    assert seen == [(precision == "bf16", torch.bfloat16)]


def test_what_a_checkpoint_gets(data):
    trainer = trainer_of(data, accumulate=2)
    trainer.train_step()
    random.gauss(0, 1)
    np.random.standard_normal()
    state, tensors = trainer.state(), trainer.tensors()
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    assert state == {
        "config": trainer.config.to_dict(),
        "data": {
            "source": str(data),
            "sha256": load_corpus(str(data)).fingerprint,
            "next_batch": 2,
        },
        "rng": {
            "python": [version, list(words), gauss],
            "numpy": [position, has_gauss, cached],
        },
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "threads": torch.get_num_threads(),
    }
    assert has_gauss == 1
    assert gauss is not None
    assert tuple(tensors) == GROUPS
    assert tensors["rng"].keys() == {"torch_cpu", "numpy"}
    assert torch.equal(tensors["rng"]["torch_cpu"], torch.get_rng_state())
    assert tensors["rng"]["numpy"].dtype == torch.int64
    assert tensors["rng"]["numpy"].tolist() == keys.tolist()


@pytest.mark.parametrize("gauss", [False, True])
def test_generators_go_on(data, gauss):
    """Also from their very first word, and with or without a number in reserve."""
    trainer = trainer_of(data)
    trainer.train_step()
    np.random.set_state(("MT19937", np.random.get_state()[1], 0 if gauss else 624, 0, 0.0))
    if gauss:
        random.gauss(0, 1)
        np.random.standard_normal()
    checkpoint = checkpoint_of(trainer)

    def draws():
        return random.gauss(0, 1), np.random.standard_normal(), float(torch.rand(()))

    expected = draws()
    trainer_of(data).restore(checkpoint)
    assert draws() == expected


def test_a_first_word_of_numpy(data):
    trainer = trainer_of(data)
    trainer.train_step()
    checkpoint = checkpoint_of(trainer)
    checkpoint.state["rng"]["numpy"][0] = 0
    trainer.restore(checkpoint)
    assert np.random.get_state()[2] == 0


def test_the_generator_of_a_gpu(data, monkeypatch):
    """Stands in for one: what is asked of torch, and for which device."""
    trainer, asked = trainer_of(data), []
    cpu_only = checkpoint_of(trainer)
    state = torch.arange(16, dtype=torch.uint8)
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda device: (asked.append(device), state)[1])
    monkeypatch.setattr("torch.cuda.set_rng_state", lambda *given: asked.append(given))
    trainer.device = torch.device("cuda:3")
    checkpoint = checkpoint_of(trainer)
    assert checkpoint.tensors["rng"]["torch_cuda"] is state
    assert asked == [trainer.device]
    trainer._restore_rng(cpu_only)  # of a run that moves to a GPU
    trainer._restore_rng(checkpoint)
    assert asked == [trainer.device, (state, trainer.device)]
    trainer.device = torch.device("cpu")
    trainer._restore_rng(checkpoint)  # and from one
    assert len(asked) == 2


def test_what_is_restored(data):
    """A copy of everything, where the model is; the same next step."""
    trainer = trainer_of(data, accumulate=2)
    for _ in range(2):
        trainer.train_step()
    checkpoint = checkpoint_of(trainer)
    saved = {group: {k: v.clone() for k, v in x.items()} for group, x in trainer.tensors().items()}
    checkpoint = replace(checkpoint, tensors=saved)
    resumed = trainer_of(data, accumulate=2)
    resumed.restore(checkpoint)
    assert resumed.step == 2
    for group in ("model", "optimizer"):
        found = resumed.tensors()[group]
        assert found.keys() == saved[group].keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, saved[group][name])
            assert tensor.data_ptr() != saved[group][name].data_ptr()
    first, second = trainer.train_step(), resumed.train_step()
    assert torch.equal(first.loss, second.loss)
    for mine, other in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_count_of_steps_lies_where_the_trainer_is(data):
    trainer = trainer_of(data)
    trainer.train_step()
    checkpoint = checkpoint_of(trainer)
    trainer.device = torch.device("meta")
    trainer.restore(checkpoint)
    assert all(state["step"].is_meta for state in trainer.optimizer.state.values())


def test_what_is_refused(data, tmp_path):
    trainer = trainer_of(data, accumulate=2)
    trainer.train_step()
    checkpoint = checkpoint_of(trainer)
    other = write_texts(tmp_path / "other", files=9)
    mine, theirs = trainer.corpus.fingerprint[:12], load_corpus(str(other)).fingerprint[:12]

    def told(act):
        with pytest.raises(CheckpointError) as error:
            act()
        return str(error.value)

    stranger = Trainer(trainer.config, load_corpus(str(other)))
    assert told(lambda: stranger.restore(checkpoint)) == (
        f"P: expected the bytes it was trained on (SHA-256 {mine!r}…), got others from {other} "
        f"({theirs}…); --data must be the same text"
    )
    assert told(lambda: trainer.restore(replace(checkpoint, step=3))) == (
        "P is damaged: expected the step that ends before batch 2, got 3"
    )
    for group, name, like in (
        ("optimizer", "embedding.weight.step", torch.zeros(())),
        ("optimizer", "embedding.weight.exp_avg", torch.zeros(256, 32)),
        ("optimizer", "embedding.weight.exp_avg_sq", torch.zeros(256, 32)),
        ("model", "embedding.weight", torch.zeros(256, 32)),
        ("rng", "numpy", torch.zeros(624, dtype=torch.int64)),
    ):
        for bad in (torch.zeros(3, dtype=like.dtype), like.half()):
            damaged = checkpoint_of(trainer)
            damaged.tensors[group][name] = bad
            text = f"P: {name}: expected {like.dtype} {list(like.shape)}, got {bad.dtype} "
            assert told(lambda x=damaged: trainer.restore(x)) == text + str(list(bad.shape))
        damaged = checkpoint_of(trainer)
        del damaged.tensors[group][name]
        text = f"P: expected a tensor named {name!r}, got none"
        assert told(lambda x=damaged: trainer.restore(x)) == text
    damaged = checkpoint_of(trainer)
    damaged.tensors["model"]["other"] = torch.zeros(1)
    text = "P: the model has no tensor named 'other'"
    assert told(lambda: trainer.restore(damaged)) == text
    damaged = checkpoint_of(trainer)
    del damaged.tensors["rng"]["torch_cpu"]
    text = "P is damaged: expected states of random generators, got others"
    assert told(lambda: trainer.restore(damaged)) == text
    for names in (("data", "sha256"), ("data", "next_batch"), ("rng", "python"), ("rng", "numpy")):
        damaged = checkpoint_of(trainer)
        damaged.state[names[0]][names[1]] = 0.5
        assert told(lambda x=damaged: trainer.restore(x)).startswith(
            f"P/state.json: {'.'.join(names)}: expected "
        )


def test_the_configuration_in_a_checkpoint(data):
    trainer = trainer_of(data)
    checkpoint = checkpoint_of(trainer)
    assert config_in(checkpoint) == trainer.config
    assert config_in(replace(checkpoint, tensors={})) == trainer.config
    few = dict(list(checkpoint.tensors["model"].items())[:1])  # as many tensors as layers
    assert config_in(replace(checkpoint, tensors={"model": few})) == trainer.config
    values = {**checkpoint.state["config"], "model": {**checkpoint.state["config"]["model"]}}
    values["model"]["num_layers"] = 9000
    with pytest.raises(CheckpointError) as error:
        config_in(replace(checkpoint, state={"config": values}))
    count = len(checkpoint.tensors["model"])
    assert str(error.value) == f"P: expected tensors for 9000 layers, got {count}"
    values["model"]["num_layers"] = 0
    with pytest.raises(CheckpointError) as error:
        config_in(replace(checkpoint, state={"config": values}))
    told = "P: unusable configuration: num_layers: expected an int >= 1, got 0"
    assert str(error.value) == told
    with pytest.raises(CheckpointError, match=r"^P/state\.json: config: expected dict, got None$"):
        config_in(replace(checkpoint, state={}))
