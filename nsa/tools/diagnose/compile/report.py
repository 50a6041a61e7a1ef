"""What ``diagnose --compile`` finds, all of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nsa.settings import Settings
from nsa.tools.diagnose.compile.branches import BACKEND, BranchKernel, branch_kernels
from nsa.tools.diagnose.compile.toolchain import Toolchain, Variable, look_at_toolchain
from nsa.tools.diagnose.compile.trials import CompileTrial, compile_trial, faults, plan_trials

_Begin = Callable[[str], Callable[[str], None]]
"""Says what is compiled next, and returns what says how far that is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileReport:
    """What ``torch.compile`` has here, and what it makes of the backends."""

    toolchain: Toolchain
    variables: tuple[Variable, ...]
    compiler: str
    """Of the trials."""
    trials: tuple[CompileTrial, ...]
    left_out: dict[str, str]
    """Backends without a trial, and why."""
    branches: tuple[BranchKernel, ...]
    """What each branch of ``compiled`` becomes."""
    branches_refused: str | None
    """Why ``compiled`` has no branches here."""


def look_at_compiling(
    device: torch.device,
    compiler: str,
    backend: str | None,
    settings: Settings,
    variables: tuple[Variable, ...],
    triton: str | None,
) -> tuple[CompileReport, list[str]]:
    """Looks, compiles and counts; returns what is wrong as well.

    Args:
        device: where the code runs.
        compiler: of the trials, one of :data:`nsa.tools.diagnose.compile.trials.COMPILERS`.
        backend: the only one to compile; None means all that can run.
        settings: those in force.
        variables: what the environment was before anything was compiled.
        triton: its version, or None.
    """
    toolchain = look_at_toolchain(device, variables, triton)
    branches, refused = branch_kernels(device, settings)
    problems = [
        f"compile, {row.kind}: {row.branch} of {BACKEND} failed: {row.detail}"
        for row in branches
        if row.kernel == "failed"
    ]
    planned, left_out = plan_trials(device, backend)
    why_none = _why_none(toolchain, compiler)
    if why_none is not None:
        problems.append(f"compile: {why_none}")
        left_out |= {name: "not tried, for the reason at the end" for name, _ in planned}
        planned = []
    trials = []
    with _progress(len(planned), compiler) as begin:
        for name, trial in planned:
            say = begin(f"{name}, {trial.kind}")
            trials.append(compile_trial(name, trial, compiler, say))
            problems += faults(trials[-1])
    report = CompileReport(
        toolchain=toolchain,
        variables=variables,
        compiler=compiler,
        trials=tuple(trials),
        left_out=left_out,
        branches=branches,
        branches_refused=refused,
    )
    return report, problems


def _why_none(toolchain: Toolchain, compiler: str) -> str | None:
    """Why nothing can be compiled, or None."""
    if toolchain.off is not None:
        return f"{toolchain.off} turns torch.compile off, so that nothing was compiled: unset it"
    return toolchain.refusal if compiler == "inductor" else None


@contextmanager
def _progress(steps: int, compiler: str) -> Iterator[_Begin]:
    """A bar on a terminal's stderr, a line for each trial on any other."""
    bar = Progress(
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    task = bar.add_task("", total=steps)
    begun = 0

    def begin(what: str) -> Callable[[str], None]:
        nonlocal begun
        bar.update(task, completed=begun, description=what)
        begun += 1
        if bar.disable:
            print(f"compiling {begun} of {steps}: {what}, {compiler}", file=sys.stderr, flush=True)
        return lambda detail: bar.update(task, description=f"{what}: {detail}, {compiler}")

    with bar:
        yield begin
