"""Resuming a run: bit for bit after any kind of stop, or a clear refusal."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nsa import CheckpointError, DataError
from nsa.tools.train import __main__ as train
from nsa.training.checkpoint import CheckpointStore, load_checkpoint
from nsa.training.data import load_corpus
from nsa.training.interrupt import StopRequest
from nsa.training.metrics import JsonlWriter
from nsa.training.trainer import GROUPS, Trainer
from tests.support.training_runs import (
    assert_same_run,
    config_of,
    error_of,
    flags,
    metrics,
    start,
    write_texts,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A run of 12 steps, never interrupted; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*flags(data=data), "--out", str(out)]) == 0
    return out


def test_the_format_on_the_disk(finished):
    """Read without the library: files of earlier runs must load, so this changes with FORMAT."""
    folder = finished / "checkpoints" / (finished / "checkpoints" / "latest").read_text().strip()
    manifest = json.loads((folder / "manifest.json").read_text())
    seal = manifest.pop("sha256")
    assert seal == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    names = ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]
    assert (manifest["format"], manifest["step"], list(manifest["files"])) == (1, 12, names)
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    model, optimizer, rng = (load_file(folder / name) for name in names[:3])
    assert {"embedding.weight", "blocks.0.attention.q_proj.weight", "norm.weight"} <= set(model)
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert set(optimizer) == {f"{name}.{kind}" for name in model for kind in kinds}
    assert {name: tensor.dtype for name, tensor in rng.items()} == {
        "torch_cpu": torch.uint8,
        "numpy": torch.int64,
    }
    state = json.loads((folder / "state.json").read_text())
    assert {name: sorted(values) for name, values in state.items() if name != "threads"} == {
        "config": ["model", "train"],
        "data": ["next_batch", "sha256", "source"],
        "rng": ["numpy", "python"],
        "versions": ["numpy", "torch"],
    }
    config = json.loads((finished / "config.json").read_text())
    seal = config.pop("sha256")
    assert seal == hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    assert state["config"] == config
    assert [len(state["rng"]["python"]), len(state["rng"]["numpy"])] == [3, 3]
    assert state["threads"] == torch.get_num_threads()


_KILLED = """
import os, signal, sys
from nsa.tools.train.__main__ import main
from nsa.training.trainer import Trainer

original = Trainer.train_step


def step(self):
    if self.step == 7:  # checkpoint at 4, metrics up to 7
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self)


Trainer.train_step = step
main(sys.argv[1:])
"""


def test_killed_and_resumed_is_the_same_run(finished, data, tmp_path):
    """SIGKILL in one process, the rest in another."""
    out = tmp_path / "killed"
    killed = start("-c", _KILLED, *flags(data=data), "--out", out)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert load_checkpoint(out, ()).step == 4
    assert metrics(out)[-1]["step"] == 7
    resumed = start("-m", "nsa.tools.train", "--out", out, "--resume")
    printed, errors = resumed.communicate()
    assert (resumed.returncode, errors) == (0, "")
    assert "resuming from step 4" in printed
    assert "backend      sdpa" in printed
    assert_same_run(out, finished)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_first(data, tmp_path, number):
    out = tmp_path / "stopped"
    endless = flags(data=data, steps=1_000_000, save_every=1_000_000)
    process = start("-m", "nsa.tools.train", *endless, "--out", out)
    path, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not (path.exists() and '"step": 3,' in path.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    printed, errors = process.communicate()
    assert (process.returncode, errors) == (130, "")
    step = load_checkpoint(out, GROUPS).step
    assert 3 <= step == metrics(out)[-1]["step"]
    assert printed.splitlines()[-1] == (
        f"stopped and saved at step {step}; "
        f"resume with: python -m nsa.tools.train --out {out} --resume"
    )


def _stop_after(monkeypatch, steps: int) -> None:
    """Sends SIGINT to this process in the given step."""
    original = Trainer.train_step

    def step(self):
        result = original(self)
        if self.step == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(Trainer, "train_step", step)


def test_the_random_generators_go_on(data, tmp_path):
    """Nothing draws from them today; whatever will must not repeat itself after a stop."""

    def draws() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.normal(), float(torch.rand(()))]

    trainer = Trainer(config_of(data), load_corpus(str(data)))
    trainer.train_step()
    draws()
    path = CheckpointStore(tmp_path, keep=1).save(1, trainer.tensors(), trainer.state())
    expected = draws()
    resumed = Trainer(config_of(data), load_corpus(str(data)))
    resumed.restore(load_checkpoint(path, GROUPS))
    assert draws() == expected


@pytest.mark.parametrize("stop", [1, 6, 8, 11])
def test_interrupted_anywhere(finished, data, tmp_path, monkeypatch, capsys, stop):
    out, handler = tmp_path / "run", signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        _stop_after(patch, stop)
        assert train.main([*flags(data=data), "--out", str(out)]) == 130
    assert load_checkpoint(out, ()).step == stop
    assert f"stopped and saved at step {stop}" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler
    with open(out / "metrics.jsonl", "a") as file:  # as a kill in the next steps would leave it
        file.write('{"step": 12, "loss": 9.0}\n{"step": 13, "lo')
    torch.manual_seed(123)  # a new process would not share this one's state
    assert train.main([*flags(data=data), "--out", str(out), "--resume"]) == 0
    assert_same_run(out, finished)


def test_an_interrupt_in_the_last_step_is_too_late(finished, data, tmp_path, monkeypatch):
    _stop_after(monkeypatch, 12)
    assert train.main([*flags(data=data), "--out", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", finished)


def test_a_second_interrupt_does_not_wait():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


def test_a_closed_terminal_may_say_so_twice():
    with StopRequest() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)  # and end the rest of its session
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_nohup_is_obeyed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_killed_before_the_first_checkpoint(finished, data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_bytes((finished / "config.json").read_bytes())
    (out / "metrics.jsonl").write_bytes((finished / "metrics.jsonl").read_bytes()[:150])
    assert train.main(["--out", str(out), "--resume"]) == 0
    assert_same_run(out, finished)


def test_resuming_a_finished_run_shows_its_result(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    assert train.main(["--out", str(run), "--resume"]) == 0
    out = capsys.readouterr().out
    assert "resuming from step 12" in out
    assert "backend      sdpa" in out
    assert "bigram" in out
    assert_same_run(run, finished)


def test_what_changes_no_number_may_change(finished, data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        _stop_after(patch, 5)
        train.main([*flags(data=data), "--out", str(out)])
    assert train.main(["--out", str(out), "--resume", "--save-every", "1", "--keep", "5"]) == 0
    assert len(list((out / "checkpoints").glob("step-*"))) == 5
    assert_same_run(out, finished)


def test_metrics_keep_their_lines_apart(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nnot json\n[]\n{"step": "x"}\n{"step": 2}\n{"step": 3}\n{"st')
    notes = []
    with JsonlWriter(path, step=2, say=notes.append) as file:
        file.write(step=3, loss=0.5)
    assert notes == [f"note: {path}: dropped damaged lines: 3"]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 0.5}\n'


def test_nothing_to_resume(tmp_path, capsys):
    error = error_of(capsys, ["--out", str(tmp_path / "no"), "--resume"])
    assert error == (
        f"--resume: expected a run in {tmp_path / 'no'}, got no config.json; start one without "
        "--resume"
    )
    assert not (tmp_path / "no").exists()


def test_another_configuration_is_refused_by_name(finished, data, capsys):
    before = sorted((p, p.stat().st_mtime_ns) for p in finished.rglob("*"))
    argv = ["--out", str(finished), "--resume", "--window", "8", "--lr", "0.5", "--steps", "20"]
    error = error_of(capsys, argv)
    assert "holds a run of another configuration" in error
    assert "window 16 -> 8" in error
    assert "lr 0.003 -> 0.5" in error
    assert "steps 12 -> 20" in error
    assert "dim" not in error
    error = error_of(capsys, ["--out", str(finished), "--resume", "--preset", "small"])
    assert "num_layers 1 -> 12" in error
    assert sorted((p, p.stat().st_mtime_ns) for p in finished.rglob("*")) == before


def test_other_data_is_refused(finished, tmp_path, capsys):
    other = write_texts(tmp_path / "other", files=9)
    error = error_of(capsys, ["--out", str(finished), "--resume", "--data", str(other)])
    assert "expected the bytes it was trained on" in error


def test_the_same_data_may_move(finished, tmp_path, capsys):
    same = write_texts(tmp_path / "elsewhere")
    run = shutil.copytree(finished, tmp_path / "run")
    assert train.main(["--out", str(run), "--resume", "--data", str(same)]) == 0


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused(data, tmp_path, capsys, name):
    out = tmp_path / "run"
    train.main([*flags(data=data, steps=2), "--out", str(out)])
    file = out / "checkpoints" / "step-000002" / name
    file.write_bytes(file.read_bytes()[:100])
    error = error_of(capsys, ["--out", str(out), "--resume"])
    assert error.startswith(f"{file} is damaged: expected ")
    assert error.endswith("bytes, got 100")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {}, "train": {}}', "\xff"])
def test_a_damaged_config_is_refused(tmp_path, capsys, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    error = error_of(capsys, ["--out", str(tmp_path), "--resume"])
    assert error.startswith(f"{tmp_path / 'config.json'} is damaged: ")


def test_tensors_of_another_model_are_refused(finished, data):
    checkpoint = load_checkpoint(finished, GROUPS)
    corpus = load_corpus(str(data))
    with pytest.raises(CheckpointError, match=r"expected torch.float32 \[256, 48\], got .*, 32\]"):
        Trainer(config_of(data, dim=48), corpus).restore(checkpoint)
    del checkpoint.tensors["model"]["norm.weight"]
    with pytest.raises(CheckpointError, match=r"expected a tensor named 'norm\.weight', got none"):
        Trainer(config_of(data), corpus).restore(checkpoint)
    checkpoint.tensors["model"]["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="the model has no tensor named 'extra'"):
        Trainer(config_of(data), corpus).restore(checkpoint)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("numpy", [625, 0, 0.0]),  # numpy would read what lies behind its words
        ("numpy", [-1, 0, 0.0]),
        ("numpy", ["x", 0, 0.0]),
        ("numpy", []),
        ("python", [3, [0] * 624, None]),
        ("python", [3, [0] * 624 + [10**30], None]),
        ("python", [3, [0] * 625, "x"]),
        ("python", None),
    ],
)
def test_states_of_generators_that_are_none(finished, data, name, value):
    checkpoint = load_checkpoint(finished, GROUPS)
    checkpoint.state["rng"][name] = value
    with pytest.raises(CheckpointError, match="expected (states of random generators|list)"):
        Trainer(config_of(data), load_corpus(str(data))).restore(checkpoint)


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    finished, data, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "run"
    original = os.fsync

    def refuse(descriptor):
        if (out / "checkpoints" / "latest").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", refuse)
        error = error_of(capsys, [*flags(data=data), "--out", str(out)])
    assert "No space left on device" in error
    assert load_checkpoint(out, ()).step == 4
    assert train.main(["--out", str(out), "--resume"]) == 0
    assert_same_run(out, finished)


def test_a_disk_that_refuses_metrics(tmp_path):
    file = JsonlWriter(tmp_path / "metrics.jsonl", step=0, say=pytest.fail)
    file._file.close()
    file._file, file._path = open("/dev/full", "w"), Path("/dev/full")  # noqa: SIM115
    with pytest.raises(DataError, match="No space left on device"), file:
        file.write(step=1)
