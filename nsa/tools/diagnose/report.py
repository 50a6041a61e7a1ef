"""What ``diagnose`` finds: the facts, the backends, the parity, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from nsa.backends.fa2.providers import Report
from nsa.settings import FlagRow
from nsa.tools.common.machine import Machine
from nsa.tools.diagnose.choices import Choice
from nsa.tools.diagnose.compile.report import CompileReport
from nsa.tools.diagnose.profile import BranchProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendRow:
    """One backend of the table, on this machine."""

    name: str
    summary: str
    requested: bool
    available: bool
    detail: str
    """What it cannot run here, and why; empty if it can run everything that was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityResult:
    """One output or gradient of a small problem beside the oracle's."""

    backend: str
    device: str
    dtype: str
    packed: bool
    tensor: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # false for NaN


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Everything that is printed."""

    machine: Machine
    providers: tuple[Report, ...]
    settings: tuple[FlagRow, ...]
    settings_error: str | None
    backends: tuple[BackendRow, ...]
    parity: tuple[ParityResult, ...]
    choices: tuple[Choice, ...]
    """What the settings come to on this machine; none where they are wrong."""
    profile: tuple[BranchProfile, ...] | None
    """What ran; None where nobody asked."""
    compile: CompileReport | None
    """What torch.compile makes of it; None where nobody asked."""
    advice: tuple[str, ...]
    problems: tuple[str, ...]
    """Why the exit code is 1; none, and it is 0."""
    way_out: str | None
    """What would run without the request that cannot be honoured."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a number that is not finite becomes null."""
        values = dataclasses.asdict(self)
        values["settings"] = [row._asdict() for row in self.settings]
        for row, result in zip(values["parity"], self.parity, strict=True):
            row["ok"] = result.ok
            for name in ("error", "bound"):
                row[name] = row[name] if math.isfinite(row[name]) else None
        return {"ok": not self.problems, **values}
