"""The report of ``diagnose --compile``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsa.settings import Settings
from nsa.tools.diagnose.compile.branches import BACKEND, BranchKernel, branch_kernels
from nsa.tools.diagnose.compile.toolchain import Toolchain, Variable, collect_toolchain
from nsa.tools.diagnose.compile.trials import CompileTrial, compile_trial, faults, plan_trials


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


def collect_compile_report(
    device: torch.device,
    compiler: str,
    backend: str | None,
    settings: Settings,
    variables: tuple[Variable, ...],
    triton: str | None,
) -> tuple[CompileReport, list[str]]:
    """Compile, run and count; returns what is wrong as well.

    Args:
        compiler: of the trials, one of :data:`nsa.tools.diagnose.compile.trials.COMPILERS`.
        backend: the only one to compile; None means all that can run.
        variables: the environment before anything was compiled.
        triton: its version, or None.
    """
    from nsa.tools.common.progress import Bar  # heavy: only who compiles needs it

    toolchain = collect_toolchain(device, variables, triton)
    branches, refused = branch_kernels(device, settings)
    problems = [
        f"compile, {row.kind}: {row.branch} of {BACKEND} failed: {row.detail}"
        for row in branches
        if row.kernel == "failed"
    ]
    planned, left_out = plan_trials(device, backend)
    refusal = toolchain.refusal if compiler == "inductor" else None
    if toolchain.off is not None:
        off = f"{toolchain.off} turns torch.compile off"
        refusal = f"{off}, so that nothing was compiled: unset it"
    if refusal is not None:
        problems.append(f"compile: {refusal}")
        left_out |= {name: "not tried, for the reason at the end" for name, _ in planned}
        planned = []
    trials = []
    with Bar(len(planned)) as bar:
        for i, (name, trial) in enumerate(planned, start=1):
            if not bar.drawn:
                bar.line(f"compiling {i} of {len(planned)}: {name}, {trial.kind}, {compiler}")
            found = compile_trial(name, trial, compiler, lambda what: bar.show(description=what))
            trials.append(found)
            problems += faults(found)
            bar.step()
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
