"""The folder of a run: one trainer at a time, and what becomes of files that vanish."""

import importlib.util
import os
import shutil
import signal
import sys
import time

import pytest
import torch

from nsa import CheckpointError
from nsa.tools.train import __main__ as train
from nsa.tools.train.display import Display
from nsa.training import lock
from nsa.training.checkpoint import CheckpointStore, load_checkpoint
from nsa.training.lock import FolderLock
from nsa.training.run import Run
from nsa.training.trainer import Trainer
from tests.support.training_runs import (
    assert_same_run,
    config_of,
    error_of,
    flags,
    metrics,
    start,
    write_texts,
)

SHORT = {"steps": 4, "save_every": 1, "eval_every": 4, "keep": 9}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A run of 4 steps, never interrupted; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*flags(data=data, **SHORT), "--out", str(out)]) == 0
    return out


def after_step(monkeypatch, count, do):
    """Has something done in the middle of a run, once the given step is computed."""
    original = Trainer.train_step

    def step(self):
        result = original(self)
        if self.step == count:
            do()
        return result

    monkeypatch.setattr(Trainer, "train_step", step)


# -- one trainer at a time ---------------------------------------------------------------------


def test_two_trainers_in_one_folder(finished, data, tmp_path, capsys):
    """One that trains, another that resumes it, a third that would begin anew; then a kill."""
    out = tmp_path / "run"
    endless = flags(data=data, **{**SHORT, "steps": 10**6, "save_every": 10**6})
    first = start("-m", "nsa.tools.train", *endless, "--out", out)
    deadline = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and metrics(out)):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for argv in (["--resume"], flags(data=data)):
        error = error_of(capsys, [*argv, "--out", str(out)])
        assert error == (
            f"{out}: expected no other trainer in it, got process {first.pid} on "
            f"{os.uname().nodename}; wait until it ends, or choose another --out"
        )
    first.kill()
    first.communicate()
    assert (out / "lock").exists()
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    shutil.copytree(finished, out, dirs_exist_ok=True)
    assert train.main(["--out", str(out), "--resume"]) == 0
    assert not (out / "lock").exists()


def test_the_lock_is_taken_from_who_is_gone_and_given_back(tmp_path):
    notes = []
    with FolderLock(tmp_path, notes.append):
        with pytest.raises(CheckpointError, match=f"got process {os.getpid()} on "):
            FolderLock(tmp_path, notes.append).hold()
        assert (tmp_path / "lock").read_text() == f"{os.getpid()} {os.uname().nodename}\n"
    assert os.listdir(tmp_path) == []
    (tmp_path / "lock").write_text(f"1 {os.uname().nodename}\n")  # killed; 1 is another one now
    with FolderLock(tmp_path, notes.append):
        assert notes == []
    (tmp_path / "lock").write_text("77 elsewhere\n")  # a lock may not reach over a network
    with FolderLock(tmp_path, notes.append):
        assert notes == [
            f"note: {tmp_path / 'lock'} was left by process 77 on elsewhere; if that still "
            "trains, stop this one"
        ]


def test_the_lock_moves_on_with_its_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with FolderLock(folder, pytest.fail) as held:
        folder.rename(tmp_path / "old")
        folder.mkdir()
        held.hold()
        assert (folder / "lock").exists()
        (folder / "lock").unlink()
        with (
            FolderLock(folder, pytest.fail),
            pytest.raises(CheckpointError, match="no other trainer"),
        ):
            held.hold()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (os.mkfifo, "expected a regular file"),
        (os.mkdir, "Is a directory"),
        (lambda path: os.symlink("/dev/zero", path), "Too many levels of symbolic links"),
        (lambda path: path.write_bytes(b"\x1b[31m 7 x\n" * 10**6), None),
    ],
)
def test_a_lock_of_another_kind(tmp_path, make, text):
    make(tmp_path / "lock")
    if text is None:
        with FolderLock(tmp_path, pytest.fail):
            return
    with pytest.raises((CheckpointError, OSError), match=text), FolderLock(tmp_path, print):
        pass


def test_a_system_without_locks_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("lock_without_fcntl", lock.__file__)
    without = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without)
    path, notes = tmp_path / "lock", []
    without.FolderLock(tmp_path, notes.append).hold()
    without.FolderLock(tmp_path, notes.append).hold()
    assert notes[0] == f"note: {path} cannot be locked; start no other trainer in this folder"
    assert notes[1].startswith(f"note: {path} was left by process {os.getpid()} on ")


def test_a_run_that_went_on_while_this_one_started(finished, data, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "checkpoints" / "latest").write_text("step-000002\n")
    run = Run(out, config_of(data, **SHORT), resume=True)
    assert train.main(["--out", str(out), "--resume"]) == 0
    with pytest.raises(CheckpointError, match="got a changed one: another trainer was there"):
        run.train(Display(step=2, steps=4, drawn=False))
    assert_same_run(out, finished)


# -- what is removed ---------------------------------------------------------------------------


def test_only_its_own_checkpoints_are_removed(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    tensors = {"model": {"w": torch.zeros(2)}}
    first = store.save(1, tensors, {})
    names = ["step-best", "step-14", "step-0000001", "step-000001.aside1"]
    for name in names:
        shutil.copytree(first, first.with_name(name))
    (store.folder / "step-000000").mkdir()  # without a manifest: no checkpoint of this store
    elsewhere = shutil.move(first, tmp_path / "elsewhere")
    first.symlink_to(elsewhere)
    for step in (2, 3, 4):
        store.save(step, tensors, {})
    left = [*names, "latest", "step-000000", "step-000001", "step-000003", "step-000004"]
    assert sorted(os.listdir(store.folder)) == sorted(left)
    assert load_checkpoint(first, ("model",)).step == 1


def test_what_cannot_be_removed_stops_no_save(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep=1)
    original = os.rename

    def refuse(source, target):
        if ".old." in str(target):
            raise PermissionError(1, "Operation not permitted")
        original(source, target)

    monkeypatch.setattr("os.rename", refuse)
    for step in (1, 2, 3):
        store.save(step, {}, {})
    monkeypatch.undo()
    assert len(list(tmp_path.glob("step-*"))) == 3
    store.save(4, {}, {})
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-000004"]


# -- what vanishes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("checkpoints/step-000002", None),
        ("checkpoints/latest", None),
        ("checkpoints", None),
        ("config.json", "config.json was removed while training; it is written anew"),
        ("metrics.jsonl", "metrics.jsonl was removed while training; its earlier lines are gone"),
        ("lock", None),
        (".", "config.json was removed while training; it is written anew"),
    ],
)
def test_files_that_vanish_under_a_trainer(
    finished, data, tmp_path, monkeypatch, capsys, name, text
):
    """The run goes on, and can be stopped and resumed; what is lost is said."""
    out, gone = tmp_path / "run", tmp_path / "gone"

    def vanish():
        os.rename(out / name if name != "." else out, gone)

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        after_step(patch, 3, vanish)
        after_step(patch, 3, stop)
        assert train.main([*flags(data=data, **SHORT), "--out", str(out)]) == 130
    printed = capsys.readouterr()
    assert printed.err == ""
    notes = [line for line in printed.out.splitlines() if line.startswith("note:")]
    expected = [] if text is None else [f"note: {out}/{text}"]
    if name == ".":
        expected.append(f"note: {out}/metrics.jsonl was removed while training; its earlier lines "
                        "are gone")  # fmt: skip
    assert notes == expected
    assert train.main(["--out", str(out), "--resume"]) == 0
    assert_same_run(out, finished, with_metrics=name not in ("metrics.jsonl", "."))


def test_the_named_checkpoint_vanished_when_the_loss_is_lost(data, tmp_path, monkeypatch, capsys):
    """The reason that is given is the loss, not the folder."""
    out = tmp_path / "run"
    after_step(monkeypatch, 3, lambda: shutil.rmtree(out / "checkpoints" / "step-000002"))
    argv = flags(data=data, **{**SHORT, "keep": 1, "lr": 1e30, "warmup": 0})
    error = error_of(capsys, [*argv, "--out", str(out)])
    assert "expected a finite number, got nan" in error


def test_resuming_without_config(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "config.json").unlink()
    argv = flags(**SHORT)
    assert "already holds a run: expected --resume" in error_of(capsys, [*argv, "--out", str(out)])
    assert train.main(["--out", str(out), "--resume"]) == 0
    assert "note: config.json is missing; that of step-000004 is taken" in capsys.readouterr().out
    assert (out / "config.json").read_bytes() == (finished / "config.json").read_bytes()


def test_a_folder_without_config_and_checkpoints_holds_no_run(finished, data, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished / "checkpoints" / "step-000004", out / "checkpoints" / "mine")
    error = error_of(capsys, ["--out", str(out), "--resume"])
    assert error.endswith("got no config.json; start one without --resume")
    assert train.main([*flags(data=data, **SHORT), "--out", str(out)]) == 0
    assert (out / "checkpoints" / "mine").exists()


def test_resuming_without_latest(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "checkpoints" / "latest").unlink()
    shutil.rmtree(out / "checkpoints" / "step-000004")
    (out / "metrics.jsonl").unlink()
    assert train.main(["--out", str(out), "--resume"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert notes == [
        "note: latest is missing; taking step-000003, the newest there",
        f"note: {out / 'metrics.jsonl'} is missing; the new one begins after step 3",
    ]
    assert_same_run(out, finished, with_metrics=False)


def test_resuming_without_any_checkpoint(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    for path in (out / "checkpoints").glob("step-*"):
        shutil.rmtree(path)
    error = error_of(capsys, ["--out", str(out), "--resume"])
    assert error.endswith("got 'step-000004' (found: none); delete it to begin at step 0")
    (out / "checkpoints" / "latest").unlink()
    assert train.main(["--out", str(out), "--resume"]) == 0
    assert "note: no checkpoint was saved; resuming from step 0" in capsys.readouterr().out
    assert_same_run(out, finished)
