"""Files that survive a crash: replaced whole or not at all, or appended to a line at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsa.errors import DataError


def to_json(value: Mapping[str, Any]) -> bytes:
    """Encode a file of JSON that people may read."""
    return (json.dumps(value, indent=1) + "\n").encode()


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)  # write() does not say which file
        raise


def replace_atomically(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``; a crash at any moment leaves the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_durably(temporary, data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable, where the system can."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class JsonlWriter:
    """Appends JSON objects to a file, one a line, a step never twice; a context manager.

    Args:
        path: the file.
        step: the step that training resumes from. Lines of later steps, and a line that a kill left
            unfinished, are dropped: those steps will be run, and written, again.

    Raises:
        DataError: the disk refused a line.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self._path = path
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _is_up_to(step, line)]
            if kept != lines:
                replace_atomically(path, b"".join(kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__

    def write(self, **values: Any) -> None:
        """Append one line; a reader of the file sees it at once."""
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            raise DataError(f"could not write {self._path}: {error.strerror or error}") from error

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            self._file.close()
        except OSError:
            if kind is None:  # else the buffered line has failed, and been reported, once already
                raise


def _is_up_to(step: int, line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, TypeError, KeyError):
        return False
