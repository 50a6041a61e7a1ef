"""The metrics of a run: a file of JSON, one object a line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from nsa.errors import DataError
from nsa.training.files import read_file, replace_atomically

_LIMIT = 1 << 30
"""Bytes; ten million steps."""


class JsonlWriter:
    """Appends JSON objects to a file, one a line, a step never twice; a context manager.

    Args:
        path: the file.
        step: the step that training resumes from. Lines of later steps, and a line that a kill left
            unfinished, are dropped: those steps will be run, and written, again.
        say: prints a line; called when lines are lost.

    Raises:
        DataError: the file is none that can be read, or the disk refused a line.
    """

    def __init__(self, path: Path, *, step: int, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say
        try:
            lines = read_file(path, limit=_LIMIT).splitlines(keepends=True)
        except FileNotFoundError:
            lines = []
            if step:
                say(f"note: {path} is missing; the new one begins after step {step}")
        except OSError as error:
            raise DataError(f"cannot use {path}: {error.strerror or error}") from error
        steps = {line: _step_of(line) for line in lines}
        damaged = [line for line in lines if steps[line] is None and line.endswith(b"\n")]
        if damaged:
            say(f"note: {path}: dropped damaged lines: {len(damaged)}")
        kept = [line for line in lines if (at := steps[line]) is not None and at <= step]
        # What is at the other end of a link is nothing to write to: the folder may be a stranger's.
        if kept != lines or path.is_symlink():
            replace_atomically(path, b"".join(kept))
        self._file = self._open()

    def write(self, **values: Any) -> None:
        """Append one line; a reader of the file sees it at once."""
        try:
            self._stay_at_the_path()
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            raise DataError(f"could not write {self._path}: {error.strerror or error}") from error

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        os.fsync(self._file.fileno())

    def _open(self) -> TextIO:
        flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        return open(  # closed in __exit__
            self._path,
            "a",
            encoding="utf-8",
            opener=lambda name, default: os.open(name, default | flags, 0o666),
        )

    def _stay_at_the_path(self) -> None:
        """Begin anew where the file was removed, so that no line goes where nobody sees it."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file.fileno()), os.lstat(self._path)):
                return
        self._say(f"note: {self._path} was removed while training; its earlier lines are gone")
        self._file.close()
        self._file = self._open()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            self._file.close()
        except OSError:
            if kind is None:  # else the buffered line has failed, and been reported, once already
                raise


class NoWriter:
    """Drops the metrics of a process that writes none."""

    def write(self, **values: Any) -> None:
        """Drop a line."""

    def sync(self) -> None:
        """Wait for nothing."""

    def __enter__(self) -> NoWriter:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _step_of(line: bytes) -> int | None:
    """Read the step of a line; None where it is damaged."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) else None
