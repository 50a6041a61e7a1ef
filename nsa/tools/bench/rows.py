"""What a run of ``bench`` leaves behind: one row for each measurement, and the file they go to."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nsa.tools.bench.cases import heads_label
from nsa.tools.bench.timing import PASSES, Measurement
from nsa.tools.bench.work import work
from nsa.tools.common.problems import Trial, short
from nsa.tools.common.streams import Output

ANY = "any"
"""The branch of a row that says why a backend was not timed at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One branch of one backend on one problem: measured, or why not."""

    trial: Trial
    backend: str
    """A backend of the table, a peer, or a way to compute dense attention."""
    branch: str
    runs_on: str
    """The backend that computes it; another one than ``backend`` where a flag says so, and for the
    selection of FA-2 backends."""
    measured: Measurement = field(default_factory=Measurement)
    parity: float | None = None
    """The largest error of the parity check that ran before, as a share of its bound."""
    note: str = ""
    """Why it was not measured; empty if it was."""

    @property
    def title(self) -> str:
        """What the rows of a table have in common."""
        trial = self.trial
        batch = f"batch {trial.batch}"
        if trial.packed:
            batch = f"{len(trial.lengths)} packed sequences"
        heads, dtype = heads_label(trial.config), short(trial.dtype)
        return f"heads {heads}, {dtype}, {batch}, on {trial.device}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: times in milliseconds, work in operations and bytes."""
        trial = self.trial
        values: dict[str, Any] = {
            "kind": "row",
            "heads": heads_label(trial.config),
            "dtype": short(trial.dtype),
            "batch": trial.batch,
            "length": trial.length,
            "packed_lengths": list(trial.lengths) if trial.packed else None,
            "backend": self.backend,
            "branch": self.branch,
            "runs_on": self.runs_on,
        }
        for name in PASSES:
            timing = getattr(self.measured, name)
            seconds = (None,) * 3 if timing is None else timing[:3]
            for suffix, x in zip(("ms", "p10_ms", "p90_ms"), seconds, strict=True):
                values[f"{name}_{suffix}"] = None if x is None else x * 1e3
            values[f"{name}_runs"] = None if timing is None else timing.runs
        values["peak_bytes"] = self.measured.peak_bytes
        least = (None, None) if self.note else work(self.branch, trial)
        for name, one in zip(PASSES[:2], least, strict=True):
            values[f"{name}_flops"] = None if one is None else one.flops
            values[f"{name}_bytes"] = None if one is None else one.bytes
        # JSON has no infinity, and says null for "never within its bound"
        finite = self.parity is not None and self.parity < float("inf")
        values["parity"] = self.parity if finite else None
        values["note"] = self.note or None
        return values


def write_line(file: Output | None, values: dict[str, Any]) -> None:
    """Write a JSON line to a file, if any, and flush it: an end in between loses none."""
    if file is not None:
        file.write(json.dumps(values, allow_nan=False, ensure_ascii=False) + "\n")
        file.flush()


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that differ in length, backend and branch only, in the order in which they came."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        trial = row.trial
        key = (trial.config, trial.device, trial.dtype, trial.packed, len(trial.lengths))
        found.setdefault(key, []).append(row)
    return list(found.values())
