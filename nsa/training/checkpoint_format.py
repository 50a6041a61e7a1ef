"""The files of one checkpoint, written with their checksums, and checked when read."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from nsa.errors import CheckpointError, show
from nsa.training.files import (
    JSON_LIMIT,
    open_regular,
    parse_json,
    read_file,
    sealed,
    sync_folder,
    to_json,
    unsealed,
    write_durably,
)

FORMAT = 1
"""Raised by one whenever what is written changes."""

MANIFEST = "manifest.json"
_PREFIX = "step-"
_STATE = "state.json"


def name_of(step: int) -> str:
    """Name the folder of a checkpoint."""
    return f"{_PREFIX}{step:06d}"


def step_in(name: str) -> int:
    """Read the step off the name of a checkpoint; -1 where :func:`name_of` gives no such name."""
    match = re.fullmatch(rf"{_PREFIX}([0-9]{{6,18}})", name)
    step = int(match[1]) if match else -1
    return step if name == name_of(step) else -1


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
            raise CheckpointError(f"{self.path}: expected a tensor named {show(name)}, got none")
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise CheckpointError(
                f"{self.path}: {name}: expected {like.dtype} {list(like.shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        return tensor

    def value(self, *names: str, kind: type) -> Any:
        """Look one value of the JSON part up, table by table.

        Raises:
            CheckpointError: it is missing, or of another type.
        """
        value: Any = self.state
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        if type(value) is not kind:
            raise CheckpointError(
                f"{self.path / _STATE}: {'.'.join(names)}: expected {kind.__name__}, "
                f"got {show(value)}"
            )
        return value


def write_checkpoint(
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
        write(f"{group}.safetensors", safetensors().save(on_cpu))
    write(_STATE, to_json(state))
    manifest = sealed({"format": FORMAT, "step": step, "files": files})
    write_durably(folder / MANIFEST, to_json(manifest))
    sync_folder(folder)


def read_checkpoint(folder: Path, groups: Iterable[str]) -> Checkpoint:
    """Read one checkpoint back and check sizes and checksums; as
    :func:`nsa.training.checkpoint.load_checkpoint`."""
    step, files = _read_manifest(folder)
    state = _parse(folder / _STATE, _read_checked(folder / _STATE, files))
    tensors = {}
    for group in groups:
        file = folder / f"{group}.safetensors"
        tensors[group] = _parse_tensors(file, _read_checked(file, files))
    return Checkpoint(path=folder, step=step, state=state, tensors=tensors)


def _read_manifest(folder: Path) -> tuple[int, dict[str, Any]]:
    """Read the step, and of each file what is known about it."""
    path = folder / MANIFEST
    try:
        manifest = _parse(path, read_file(path, limit=JSON_LIMIT))
    except OSError as error:
        raise _unreadable(path, error) from error
    version = manifest.get("format")
    if version != FORMAT:
        raise CheckpointError(f"{folder}: expected checkpoint format {FORMAT}, got {show(version)}")
    try:
        values = unsealed(manifest)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    step, files = values.get("step"), values.get("files")
    if type(step) is not int or step < 0 or not isinstance(files, dict):
        raise CheckpointError(f"{path} is damaged: expected a step and files")
    without_seal = values == manifest  # written before there were seals
    if without_seal and step_in(folder.name) not in (-1, step):
        raise CheckpointError(f"{path} is damaged: expected the step of its folder, got {step}")
    return step, files


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path.parent} is damaged: {path.name} is missing")
    return CheckpointError(f"cannot read {path}: {error.strerror or error}")


def _read_checked(path: Path, files: Mapping[str, Any]) -> bytes:
    """Read a file that must be as the manifest says."""
    entry = files.get(path.name)
    if not isinstance(entry, dict):
        manifest = path.with_name(MANIFEST)
        raise CheckpointError(f"{manifest} is damaged: expected an entry for {path.name}")
    expected = entry.get("bytes")
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read() if size == expected else b""
    except OSError as error:
        raise _unreadable(path, error) from error
    except MemoryError:
        raise CheckpointError(f"cannot read {path}: no memory for {size:,} bytes") from None
    if size != expected:
        raise CheckpointError(f"{path} is damaged: expected {show(expected)} bytes, got {size}")
    if entry.get("sha256") != hashlib.sha256(data).hexdigest():
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")
    return data


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    try:
        return parse_json(data)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _parse_tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError

    try:
        return safetensors().load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: expected tensors, got something else") from error


def safetensors() -> ModuleType:
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
