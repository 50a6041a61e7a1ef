"""Checkpoints: whole or not at all, checked when read, whatever stops the writing."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsa import CheckpointError
from nsa.training.checkpoint import CheckpointStore, find_checkpoint, load_checkpoint


def tensors(value: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"w": torch.full((3, 2), float(value)), "b": torch.arange(4).view(2, 2).T},
        "optimizer": {"w.step": torch.tensor(float(value))},
    }


def save(store: CheckpointStore, step: int) -> Path:
    return store.save(step, tensors(step), {"note": f"step {step}"})


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_round_trip(store):
    assert store.latest() is None
    path = save(store, 3)
    assert store.latest() == path
    checkpoint = load_checkpoint(path, ("model", "optimizer"))
    assert (checkpoint.step, checkpoint.state) == (3, {"note": "step 3"})
    for group, named in tensors(3).items():
        assert checkpoint.tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            assert torch.equal(checkpoint.tensors[group][name], tensor)


def test_the_newest_are_kept(store):
    for step in (1, 2, 3, 10):
        save(store, step)
    found = sorted(path.name for path in store.folder.iterdir())
    assert found == ["latest", "step-000003", "step-000010"]
    assert store.latest().name == "step-000010"


def test_a_checkpoint_is_found_from_all_three_folders(store):
    path = save(store, 3)
    for start in (store.folder.parent, store.folder, path):
        assert find_checkpoint(start) == path


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: None, "expected a run or a checkpoint folder, got nothing there"),
        (lambda path: path.mkdir(), "got a folder without one"),
        (lambda path: path.touch(), "got a file"),
    ],
)
def test_no_checkpoint(tmp_path, make, text):
    make(tmp_path / "x")
    with pytest.raises(CheckpointError, match=text):
        find_checkpoint(tmp_path / "x")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["truncated", "emptied", "changed", "missing"])
def test_damage_is_seen(store, name, damage):
    file = save(store, 3) / name
    data = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(data[:-3])
    elif damage == "emptied":
        file.write_bytes(b"")
    elif damage == "changed":
        middle = data.index(b"step") + 1 if b"step" in data else len(data) // 2
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    else:
        file.unlink()
    path = store.latest()
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, ("model", "optimizer"))
    assert str(path) in str(error.value)
    assert "damaged" in str(error.value)


def test_damage_messages(store):
    path = save(store, 3)
    model = path / "model.safetensors"
    data = model.read_bytes()
    model.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"expected {len(data)} bytes, got {len(data) - 1}"):
        load_checkpoint(path, ("model",))
    model.write_bytes(data[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"its SHA-256 is not the one in manifest\.json"):
        load_checkpoint(path, ("model",))
    load_checkpoint(path, ("optimizer",))  # the other files are as they were


def test_another_format(store):
    path = save(store, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(CheckpointError, match="expected checkpoint format 1, got 2"):
        load_checkpoint(path, ())


@pytest.mark.parametrize("name", ["step-000007", "../elsewhere", "", "/etc"])
def test_latest_must_name_a_checkpoint(store, name):
    save(store, 3)
    (store.folder / "latest").write_text(name)
    with pytest.raises(CheckpointError, match=r"expected the name .* \(found: step-000003\)"):
        store.latest()


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=9)
    for step in (0, 999_999, 1_000_000, 1, 2, 3, 4):
        save(store, step)
    (store.folder / "step-file").touch()
    (store.folder / "other").mkdir()
    (store.folder / "latest").write_text("step-000077")
    with pytest.raises(CheckpointError) as error:
        store.latest()
    assert str(error.value) == (
        f"{store.folder / 'latest'}: expected the name of a checkpoint beside it, got "
        "'step-000077' (found: step-000002, step-000003, step-000004, step-999999, step-1000000); "
        "write one of those into it to resume from it"
    )
    assert store.newest() is None
    (store.folder / "latest").write_text(" step-999999 \n\n")
    assert store.latest() == store.newest() == store.folder / "step-999999"
    (store.folder / "latest").unlink()
    assert store.latest() == store.folder / "step-1000000"
    few = CheckpointStore(store.folder, keep=2)
    save(few, 5)
    assert sorted(os.listdir(store.folder)) == [
        "latest", "other", "step-000005", "step-1000000", "step-999999", "step-file",
    ]  # fmt: skip
    save(CheckpointStore(store.folder, keep=1), 6)
    assert sorted(path.name for path in store.folder.glob("step-*0")) == ["step-1000000"]
    assert sorted(path.name for path in store.folder.glob("step-*[69]")) == ["step-000006"]


def test_a_latest_that_is_too_long_or_no_text(store):
    save(store, 3)
    for content, told in (
        (b"x" * 1025, "expected at most 1024 bytes, got 1025"),
        (b"step-000003" + b" " * 1013, None),
        (b"\xff", "got '\ufffd' (found: step-000003)"),
    ):
        (store.folder / "latest").write_bytes(content)
        if told is None:
            assert store.latest() == store.folder / "step-000003"
            continue
        with pytest.raises(CheckpointError) as error:
            store.latest()
        assert told in str(error.value)


def test_a_folder_that_cannot_be_listed(store, monkeypatch):
    save(store, 3)

    def refuse(path, reason="Input/output error"):
        raise OSError(errno.EIO, reason) if reason else OSError("odd")

    for reason in ("Input/output error", None):
        monkeypatch.setattr("pathlib.Path.iterdir", lambda path, told=reason: refuse(path, told))
        with pytest.raises(CheckpointError) as error:
            store.latest()
        assert str(error.value) == f"cannot read {store.folder}: {reason or 'odd'}"


def test_what_a_path_means(tmp_path):
    for name in ("step-best", "step-000009"):
        (tmp_path / name).mkdir()
        assert find_checkpoint(tmp_path / name) == tmp_path / name  # to be refused when it is read
    path = save(CheckpointStore(tmp_path / "run" / "checkpoints", keep=2), 3)
    renamed = tmp_path / "good"
    shutil.copytree(path, renamed)
    assert find_checkpoint(renamed) == renamed
    (tmp_path / "step-file").touch()
    with pytest.raises(CheckpointError) as error:
        find_checkpoint(tmp_path / "step-file")
    assert str(error.value) == (
        f"{tmp_path / 'step-file'}: expected a run or a checkpoint folder, got a file"
    )
    assert load_checkpoint(tmp_path / "run", ["optimizer"]).tensors.keys() == {"optimizer"}


def test_a_checkpoint_that_is_gone_is_written_again(store):
    shutil.rmtree(save(store, 3))
    assert load_checkpoint(save(store, 3), ()).step == 3


def test_the_first_save_that_fails(store, monkeypatch):
    for reason in ("Input/output error", None):

        def refuse(path, *rest, told=reason):
            raise OSError(errno.EIO, told) if told else OSError("odd")

        with monkeypatch.context() as patch:
            patch.setattr("nsa.training.checkpoint.write_checkpoint", refuse)
            with pytest.raises(CheckpointError) as error:
                save(store, 3)
        assert str(error.value) == (
            f"could not save {store.folder / 'step-000003'}: {reason or 'odd'}; there is no "
            "earlier one"
        )
        assert os.listdir(store.folder) == []


def test_the_latest_is_not_written_twice(store):
    manifest = save(store, 3) / "manifest.json"
    before = manifest.stat().st_mtime_ns
    save(store, 3)
    assert manifest.stat().st_mtime_ns == before


def test_what_has_the_name_of_a_new_checkpoint_makes_way(store):
    for step in (2, 3):
        save(store, step)
    (store.folder / "latest").write_text("step-000002\n")  # 3 is abandoned
    broken = store.folder / "step-000004"
    broken.mkdir()
    (broken / "junk").touch()
    os.rename(store.folder / "step-000002", store.folder.parent / "elsewhere")
    os.symlink(store.folder.parent / "elsewhere", store.folder / "step-000002")
    resumed = CheckpointStore(store.folder, keep=2)
    (store.folder / "step-000004.aside1").mkdir()
    for step in (2, 3, 4):
        path = save(resumed, step)
        assert load_checkpoint(path, ("model",)).step == step
    assert sorted(os.listdir(store.folder)) == [
        "latest", "step-000002.aside1", "step-000003", "step-000004", "step-000004.aside1",
        "step-000004.aside2",
    ]  # fmt: skip
    assert os.listdir(store.folder / "step-000004.aside2") == ["junk"]
    assert load_checkpoint(store.folder.parent / "elsewhere", ("model",)).step == 2


def test_leftovers_of_a_killed_save_are_removed(store, gone):
    path = save(store, 3)
    for name in (f".step-000009.{gone}.tmp", f".step-000001.{gone}.old.tmp"):
        (store.folder / name).mkdir()
    (store.folder / f".latest.{gone}.tmp").touch()
    others = [f".step-000009.{os.getppid()}.tmp", f".mine.{gone}.tmp"]
    for name in others:
        (store.folder / name).mkdir()
    save(store, 4)
    assert sorted(os.listdir(store.folder)) == sorted([*others, "latest", path.name, "step-000004"])


@pytest.mark.parametrize("last", [1, 3])
def test_what_is_left_of_a_removed_checkpoint_goes_with_a_later_save(store, monkeypatch, last):
    """Of one that is too old, and of one that another takes the place of."""
    original, refused = shutil.rmtree, []

    def refuse(path, ignore_errors=False):
        if ".old." in str(path):
            refused.append(path)
            if not ignore_errors:
                raise OSError(errno.EIO, "Input/output error")
        else:
            original(path, ignore_errors)

    for step in (1, 2):
        save(store, step)
    again = CheckpointStore(store.folder, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", refuse)
        save(again, last)
    (left,) = refused
    assert left.name.startswith(".step-000001.")
    assert left.exists()
    save(again, 4)
    found = sorted(os.listdir(store.folder))
    assert found == ["latest", "step-000002" if last == 1 else "step-000003", "step-000004"]


def test_a_store_is_used_once_something_was_saved(store):
    assert not store.is_used()
    path = save(store, 3)
    assert store.is_used()
    (store.folder / "latest").rename(store.folder / "aside")
    assert store.is_used()
    path.rename(store.folder / "elsewhere")
    assert not store.is_used()
    (store.folder / "latest").symlink_to("nowhere")
    assert store.is_used()


@pytest.mark.parametrize("reason", ["Input/output error", None])
def test_files_that_cannot_be_read(store, monkeypatch, reason):
    """With the system's reason, or where it has none, what Python says."""
    path = save(store, 3)

    def refuse(file, **options):
        raise OSError(errno.EIO, reason) if reason else OSError("odd")

    told = reason or "odd"
    for name, place, groups, act in (
        ("manifest.json", "checkpoint_format.read_file", (), load_checkpoint),
        ("state.json", "checkpoint_format.open_regular", (), load_checkpoint),
        ("latest", "checkpoint.read_file", (), lambda path, groups: store.latest()),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"nsa.training.{place}", refuse)
            with pytest.raises(CheckpointError) as error:
                act(path, groups)
        file = store.folder / name if name == "latest" else path / name
        assert str(error.value) == f"cannot read {file}: {told}"


def test_a_full_disk_leaves_the_last_checkpoint(store, monkeypatch):
    first = save(store, 3)

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(CheckpointError) as error:
        save(store, 4)
    assert str(error.value) == (
        f"could not save {store.folder / 'step-000004'}: No space left on device; {first} is intact"
    )
    monkeypatch.undo()
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", "step-000003"]
    assert load_checkpoint(store.latest(), ("model", "optimizer")).step == 3


_KILL_EVERYWHERE = """
import builtins, os, shutil, signal, sys, warnings
from pathlib import Path
import torch
from nsa.training.checkpoint import CheckpointStore, load_checkpoint

warnings.simplefilter("ignore")  # fork beside torch's threads; the child only writes files
root = Path(sys.argv[1])
calls = ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink", "open")
originals = {name: getattr(os, name) for name in calls}
open_file = open
tensors = lambda step: {"model": {"w": torch.full((50,), float(step))}}


def kill_at(count):
    seen = 0
    def count_and_kill():
        nonlocal seen
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
    def wrap(name):
        def call(*arguments, **keywords):
            count_and_kill()
            return originals[name](*arguments, **keywords)
        return call
    def open_and_kill(*arguments, **keywords):
        file = open_file(*arguments, **keywords)  # emptied by now, and nothing written
        count_and_kill()
        return file
    for name in calls:
        setattr(os, name, wrap(name))
    builtins.open = open_and_kill


for count in range(1, 100):
    folder = root / str(count)
    store = CheckpointStore(folder, keep=2)
    for step in (1, 2):
        store.save(step, tensors(step), {})
    child = os.fork()
    if child == 0:
        kill_at(count)
        store.save(3, tensors(3), {})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    checkpoint = load_checkpoint(store.latest(), ("model",))
    assert checkpoint.step in (2, 3), checkpoint.step
    assert torch.equal(checkpoint.tensors["model"]["w"], torch.full((50,), float(checkpoint.step)))
    for path in folder.glob("step-*"):  # a name that is there is a whole checkpoint
        load_checkpoint(path, ("model",))
    store.save(4, tensors(4), {})
    assert load_checkpoint(store.latest(), ("model",)).step == 4
    assert not list(folder.glob(".*")), list(folder.iterdir())
    shutil.rmtree(folder)
    print(checkpoint.step, end=" ")
    if os.WIFEXITED(status):
        print("done")
        break
"""


def test_a_kill_between_any_two_calls(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _KILL_EVERYWHERE, str(tmp_path)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = done.stdout.split()
    assert steps[-1] == "done"
    assert len(steps) > 15  # kill points
    assert steps[0] == "2"
    assert steps[-2] == "3"
    assert sorted(steps[:-1]) == steps[:-1]
