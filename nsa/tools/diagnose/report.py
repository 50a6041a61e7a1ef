"""The diagnosis of this machine: what it has, the backends and their parity, and what is wrong."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from nsa.backends import load, unavailable
from nsa.backends.dispatch import no_decode
from nsa.backends.fa2.providers import Report, collect_reports
from nsa.backends.protocol import Decoder
from nsa.registry import TABLE, fa2_names
from nsa.settings import (
    FlagRow,
    Settings,
    current_settings,
    environment_error,
    explain_settings,
    use_settings,
)
from nsa.testing.decoding import decode_parity
from nsa.testing.parity import attention_parity
from nsa.testing.selection import selection_faults
from nsa.tools.common.cli import choose_device
from nsa.tools.common.failures import failures, one_line
from nsa.tools.common.machine import Machine, collect_machine
from nsa.tools.common.problems import Trial, short, small_trials, typical_trials
from nsa.tools.diagnose.advice import advice
from nsa.tools.diagnose.choices import Choice, choose
from nsa.tools.diagnose.compile.report import CompileReport, collect_compile_report
from nsa.tools.diagnose.compile.toolchain import read_variables
from nsa.tools.diagnose.profile import BranchProfile, check_profile_device, profile_choice
from nsa.tools.diagnose.ranks import DistributedReport, collect_distributed
from nsa.tools.diagnose.tiles import TileRow, tile_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendRow:
    """One backend of the table, on this machine."""

    name: str
    summary: str
    requested: bool
    available: bool
    detail: str
    """What it cannot run here, and why; empty if it can run everything that was tried."""


@dataclass(frozen=True, slots=True)
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
    tiles: tuple[TileRow, ...]
    """What ``compiled``'s kernels are tiled by on the GPUs of this machine."""
    choices: tuple[Choice, ...]
    """What the settings come to on this machine; none where they are wrong."""
    distributed: DistributedReport
    """What several processes have here."""
    profile: tuple[BranchProfile, ...] | None
    """What ran; None if it was not requested."""
    compile: CompileReport | None
    """What torch.compile makes of it; None if it was not requested."""
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


def collect_diagnosis(
    device_name: str = "auto",
    backend: str | None = None,
    *,
    profile: bool = False,
    compiler: str | None = None,
) -> Diagnosis:
    """Run every check.

    Args:
        device_name: where the backends run: "auto", "cpu", "cuda" or "cuda:N".
        backend: one that must be able to run; None requests what the settings do.
        profile: run every branch and see which kernels those are; needs a CUDA device.
        compiler: compile every backend, or ``backend`` alone, with this compiler of torch's; None
            compiles nothing for show.

    Raises:
        ConfigError: there is no such device here.
        UsageError: nothing can be profiled on that device.
    """
    variables = read_variables()
    machine = collect_machine()
    device = choose_device("cpu" if device_name == "auto" and not machine.gpus else device_name)
    if profile:
        check_profile_device(device)
    providers = collect_reports(device)
    mistake = environment_error()
    problems = [] if mistake is None else [mistake]
    settings_rows = tuple(explain_settings())
    small, typical = small_trials(device), typical_trials(device)
    with use_settings(Settings() if mistake is not None else current_settings()) as settings:
        choices = [choose(trial, backend, settings) for trial in typical]
        refused = all(choice.backend is None for choice in choices)
        problems += [choices[0].reason] if refused else []
        requested = _requested(settings, backend)
        rows = tuple(_backend_row(name, small, name in requested) for name in TABLE)
        parity: list[ParityResult] = []
        for row in rows:
            if row.available:
                results, faults = _parity(row.name, small)
                parity += results
                problems += faults
        profiles: list[BranchProfile] = []
        for choice, trial in zip(choices, typical, strict=True):
            # in the dtype that models are trained in
            trained = trial.dtype == typical[0].dtype
            if profile and mistake is None and trained and choice.backend is not None:
                found, faults = profile_choice(choice, trial)
                profiles += found
                problems += faults
        report = None
        if compiler is not None:
            report, faults = collect_compile_report(
                device, compiler, backend, settings, variables, machine.triton
            )
            problems += faults
        way_out = _way_out(typical[0], backend, settings) if refused else None
    return Diagnosis(
        machine=machine,
        providers=providers,
        settings=settings_rows,
        settings_error=mistake,
        backends=rows,
        parity=tuple(parity),
        tiles=tile_rows(machine.gpus),
        choices=() if mistake is not None else tuple(choices),
        distributed=collect_distributed(),
        profile=tuple(profiles) if profile else None,
        compile=report,
        advice=tuple(advice(machine, providers, settings, mistake)),
        problems=tuple(problems),
        way_out=way_out,
    )


def _requested(settings: Settings, backend: str | None) -> frozenset[str]:
    """The backends that must run: of the flag, else of the environment."""
    if backend is not None:
        return frozenset({backend})
    if settings.backend != "auto":
        return frozenset({settings.backend})
    return frozenset(fa2_names() if settings.use_fa2 else ())


def _way_out(trial: Trial, backend: str | None, settings: Settings) -> str | None:
    """What would run without the requests that cannot be honoured."""
    if backend is not None:
        requests, instead = f"--backend {backend}", None
    else:
        flags = {"NSA_BACKEND": settings.backend != "auto", "NSA_USE_FA2": settings.use_fa2}
        requests, instead = " and ".join(flag for flag, is_set in flags.items() if is_set), "auto"
    choice = choose(trial, instead, settings)
    return choice.backend and f"Without {requests}, {choice.backend} would run."


def _backend_row(name: str, trials: Sequence[Trial], requested: bool) -> BackendRow:
    refusals = {str(trial): unavailable(name, trial.problem) for trial in trials}
    reasons = [f"{trial}: {reason}" for trial, reason in refusals.items() if reason is not None]
    if len(set(refusals.values())) == 1:  # the same answer to everything
        reasons = [next(iter(refusals.values())) or ""]
    return BackendRow(
        name=name,
        summary=TABLE[name].summary,
        requested=requested,
        available=None in refusals.values(),
        detail="; ".join(reasons),
    )


def _parity(name: str, trials: Sequence[Trial]) -> tuple[list[ParityResult], list[str]]:
    """Compare one backend with the oracle; returns every comparison, and what is wrong."""
    results, problems = [], []
    for trial in trials:
        if unavailable(name, trial.problem) is not None:
            continue
        inputs = trial.inputs()
        try:
            rows = [(row.name, row.error, row.bound) for row in attention_parity(name, inputs)]
            faults = selection_faults(name, inputs)
            if not trial.packed and no_decode(name, trial.problem) is None:
                row, wrong = decode_parity(cast(Decoder, load(name)), inputs)
                rows.append((row.name, row.error, row.bound))
                faults += [f"in decode, {fault}" for fault in wrong]
        except failures() as failure:
            problems.append(f"{name} failed, {trial}: {one_line(failure)}")
            continue
        device, dtype = str(trial.device), short(trial.dtype)
        for tensor, error, bound in [*rows, ("selection", float(len(faults)), 0.0)]:
            result = ParityResult(name, device, dtype, trial.packed, tensor, error, bound)
            results.append(result)
            if tensor != "selection" and not result.ok:
                problems.append(f"{name}, {trial}: {tensor} is {error:.2e} off, above {bound:.2e}")
        problems += [f"{name}, {trial}: selection: {fault}" for fault in faults]
    return results, problems
