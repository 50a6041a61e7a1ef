"""A run step by step: what it writes, shows and saves, when, and how fast it says it is."""

import contextlib
import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest

from nsa import CheckpointError, DataError
from nsa.errors import UsageError
from nsa.training.attention_log import AttentionLog
from nsa.training.checkpoint import CheckpointStore, load_checkpoint
from nsa.training.data import load_corpus
from nsa.training.run import Diverged, Run, stored_config
from nsa.training.trainer import StepResult, Trainer
from tests.support.training_runs import config_of, write_texts

BACKEND = (
    "backend      sdpa (auto on cpu); compressed sdpa, select sdpa, selected sdpa, window sdpa"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data"))


class Watched:
    """A display and a compilation that note what they are told, and the results of steps.

    A step takes 0.7 seconds of its clock, the first one 50; all else takes 1,000.
    """

    def __init__(self, monkeypatch):
        self.events, self.results, self.lost, self.now = [], [], None, 7.0
        clock = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr("nsa.training.clock.time", clock)
        for kind, name in ((Trainer, "validate"), (CheckpointStore, "save")):
            monkeypatch.setattr(kind, name, self._slow(getattr(kind, name)))
        step = Trainer.train_step

        def timed(trainer):
            self.now += 0.7 if self.results else 50.0
            self.results.append(step(trainer))
            return self.results[-1]

        monkeypatch.setattr(Trainer, "train_step", timed)

        def attention(log):
            self.now += 1000.0
            return {"attention.0.x": 0.5}, ["it is odd"]

        monkeypatch.setattr(AttentionLog, "metrics", attention)

    def _slow(self, function):
        def call(*args):
            self.now += 1000.0
            return function(*args)

        return call

    def line(self, text):
        self.events.append(text)

    def advance(self, step):
        self.events.append(step)

    def report(self, step, *, loss, tokens_per_second):
        self.events.append((step, loss, round(tokens_per_second, 3)))

    @contextlib.contextmanager
    def session(self, say):
        say("session")
        yield
        say("session ends")

    def ready(self, say, first):
        say(f"ready {first}")

    def keep(self, say):
        say("keep")


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_of(folder, config, watched, *, resume=False):
    run = Run(folder, config, resume=resume)
    run._compilation = watched
    return run


def test_everything_in_its_turn(data, tmp_path, monkeypatch):
    watched = Watched(monkeypatch)
    config = config_of(
        data, steps=7, log_every=2, eval_every=3, save_every=4, log_attention_every=5, accumulate=2,
        keep=9,
    )  # fmt: skip
    run = run_of(tmp_path / "run", config, watched)
    final = run.train(watched)
    losses = [float(result.loss) for result in watched.results]
    norms = [float(result.grad_norm) for result in watched.results]
    lines = metrics_of(tmp_path / "run")
    early = lines[1]["validation_loss"]
    tokens = 2 * 2 * 48

    def logged(step):
        return {
            "step": step,
            "loss": losses[step - 1],
            "grad_norm": norms[step - 1],
            "lr": config.train.learning_rate(step - 1),
            "tokens": step * tokens,
            "tokens_per_second": round(tokens / 0.7, 1),
        }

    def reported(step):
        return step, losses[step - 1], round(tokens / 0.7, 3)

    def validated(step, loss):
        return [f"step {step}: validation loss {loss:.4f} nats per byte", "keep"]

    assert lines == [
        logged(2), {"step": 3, "validation_loss": early}, logged(4),
        {"step": 5, "attention.0.x": 0.5}, logged(6), {"step": 6, "validation_loss": lines[5][
        "validation_loss"]}, logged(7), {"step": 7, "validation_loss": final},
    ]  # fmt: skip
    assert watched.events == [
        "session", "ready step", BACKEND, 1, 2, reported(2), 3, *validated(3, early),
        4, reported(4), 5, "step 5: warning: it is odd", 6, reported(6),
        *validated(6, lines[5]["validation_loss"]), 7, reported(7), *validated(7, final),
        "session ends",
    ]  # fmt: skip
    assert final == run.trainer.validate()
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert found == ["step-000004", "step-000007"]
    assert stored_config(tmp_path / "run") == config

    watched.events.clear()
    again = run_of(tmp_path / "run", config, watched, resume=True)
    assert again.notes == []
    assert again.train(watched) == final
    assert watched.events == ["session", "ready validation", BACKEND, "session ends"]
    assert len(watched.results) == 7


def test_a_folder_of_folders_that_vanish(data, tmp_path, monkeypatch):
    """They are made, and made again."""
    watched, folder = Watched(monkeypatch), tmp_path / "a" / "b" / "run"
    step = Trainer.train_step

    def vanishing(trainer):
        result = step(trainer)
        if trainer.step == 2:
            shutil.rmtree(tmp_path / "a")
        return result

    monkeypatch.setattr(Trainer, "train_step", vanishing)
    config = config_of(data, steps=3)
    run_of(folder, config, watched).train(watched)
    assert stored_config(folder) == config
    assert load_checkpoint(folder, ()).step == 3
    assert [line["step"] for line in metrics_of(folder)] == [2, 3, 3]


def test_a_display_that_is_lost_ends_the_run_with_a_checkpoint(data, tmp_path, monkeypatch):
    watched = Watched(monkeypatch)

    def leave(step):
        watched.lost = OSError() if step == 3 else None

    watched.advance = leave
    run = run_of(tmp_path, config_of(data, save_every=5, log_every=9), watched)
    assert run.train(watched) is None
    assert load_checkpoint(tmp_path, ()).step == 3
    assert len(watched.results) == 3


def test_speed_of_a_step_that_took_no_time(data, tmp_path, monkeypatch):
    watched = Watched(monkeypatch)
    monkeypatch.setattr("nsa.training.clock.time", SimpleNamespace(perf_counter=lambda: 7.0))
    run_of(tmp_path, config_of(data, steps=1), watched).train(watched)
    assert watched.events[4][2] == pytest.approx(2 * 48 / 1e-9)


@pytest.mark.parametrize(("name", "at"), [("loss", 0), ("gradient norm", 1)])
def test_what_is_not_finite_ends_the_run(data, tmp_path, monkeypatch, name, at):
    watched = Watched(monkeypatch)
    step = Trainer.train_step

    def spoilt(trainer):
        result = list(step(trainer))
        if trainer.step > 2:
            result[at] = result[at] * float("inf")
        return StepResult(*result)

    monkeypatch.setattr(Trainer, "train_step", spoilt)
    for save_every, last in ((3, "none"), (2, "step-000002")):
        folder = tmp_path / str(save_every)
        run = run_of(folder, config_of(data, save_every=save_every, log_every=9), watched)
        with pytest.raises(Diverged) as error:
            run.train(watched)
        assert str(error.value) == (
            f"{name} at step {save_every if save_every == 3 else 4}: expected a finite number, got "
            f"inf; lower --lr or raise --warmup (last checkpoint: {last})"
        )


def test_notes_on_rounding(data, tmp_path, monkeypatch):
    """Of a run that goes on with other threads, or compiled."""
    watched = Watched(monkeypatch)
    watched.lost = OSError()
    run_of(tmp_path, config_of(data), watched).train(watched)
    assert run_of(tmp_path, config_of(data), watched, resume=True).notes == []
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    notes = run_of(tmp_path, config_of(data, compile="model"), watched, resume=True).notes
    assert [re.sub(r"with \d+ threads", "with n threads", note, count=1) for note in notes] == [
        "note: resuming with compile none -> model: results may differ in the last bits",
        "note: saved with n threads, resuming with 77: results may differ in the last bits",
    ]


def test_runs_that_are_refused(data, tmp_path, monkeypatch):
    watched = Watched(monkeypatch)
    watched.lost = OSError()
    config = config_of(data)
    with pytest.raises(CheckpointError) as error:
        Run(tmp_path, config, resume=True)
    assert str(error.value) == (
        f"--resume: expected a run in {tmp_path}, got no config.json; start one without --resume"
    )
    with pytest.raises(DataError, match="at least 100001 bytes in the training split"):
        Run(tmp_path, config_of(data, seq_len=100_000), resume=False)
    assert os.listdir(tmp_path) == []
    run_of(tmp_path, config, watched).train(watched)
    held = f"{tmp_path} already holds a run: expected --resume to continue it, or another --out"
    other = (
        f"{tmp_path} holds a run of another configuration: steps 12 -> 13, lr 0.003 -> 0.5 (stored "
        "-> requested); drop those flags, or choose another --out"
    )
    changed = config_of(data, lr=0.5, steps=13)
    for resume, asked, text in ((False, config, held), (True, changed, other)):
        for path in (None, tmp_path / "config.json"):  # of the file, then of the checkpoint
            if path is not None:
                path.rename(path.with_name("aside"))
            with pytest.raises(CheckpointError) as error:
                Run(tmp_path, asked, resume=resume)
            assert str(error.value) == text
        path.with_name("aside").rename(path)


def test_a_run_of_another_configuration_than_its_checkpoint(data, tmp_path, monkeypatch):
    watched = Watched(monkeypatch)
    watched.lost = OSError()
    run_of(tmp_path / "a", config_of(data), watched).train(watched)
    run_of(tmp_path / "b", config_of(data, lr=0.5), watched).train(watched)
    (tmp_path / "a" / "config.json").write_bytes((tmp_path / "b" / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"another configuration: lr 0\.003 -> 0\.5 \("):
        Run(tmp_path / "a", config_of(data, lr=0.5), resume=True)


def test_a_configuration_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(CheckpointError) as error:
        stored_config(tmp_path)
    assert str(error.value).startswith(f"{path} is damaged: expected JSON, got Expecting property")
    assert str(error.value).endswith("; without it, that of the latest checkpoint is taken")
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged: model: expected a table of values"):
        stored_config(tmp_path)
    for text in ("Input/output error", None):

        def refuse(path, limit, text=text):
            raise OSError(5, text) if text else OSError("odd")

        monkeypatch.setattr("nsa.training.run.read_file", refuse)
        with pytest.raises(CheckpointError) as error:
            stored_config(tmp_path)
        assert str(error.value) == f"cannot read {path}: {text or 'odd'}"


def test_a_new_run_has_what_its_flags_say(tmp_path):
    (tmp_path / "data").mkdir()
    for name, size in (("a", 9000), ("b", 400), ("c", 400)):
        (tmp_path / "data" / name).write_text(name * size)
    data = str(tmp_path / "data")
    found = []
    for split in ("files", "bytes"):
        run = Run(tmp_path / "run", config_of(data, split=split, keep=7), resume=False)
        assert run.corpus.fingerprint == load_corpus(data, split).fingerprint
        found.append(run.corpus.fingerprint)
        assert (run._store.folder, run._store.keep) == (tmp_path / "run" / "checkpoints", 7)
    assert found[0] != found[1]
    with pytest.raises(UsageError, match="--compile-cache: expected --compile blocks or"):
        Run(tmp_path / "run", config_of(data), resume=False, compile_cache="x")
