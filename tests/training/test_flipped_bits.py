"""Each bit of each file that a resume reads, flipped: refused, or it changes nothing."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nsa import CheckpointError
from nsa.training.checkpoint import CheckpointStore, load_checkpoint
from nsa.training.data import load_corpus
from nsa.training.files import sealed, to_json
from nsa.training.run import stored_config
from nsa.training.trainer import GROUPS, Trainer
from tests.support.training_runs import config_of, write_texts

EVERY = [False, pytest.param(True, marks=pytest.mark.slow)]
"""Whether every bit of every byte is flipped, or one drawn for each."""

_LARGE = 3000
"""Bytes; of larger files, 200 bits are drawn."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data"))


def flips(file: Path, every: bool) -> Iterator[int]:
    """Flip bits of a file, one at a time."""
    before = file.read_bytes()
    draw = random.Random(0)
    if len(before) > _LARGE:
        bits = draw.sample(range(8 * len(before)), 200)
    elif every:
        bits = list(range(8 * len(before)))
    else:
        bits = [8 * byte + draw.randrange(8) for byte in range(len(before))]
    for bit in bits:
        changed = bytearray(before)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        yield bit
    file.write_bytes(before)


def survivors(file: Path, read: Callable[[], object], expected: object, every: bool) -> list[int]:
    """List the flips after which ``read`` gives something else, and says nothing."""
    found = [bit for bit in flips(file, every) if attempt(read) not in (REFUSED, expected)]
    assert read() == expected
    return found


REFUSED = object()


def attempt(read: Callable[[], object]) -> object:
    """Call ``read``; REFUSED where it raises, in a line that can be printed."""
    try:
        return read()
    except CheckpointError as error:
        text = str(error)
    assert text.isprintable()
    assert len(text) < 500
    return REFUSED


def read(run: Path) -> tuple[object, ...]:
    """Everything of a checkpoint, in a form that == compares."""
    checkpoint = load_checkpoint(run, ("model",))
    tensors = {name: t.tolist() for name, t in checkpoint.tensors["model"].items()}
    return checkpoint.path.name, checkpoint.step, checkpoint.state, tensors


@pytest.mark.parametrize("age", ["new", "old"])
@pytest.mark.parametrize("name", ["latest", "manifest.json", "state.json", "model.safetensors"])
def test_a_small_checkpoint(tmp_path, name, age):
    tensors = {"model": {"w": torch.arange(3.0)}}
    path = CheckpointStore(tmp_path, keep=1).save(21, tensors, {"note": "x"})
    if age == "old":  # as it was written before manifests had a checksum of their own
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["sha256"]
        (path / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    elif name != "latest":  # and a folder whose name says nothing
        path = path.rename(tmp_path / "kept")
    file, start = (tmp_path / name, tmp_path) if name == "latest" else (path / name, path)
    assert survivors(file, lambda: read(start), read(start), every=True) == []


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """A run's folder without training."""
    folder = tmp_path_factory.mktemp("run")
    trainer = Trainer(config_of(data, accumulate=2), load_corpus(str(data)))
    trainer.train_step()
    store = CheckpointStore(folder / "checkpoints", keep=1)
    store.save(trainer.step, trainer.tensors(), trainer.state())
    return folder


@pytest.mark.parametrize("every", EVERY)
def test_the_configuration_of_a_run(run, data, every):
    """Also what may change when a run is resumed: how often it validates, say."""
    config = config_of(data)
    file = run / "config.json"
    file.write_bytes(to_json(sealed(config.to_dict())))
    assert survivors(file, lambda: stored_config(run), config, every) == []
    file.unlink()


def test_the_step_of_an_old_checkpoint_is_that_of_its_data(run, data, tmp_path):
    """Without a checksum, and in a folder whose name says nothing."""
    checkpoint = load_checkpoint(run, GROUPS)
    folder = tmp_path / "renamed"
    checkpoint.path.rename(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    trainer = Trainer(config_of(data, accumulate=2), load_corpus(str(data)))
    for step in (0, 2, 10**30):
        (folder / "manifest.json").write_text(json.dumps({**manifest, "step": step}))
        with pytest.raises(CheckpointError, match=f"ends before batch 2, got {step}"):
            trainer.restore(load_checkpoint(folder, GROUPS))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    trainer.restore(load_checkpoint(folder, GROUPS))
    assert trainer.step == 1
    folder.rename(checkpoint.path)


@pytest.mark.parametrize(
    "name", ["manifest.json", "state.json", "rng.safetensors", "optimizer.safetensors"]
)
@pytest.mark.parametrize("every", EVERY)
def test_a_checkpoint_of_a_run(run, name, every):
    def read_all() -> tuple[object, ...]:
        checkpoint = load_checkpoint(run, GROUPS)
        groups = checkpoint.tensors.values()
        tensors = [{k: t.numpy().tobytes() for k, t in named.items()} for named in groups]
        return checkpoint.step, checkpoint.state, tensors

    file = run / "checkpoints" / "step-000001" / name
    assert survivors(file, read_all, read_all(), every) == []
