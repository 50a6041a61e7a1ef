"""What ``diagnose`` finds: the facts, the backends, the parity, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from nsa.settings import FlagRow
from nsa.tools._flash_attn import Provider
from nsa.tools._machine import Machine


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
    providers: tuple[Provider, ...]
    settings: tuple[FlagRow, ...]
    settings_error: str | None
    backends: tuple[BackendRow, ...]
    choice: str | None
    """What the settings come to on this machine, and why; None if they cannot be honoured."""
    parity: tuple[ParityResult, ...]
    problems: tuple[str, ...]
    """Why the exit code is 1; none, and it is 0."""
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a number that is not finite becomes null."""
        values = dataclasses.asdict(self)
        values["settings"] = [row._asdict() for row in self.settings]
        for row, result in zip(values["parity"], self.parity, strict=True):
            row["ok"] = result.ok
            for name in ("error", "bound"):
                row[name] = row[name] if math.isfinite(row[name]) else None
        return {"ok": not self.problems, **values}
