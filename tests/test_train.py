"""The training tool: what it writes and prints, going on after any kind of stop, and refusing."""

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import flags, metrics, start, write_texts

from nsa import CheckpointError, ConfigError
from nsa.tools import train
from nsa.tools._checkpoint import CheckpointStore, load_checkpoint
from nsa.tools._data import load_corpus, training_batch
from nsa.tools._interrupt import StopRequest
from nsa.tools._metrics import MetricsFile
from nsa.tools._progress import Display
from nsa.tools._run_config import RunConfig, TrainConfig
from nsa.tools._train_flags import new_config, train_parser
from nsa.tools._trainer import GROUPS, Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A run of 12 steps, never interrupted; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*flags(data=data), "--out", str(out)]) == 0
    return out


def weights(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return load_checkpoint(run, ("model", "optimizer")).tensors


def assert_same_run(run: Path, other: Path) -> None:
    """Bit for bit: metrics, weights, optimizer, random state."""
    assert metrics(run) == metrics(other)
    mine, theirs = (load_checkpoint(path, GROUPS) for path in (run, other))
    assert mine.step == theirs.step
    assert mine.state["rng"] == theirs.state["rng"]
    for group in GROUPS:
        assert mine.tensors[group].keys() == theirs.tensors[group].keys()
        for name, tensor in mine.tensors[group].items():
            assert torch.equal(tensor, theirs.tensors[group][name]), name


def error_of(capsys, argv: list[str]) -> str:
    """The one line on stderr of a command that must fail with exit code 2."""
    capsys.readouterr()
    assert train.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# What a run leaves and prints.


def test_a_run_leaves_its_configuration_metrics_and_checkpoints(finished):
    names = sorted(path.relative_to(finished).as_posix() for path in finished.rglob("*"))
    assert [name for name in names if name.count("/") < 2] == [
        "checkpoints",
        "checkpoints/latest",
        "checkpoints/step-000008",
        "checkpoints/step-000012",
        "config.json",
        "metrics.jsonl",
    ]
    lines = metrics(finished)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["step"] for line in lines if "validation_loss" in line] == [6, 12]
    assert steps[-1]["tokens"] == 12 * 2 * 48
    assert steps[0]["loss"] == pytest.approx(math.log(256), abs=0.3)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    config = RunConfig.from_dict(json.loads((finished / "config.json").read_text()))
    assert (config.train.steps, config.model.dim, config.model.nsa.window) == (12, 32, 16)


def test_nothing_is_pickled(finished):
    suffixes = {path.suffix for path in finished.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".jsonl", ""}


def test_what_it_prints(data, tmp_path, capsys):
    assert train.main([*flags(data=data, steps=2), "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    for expected in (
        "window 16",
        "seq_len 48",
        "dim 32",
        "device       cpu",
        "backend      sdpa (auto on cpu)",
        "step 2/2  loss",
        "step 2: validation loss",
        "unigram",
        "bigram",
        "nats per byte",
        "NOT below the bigram",
    ):
        assert expected in out
    assert "\x1b" not in out  # not a terminal: plain lines


def test_the_dense_model(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*flags(data=data, steps=2, attention="dense"), "--out", str(out)]) == 0
    assert "backend      dense: torch.nn.functional.scaled_dot_product" in capsys.readouterr().out


def test_the_backend_asked_for_runs(data, tmp_path, capsys):
    argv = [*flags(data=data, steps=1, backend="reference"), "--out", str(tmp_path / "run")]
    assert train.main(argv) == 0
    assert "backend      reference (" in capsys.readouterr().out


def test_a_live_display(capsys):
    with Display(step=0, steps=3, live=True) as display:
        display.line("[not markup]")
        display.advance(1)
        display.report(2, loss=1.25, tokens_per_second=1e4)
    out = capsys.readouterr().out
    for expected in ("[not markup]", "2/3", "loss 1.2500", "10,000 tokens/s", "0:00 left"):
        assert expected in out


# What a step computes.


def config_of(data: Path, **changes: object) -> RunConfig:
    arguments = train_parser().parse_strictly(flags(data=data, **changes))
    return new_config({k: v for k, v in vars(arguments).items() if v is not None})


def test_learning_rate():
    values = {
        "data": "x", "device": "cpu", "precision": "fp32", "backend": None, "seq_len": 8,
        "batch_size": 1, "steps": 20, "lr": 1.0, "warmup": 4, "min_lr": 0.1, "eval_every": 1,
        "eval_windows": 1, "save_every": 1, "log_every": 1,
    }  # fmt: skip
    rate = TrainConfig(**values).learning_rate
    assert [rate(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rate(4) == 1.0
    assert rate(12) == pytest.approx(0.55)
    assert rate(20) == pytest.approx(0.1)
    assert TrainConfig(**{**values, "warmup": 0}).learning_rate(0) == 1.0


def test_gradient_accumulation_is_the_mean_over_the_batches(data):
    corpus = load_corpus(str(data))
    trainer = Trainer(config_of(data, accumulate=3, grad_clip=1e9), corpus)
    gradients = {name: torch.zeros_like(p) for name, p in trainer.model.named_parameters()}
    losses = []
    for index in range(3):
        trainer.model.zero_grad()
        batch = training_batch(corpus, seed=0, index=index, batch_size=2, seq_len=48)
        loss = trainer.model.loss(*batch)
        loss.backward()
        losses.append(loss.detach())
        for name, parameter in trainer.model.named_parameters():
            gradients[name] += parameter.grad / 3
    trainer.model.zero_grad()
    result = trainer.train_step()
    torch.testing.assert_close(result.loss, torch.stack(losses).mean())
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7)


def test_gradients_are_clipped(data):
    trainer = Trainer(config_of(data, grad_clip=0.01), load_corpus(str(data)))
    assert trainer.train_step().grad_norm > 0.1
    squares = sum(float(p.grad.square().sum()) for p in trainer.model.parameters())
    assert math.sqrt(squares) == pytest.approx(0.01, rel=1e-3)


def test_validation_changes_nothing(data):
    losses = []
    for validations in (0, 3):
        trainer = Trainer(config_of(data), load_corpus(str(data)))
        trainer.train_step()
        for _ in range(validations):
            trainer.validate()
        losses.append(trainer.train_step().loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("changes", [{"activation_checkpointing": True}, {"precision": "bf16"}])
def test_options_of_a_step(data, changes):
    trainer = Trainer(config_of(data), load_corpus(str(data)))
    values = {**config_of(data).to_dict()["train"], **changes}
    config = RunConfig(model=trainer.config.model, train=TrainConfig(**values))
    other = Trainer(config, load_corpus(str(data)))
    torch.testing.assert_close(
        trainer.train_step().loss, other.train_step().loss, rtol=1e-3, atol=0.0
    )
    assert other.model.activation_checkpointing is values["activation_checkpointing"]


# Going on.


def test_killed_and_resumed_is_the_same_run(finished, data, tmp_path):
    """SIGKILL at some step; the rest in a new process."""
    out = tmp_path / "killed"
    process = start("nsa.tools.train", *flags(data=data), "--out", out)
    _wait_for_step(process, out, 6)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    latest = CheckpointStore(out / "checkpoints", keep=2).latest()
    assert latest is None or load_checkpoint(latest, ()).step < 12, "it ended before the kill"
    resumed = start("nsa.tools.train", "--out", out, "--resume")
    printed, errors = resumed.communicate()
    assert (resumed.returncode, errors) == (0, "")
    assert "backend      sdpa" in printed
    assert_same_run(out, finished)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_first(finished, data, tmp_path, number):
    out = tmp_path / "stopped"
    process = start("nsa.tools.train", *flags(data=data, save_every=1000), "--out", out)
    _wait_for_step(process, out, 3)
    process.send_signal(number)
    printed, errors = process.communicate()
    assert (process.returncode, errors) == (130, "")
    assert f"go on with: python -m nsa.tools.train --out {out} --resume" in printed
    assert 3 <= load_checkpoint(out, ()).step < 12
    assert train.main(["--out", str(out), "--resume"]) == 0
    assert_same_run(out, finished)


def _wait_for_step(process: "subprocess.Popen[str]", out: Path, step: int) -> None:
    path, deadline = out / "metrics.jsonl", time.monotonic() + 60
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


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
    assert "going on from step 12" in out
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
    with MetricsFile(path, step=2) as file:
        file.write(step=3, loss=0.5)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 0.5}\n'


# Refusing.


def test_an_existing_run_is_not_overwritten(finished, data, capsys):
    before = (finished / "config.json").stat().st_mtime_ns
    error = error_of(capsys, [*flags(data=data), "--out", str(finished)])
    assert error == (
        f"{finished} already holds a run: expected --resume to go on with it, or another --out"
    )
    assert (finished / "config.json").stat().st_mtime_ns == before


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
    ("argv", "text"),
    [
        (["--step", "3"], "expected a known flag, got --step; did you mean --steps?"),
        (["--widnow=3"], "expected a known flag, got --widnow; did you mean --window?"),
        (["--xyzzy"], "expected a known flag, got --xyzzy; see --help"),
        (["books"], "expected a flag, got 'books'; see --help"),
        (["--steps", "many"], "argument --steps: expected an integer, got 'many'"),
        (["--lr", "fast"], "argument --lr: expected a number, got 'fast'"),
        (["--steps"], "argument --steps: expected one argument"),
        (["--steps", "0"], "--steps: expected an int >= 1, got 0"),
        (["--warmup", "-1"], "--warmup: expected an int >= 0, got -1"),
        (["--lr", "nan"], "--lr: expected a number > 0, got nan"),
        (["--min-lr", "2"], "--min-lr: expected a number in [0, 1], got 2.0"),
        (["--beta2", "1"], "--beta2: expected a number in [0, 1), got 1.0"),
        (["--num-heads", "3"], "num_heads: expected a multiple of num_kv_heads=2, got 3"),
        (["--dim", "0"], "dim: expected an int >= 1, got 0"),
        (["--data", "/no/such"], "expected a file or folder of text, got '/no/such'"),
        (["--device", "gpu"], "--device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--device", "meta"], "--device: expected auto, cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "cuda:77"], "expected a device of this machine, got 'cuda:77'"),
        (["--attention", "dense", "--backend", "sdpa"], "--backend: expected none with"),
        (["--seq-len", "1000000000"], "at least 1000000001 bytes in the training split"),
        (["--out", "/dev/null"], "/dev/null"),
    ],
)
def test_bad_command_lines(tmp_path, capsys, argv, text):
    out = [] if "--out" in argv else ["--out", str(tmp_path / "run")]
    assert text in error_of(capsys, [*argv, *out])
    assert not (tmp_path / "run").exists()


def test_a_backend_that_cannot_run_leaves_no_run(data, tmp_path, capsys):
    argv = [*flags(data=data, steps=1), "--out", str(tmp_path / "run")]
    error = error_of(capsys, [*argv, "--backend", "fa2-dense", "--device", "cpu"])
    assert "fa2-dense" in error
    assert "backends that can" in error
    assert train.main(argv) == 0  # nothing in the way


def test_divergence_is_not_saved(data, tmp_path, capsys):
    argv = [*flags(data=data, lr=1e30, save_every=1, warmup=0), "--out", str(tmp_path / "run")]
    error = error_of(capsys, argv)
    assert "expected a finite number, got nan" in error
    assert "lower --lr" in error
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        assert all(
            t.isfinite().all() for t in load_checkpoint(path, ("model",)).tensors["model"].values()
        )


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
    file = MetricsFile(tmp_path / "metrics.jsonl", step=0)
    file._file.close()
    file._file = open("/dev/full", "w")  # noqa: SIM115 - closed by the context manager
    with pytest.raises(Exception, match="No space left on device"), file:
        file.write(step=1)


def test_a_reader_that_leaves(data, tmp_path):
    process = start("nsa.tools.train", *flags(data=data), "--out", tmp_path / "run")
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 141


def test_config_checks_its_values(data):
    config = config_of(data)
    with pytest.raises(ConfigError, match="expected one of the known names, got 'bf61'; did you"):
        TrainConfig(**{**config.to_dict()["train"], "precision": "bf61"})
    with pytest.raises(ConfigError, match="--lr: expected a number > 0, got 'x'"):
        TrainConfig(**{**config.to_dict()["train"], "lr": "x"})
    with pytest.raises(ConfigError, match="got an unknown name for 'stepps'"):
        RunConfig.from_dict(
            {**config.to_dict(), "train": {**config.to_dict()["train"], "stepps": 1}}
        )


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    assert "--resume" in capsys.readouterr().out
