"""metrics.jsonl: one JSON object a line, a step never twice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from nsa.errors import DataError
from nsa.training.atomic_files import replace_atomically


class MetricsFile:
    """Appends lines to a run's metrics; a context manager.

    Args:
        path: the file.
        step: the step that training goes on from. Lines of later steps, and a line that a kill left
            unfinished, are dropped: those steps will be run, and written, again.

    Raises:
        DataError: the disk refused a line.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self._path = path
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _belongs(line, step)]
            if kept != lines:
                replace_atomically(path, b"".join(kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__

    def write(self, **values: Any) -> None:
        """Appends one line; whoever reads along sees it at once."""
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            raise DataError(f"could not write {self._path}: {error.strerror or error}") from error

    def sync(self) -> None:
        """Waits until every line is on the disk."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._file.close()
        except OSError:
            if kind is None:  # else the buffered line has failed, and been reported, once already
                raise


def _belongs(line: bytes, step: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        values = json.loads(line)
    except ValueError:
        return False
    return (
        isinstance(values, dict)
        and isinstance(values.get("step"), int)
        and (values["step"] <= step)
    )
