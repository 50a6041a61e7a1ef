"""The files of a checkpoint: names, what is looked up, and what each kind of damage is called."""

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from nsa import CheckpointError
from nsa.training import checkpoint_format as form
from nsa.training.checkpoint_format import (
    Checkpoint,
    name_of,
    read_checkpoint,
    step_in,
    write_checkpoint,
)
from nsa.training.files import sealed, to_json


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "step-000003"
    write_checkpoint(path, 3, {"model": {"w": torch.arange(6.0).view(2, 3).T}}, {"note": "x"})
    return path


def told(folder, groups=("model",)):
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(folder, groups)
    return str(error.value)


def manifest_of(folder):
    values = json.loads((folder / "manifest.json").read_text())
    del values["sha256"]
    return values


def test_names():
    for step, name in ((0, "step-000000"), (12, "step-000012"), (10**17, f"step-{10**17}")):
        assert name_of(step) == name
        assert step_in(name) == step
    for name in (
        "step-0000001", "step-00001", f"step-{10**18}", "step-", "step-000001 ", "xstep-000001",
        "step-best", "STEP-000001", "step-00000١",
    ):  # fmt: skip
        assert step_in(name) == -1


def test_what_is_written_is_read(folder):
    checkpoint = read_checkpoint(folder, ["model"])
    assert (checkpoint.path, checkpoint.step, checkpoint.state) == (folder, 3, {"note": "x"})
    assert checkpoint.tensors.keys() == {"model"}
    assert torch.equal(checkpoint.tensors["model"]["w"], torch.arange(6.0).view(2, 3).T)
    assert read_checkpoint(folder, ()).tensors == {}
    with pytest.raises(FileExistsError):
        write_checkpoint(folder, 3, {}, {})


def test_values_are_looked_up_by_name_and_type():
    state = {"a": {"b": 3, "t": True, "f": 0.5}, "c": 5, "d": [1]}
    checkpoint = Checkpoint(path=Path("P"), step=1, state=state, tensors={})
    assert checkpoint.value("a", "b", kind=int) == 3
    assert checkpoint.value("a", kind=dict) is state["a"]
    for names, kind, text in (
        (("a", "b"), str, "a.b: expected str, got 3"),
        (("a", "t"), int, "a.t: expected int, got True"),
        (("a", "x"), int, "a.x: expected int, got None"),
        (("c", "b"), int, "c.b: expected int, got None"),
        (("d",), dict, "d: expected dict, got [1]"),
        (("x", "y", "z"), int, "x.y.z: expected int, got None"),
    ):
        with pytest.raises(CheckpointError) as error:
            checkpoint.value(*names, kind=kind)
        assert str(error.value) == f"P/state.json: {text}"


def test_tensors_are_looked_up_by_shape_and_dtype():
    given = {"model": {"w": torch.zeros(2, 3)}}
    checkpoint = Checkpoint(path=Path("P"), step=1, state={}, tensors=given)
    assert checkpoint.tensor("model", "w", like=torch.ones(2, 3)) is given["model"]["w"]
    got = "got torch.float32 [2, 3]"
    for name, like, text in (
        ("v", torch.zeros(2, 3), "expected a tensor named 'v', got none"),
        ("w", torch.zeros(3), f"w: expected torch.float32 [3], {got}"),
        ("w", torch.zeros(2, 3).half(), f"w: expected torch.float16 [2, 3], {got}"),
    ):
        with pytest.raises(CheckpointError) as error:
            checkpoint.tensor("model", name, like=like)
        assert str(error.value) == f"P: {text}"


@pytest.mark.parametrize("changes", [
    {"step": -1}, {"step": True}, {"step": "3"}, {"step": None}, {"files": []}, {"files": None},
])  # fmt: skip
def test_a_manifest_of_other_types(folder, changes):
    path = folder / "manifest.json"
    path.write_bytes(to_json(sealed({**manifest_of(folder), **changes})))
    assert told(folder, ()) == f"{path} is damaged: expected a step and files"


def test_the_step_of_a_manifest(folder):
    """With a seal any, as of a folder that was renamed; of old ones that of the folder."""
    values, path = manifest_of(folder), folder / "manifest.json"
    path.write_bytes(to_json(sealed({**values, "step": 0})))
    assert read_checkpoint(folder, ()).step == 0
    path.write_bytes(to_json({**values, "step": 4}))
    assert told(folder) == f"{path} is damaged: expected the step of its folder, got 4"
    path.write_bytes(to_json(values))
    assert read_checkpoint(folder, ()).step == 3
    path.write_bytes(to_json({**values, "step": 4}))
    renamed = folder.rename(folder.with_name("step-best"))
    assert read_checkpoint(renamed, ()).step == 4


def test_damage_has_a_name(folder):
    path, model = folder / "manifest.json", folder / "model.safetensors"
    whole, tensors = path.read_bytes(), model.read_bytes()
    values = manifest_of(folder)

    def resealed(name, entry):
        files = {**values["files"], name: entry}
        path.write_bytes(to_json(sealed({**values, "files": files})))

    path.write_bytes(whole.replace(b'"step": 3', b'"step": 4'))
    reason = "expected what it was written with, got other values than its own SHA-256 says"
    assert told(folder) == f"{path} is damaged: {reason}"
    path.write_text("[]")
    assert told(folder) == f"{path} is damaged: expected a JSON object"
    path.unlink()
    assert told(folder) == f"{folder} is damaged: manifest.json is missing"
    for version in (2, None, "1"):
        path.write_bytes(to_json({**values, "format": version}))
        assert told(folder) == f"{folder}: expected checkpoint format 1, got {version!r}"
    resealed("model.safetensors", None)
    assert told(folder) == f"{path} is damaged: expected an entry for model.safetensors"
    entry = values["files"]["model.safetensors"]
    for size in (len(tensors) + 1, None, "x"):
        resealed("model.safetensors", {**entry, "bytes": size})
        text = f"{model} is damaged: expected {size!r} bytes, got {len(tensors)}"
        assert told(folder) == text
    resealed("model.safetensors", {**entry, "sha256": None})
    assert told(folder) == f"{model} is damaged: its SHA-256 is not the one in manifest.json"
    path.write_bytes(whole)
    model.unlink()
    assert told(folder) == f"{folder} is damaged: model.safetensors is missing"
    model.write_bytes(tensors)
    os.truncate(model, 1 << 43)  # which is not read
    assert told(folder) == f"{model} is damaged: expected {len(tensors)} bytes, got {1 << 43}"
    model.write_bytes(tensors)
    state = folder / "state.json"
    size = state.stat().st_size
    state.write_bytes(b"{")
    assert told(folder) == f"{state} is damaged: expected {size} bytes, got 1"


def test_a_file_that_no_memory_holds(folder, monkeypatch):
    original = form.open_regular

    class Large:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def fileno(self):
            return self.file.fileno()

        def read(self):
            raise MemoryError

    size = (folder / "state.json").stat().st_size
    monkeypatch.setattr(form, "open_regular", lambda path: Large(original(path)))
    assert told(folder) == f"cannot read {folder / 'state.json'}: no memory for {size} bytes"


def test_files_whose_checksum_holds_and_content_does_not(folder):
    for name, text in (
        ("model.safetensors", "expected tensors, got something else"),
        ("state.json", "expected JSON, got Expecting value: line 1 column 1 (char 0)"),
    ):
        values = manifest_of(folder)
        before = (folder / name).read_bytes(), (folder / "manifest.json").read_bytes()
        (folder / name).write_bytes(b"junk")
        sum_of_junk = hashlib.sha256(b"junk").hexdigest()
        files = {**values["files"], name: {"bytes": 4, "sha256": sum_of_junk}}
        (folder / "manifest.json").write_bytes(to_json(sealed({**values, "files": files})))
        assert told(folder) == f"{folder / name} is damaged: {text}"
        (folder / name).write_bytes(before[0])
        (folder / "manifest.json").write_bytes(before[1])
    assert read_checkpoint(folder, ["model"]).step == 3


def test_without_the_package(monkeypatch):
    assert form.safetensors().__name__ == "safetensors.torch"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors", None)
        with pytest.raises(CheckpointError) as error:
            form.safetensors()
        text = "expected the safetensors package, got none; pip install 'nsa-torch[train]'"
        assert str(error.value) == text
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # it is there, and broken
    with pytest.raises(ModuleNotFoundError):
        form.safetensors()
