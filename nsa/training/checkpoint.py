"""Checkpoints on disk: written whole or not at all, and checked when read.

A store is a folder::

    step-000200/            one checkpoint; older ones are removed
        model.safetensors  optimizer.safetensors  rng.safetensors
        state.json          everything that is not a tensor
        manifest.json       size and SHA-256 of the other files, written last
    latest                  the name of the newest complete checkpoint

A checkpoint is written under a temporary name, put on the disk, renamed, and only then named by
``latest``. Whatever happens on the way (a kill, a full disk), ``latest`` names a complete one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from nsa.errors import CheckpointError
from nsa.training.files import replace_atomically, sync_folder, to_json, write_durably

FORMAT = 1
"""Raised by one whenever what is written changes."""

_PREFIX = "step-"
_LATEST = "latest"
_MANIFEST = "manifest.json"
_STATE = "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What was read back; every byte of it matched its checksum."""

    path: Path
    step: int
    """Optimizer steps done."""
    state: dict[str, Any]
    """The JSON part."""
    tensors: dict[str, dict[str, Tensor]]
    """The groups of tensors requested, on the CPU."""

    def tensor(self, group: str, name: str, *, like: Tensor) -> Tensor:
        """Look one tensor up.

        Raises:
            CheckpointError: it is missing, or of another shape or dtype than ``like``.
        """
        tensor = self.tensors[group].get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path}: expected a tensor named {name!r}, got none")
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise CheckpointError(
                f"{self.path}: {name}: expected {like.dtype} {list(like.shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        return tensor


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: where they live; made at the first save.
        keep: how many to keep, the newest first.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        _safetensors()  # a missing package is better found before training than after
        self.folder = folder
        self.keep = keep

    def latest(self) -> Path | None:
        """Find the newest complete checkpoint; None when nothing has been saved.

        Raises:
            CheckpointError: ``latest`` does not name a folder that is there.
        """
        pointer = self.folder / _LATEST
        try:
            name = pointer.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {pointer}: {error}") from error
        checkpoints = {path.name: path for path in self._all()}
        if name not in checkpoints:
            raise CheckpointError(
                f"{pointer}: expected the name of a checkpoint beside it, got {name!r} (found: "
                f"{', '.join(checkpoints) or 'none'}); write one of those into it to resume from it"
            )
        return checkpoints[name]

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> Path:
        """Write one checkpoint and make it the latest.

        Args:
            step: optimizer steps done.
            tensors: a name for each group of tensors, and the group; each becomes one file.
            state: values that JSON can hold.

        Raises:
            CheckpointError: the disk refused; the checkpoints already there are as they were.
        """
        final = self.folder / f"{_PREFIX}{step:06d}"
        previous = self.latest()
        if previous == final:  # an interrupt right after a periodic save
            return final
        temporary = self.folder / f".{final.name}.{os.getpid()}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(".*.tmp"):  # what a killed save left
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            _write(temporary, step, tensors, state)
            if final.exists():  # of a damaged or abandoned run; latest does not name it
                self._remove(final)
            os.rename(temporary, final)
            sync_folder(self.folder)
            replace_atomically(self.folder / _LATEST, f"{final.name}\n".encode())
            for old in self._all()[: -self.keep]:
                if old != final:
                    self._remove(old)
        except OSError as error:
            intact = f"{previous} is intact" if previous else "there is no earlier one"
            raise CheckpointError(
                f"could not save {final}: {error.strerror or error}; {intact}"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return final

    def _all(self) -> list[Path]:
        """List every checkpoint, oldest first."""
        found = [path for path in self.folder.glob(f"{_PREFIX}*") if path.is_dir()]
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def _remove(self, path: Path) -> None:
        """Delete a checkpoint; its name is gone before its files, so it is never half there."""
        trash = self.folder / f".{path.name}.{os.getpid()}.old.tmp"
        os.rename(path, trash)
        shutil.rmtree(trash)


def _write(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    """Write the files of one checkpoint, the manifest last."""
    folder.mkdir()
    files: dict[str, Any] = {}

    def write(name: str, data: bytes) -> None:
        write_durably(folder / name, data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    for group, named in tensors.items():
        # Made contiguous here: safetensors refuses views.
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
        write(f"{group}.safetensors", _safetensors().save(on_cpu))
    write(_STATE, to_json(state))
    write_durably(folder / _MANIFEST, to_json({"format": FORMAT, "step": step, "files": files}))
    sync_folder(folder)


def load_checkpoint(path: Path, groups: Iterable[str]) -> Checkpoint:
    """Read one checkpoint back and check sizes and checksums.

    Args:
        path: a run's folder, its folder of checkpoints, or one checkpoint.
        groups: the groups of tensors wanted; the files of the others are not read.

    Raises:
        CheckpointError: nothing there, or a file that is missing, truncated, changed, or written
            in another format.
    """
    folder = find_checkpoint(path)
    manifest = _parse_json(folder / _MANIFEST, _read(folder / _MANIFEST))
    version = manifest.get("format")
    if version != FORMAT:
        raise CheckpointError(f"{folder}: expected checkpoint format {FORMAT}, got {version!r}")
    step, files = manifest.get("step"), manifest.get("files")
    if not isinstance(step, int) or not isinstance(files, dict):
        raise CheckpointError(f"{folder / _MANIFEST} is damaged: expected a step and files")
    state = _parse_json(folder / _STATE, _read_checked(folder / _STATE, files))
    # The checksums matched, so a file that does not parse would be a bug of ours, not damage.
    tensors = {
        group: _safetensors().load(_read_checked(folder / f"{group}.safetensors", files))
        for group in groups
    }
    return Checkpoint(path=folder, step=step, state=state, tensors=tensors)


def find_checkpoint(path: Path) -> Path:
    """Find the checkpoint that a path means: itself, or the latest of a run or a store.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_dir() and (path.name.startswith(_PREFIX) or (path / _MANIFEST).exists()):
        return path
    for folder in (path, path / "checkpoints"):
        latest = CheckpointStore(folder, keep=1).latest() if folder.is_dir() else None
        if latest is not None:
            return latest
    what = "a file" if path.is_file() else "nothing there"
    if path.is_dir():
        what = "a folder without one"
    raise CheckpointError(f"{path}: expected a run or a checkpoint folder, got {what}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is damaged: {path.name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _read_checked(path: Path, files: Mapping[str, Any]) -> bytes:
    """Read a file that must be as the manifest says."""
    data = _read(path)
    entry = files.get(path.name)
    if not isinstance(entry, dict):
        manifest = path.with_name(_MANIFEST)
        raise CheckpointError(f"{manifest} is damaged: expected an entry for {path.name}")
    if entry.get("bytes") != len(data):
        raise CheckpointError(
            f"{path} is damaged: expected {entry.get('bytes')} bytes, got {len(data)}"
        )
    if entry.get("sha256") != hashlib.sha256(data).hexdigest():
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {_MANIFEST}")
    return data


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:  # UnicodeDecodeError is one
        raise CheckpointError(f"{path} is damaged: expected JSON, got {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: expected a JSON object")
    return value


def _safetensors() -> ModuleType:
    """Import the package late: everything but checkpoints works without it."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        if error.name != "safetensors":
            raise
        raise CheckpointError(
            "expected the safetensors package, got none; pip install 'nsa-torch[train]'"
        ) from None
    return safetensors.torch
