"""What a run of ``bench`` leaves behind: one row for each measurement, and the file they go to."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch

from nsa.tools.bench.cases import Shape
from nsa.tools.bench.flops import Work
from nsa.tools.bench.timing import PASSES, Measurement, Timing

ANY = "any"
"""The branch of a row that says why a backend was not timed at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One branch of one backend on one problem: measured, or why not."""

    shape: Shape
    backend: str
    """A backend of the table, "fla", or a way to compute dense attention."""
    branch: str
    runs_on: str
    """The backend that computes it; another one than ``backend`` where a flag says so, and for the
    selection of FA-2 backends."""
    measured: Measurement = field(default_factory=Measurement)
    parity: float | None = None
    """The largest error of the parity check that ran before, as a share of its bound."""
    work: tuple[Work, Work] | None = None
    """The least that forward and backward have to do."""
    note: str = ""
    """Why it was not measured; empty if it was."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: times in milliseconds, work in operations and bytes."""
        shape = self.shape
        values: dict[str, Any] = {
            "kind": "row",
            "heads": shape.heads,
            "dtype": short(shape.dtype),
            "batch": shape.batch,
            "length": shape.length,
            "packed_lengths": list(shape.lengths) if shape.sequences else None,
            "backend": self.backend,
            "branch": self.branch,
            "runs_on": self.runs_on,
        }
        for name in PASSES:
            values |= _timing_values(name, getattr(self.measured, name))
        values["peak_bytes"] = self.measured.peak_bytes
        for name, work in zip(PASSES[:2], self.work or (None, None), strict=True):
            values[f"{name}_flops"] = None if work is None else work.flops
            values[f"{name}_bytes"] = None if work is None else work.bytes
        # JSON has no infinity, and says null for "never within its bound"
        finite = self.parity is not None and self.parity < float("inf")
        values["parity"] = self.parity if finite else None
        values["note"] = self.note or None
        return values


def _timing_values(name: str, timing: Timing | None) -> dict[str, float | int | None]:
    if timing is None:
        return dict.fromkeys((f"{name}_ms", f"{name}_p10_ms", f"{name}_p90_ms", f"{name}_runs"))
    return {
        f"{name}_ms": timing.median * 1e3,
        f"{name}_p10_ms": timing.low * 1e3,
        f"{name}_p90_ms": timing.high * 1e3,
        f"{name}_runs": timing.runs,
    }


class Journal:
    """JSON lines, each written and flushed at once, so that an end in between loses none.

    Args:
        file: where they go; None writes nothing.
    """

    def __init__(self, file: TextIO | None) -> None:
        self._file = file

    def write(self, values: dict[str, Any]) -> None:
        """Adds one line."""
        if self._file is not None:
            self._file.write(json.dumps(values, allow_nan=False, ensure_ascii=False) + "\n")
            self._file.flush()


def short(dtype: torch.dtype) -> str:
    """``float32`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that differ in length, backend and branch only, in the order in which they came."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        shape = row.shape
        key = (shape.config, shape.device, shape.dtype, shape.batch, shape.sequences)
        found.setdefault(key, []).append(row)
    return list(found.values())
