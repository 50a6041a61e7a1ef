"""Says what this machine can run, and proves it: ``python -m nsa.tools.diagnose``.

Exit code 0: everything asked for works. 1: a requested backend cannot run, a backend is not within
its accuracy bounds, one that claims FlashAttention-2 ran other kernels (``--profile``), one breaks
its graph or compiles again (``--compile``), or the ``NSA_…`` environment is wrong. 2: the command
line is wrong.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence

from rich.console import Console

from nsa.backends import TABLE, unavailable
from nsa.backends.fa2.providers import survey
from nsa.config import nearest
from nsa.errors import BackendUnavailable, UsageError
from nsa.registry import names
from nsa.settings import (
    Settings,
    current_settings,
    environment_error,
    explain_settings,
    use_settings,
)
from nsa.testing.parity import attention_parity, selection_faults
from nsa.tools.common.cli import Parser, choose_device, run
from nsa.tools.common.failures import failures, one_line
from nsa.tools.common.machine import look_at_machine
from nsa.tools.common.problems import Trial, short, small_trials, typical_trials
from nsa.tools.diagnose.advice import advice
from nsa.tools.diagnose.choices import Choice, choose, resolved
from nsa.tools.diagnose.compile.report import look_at_compiling
from nsa.tools.diagnose.compile.toolchain import read_variables
from nsa.tools.diagnose.compile.trials import COMPILERS
from nsa.tools.diagnose.profile import BranchProfile, check_profile_device, profile_choice
from nsa.tools.diagnose.report import BackendRow, Diagnosis, ParityResult
from nsa.tools.diagnose.tables import print_diagnosis

_EXAMPLES = """\
examples:
  python -m nsa.tools.diagnose
  NSA_USE_FA2=1 python -m nsa.tools.diagnose --profile
  python -m nsa.tools.diagnose --backend sdpa --json
  python -m nsa.tools.diagnose --compile inductor --backend compiled
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m nsa.tools.diagnose",
        description="Say what this machine can run, and hold every backend to the oracle.",
    )
    parser.epilog = _EXAMPLES
    add = parser.add_argument
    add("--backend", metavar="NAME", help=f"fail unless this one runs: {', '.join(names())}")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--profile", action="store_true", help="show which kernels run each branch (CUDA)")
    add(
        "--compile",
        nargs="?",
        const=COMPILERS[0],
        metavar="COMPILER",
        help="show what torch.compile makes of every backend, or of --backend's, and hold it to "
        f"one graph and no recompiles; takes minutes: {', '.join(COMPILERS)} "
        f"(default: {COMPILERS[0]}; the quickest: eager; the real one: inductor)",
    )
    add("--json", action="store_true", help="print JSON for programs instead of tables")
    arguments = parser.parse_strictly(argv)
    if arguments.backend is not None and arguments.backend not in names():
        raise UsageError(
            f"--backend: expected one of the known names, got {arguments.backend!r}; "
            f"{nearest(arguments.backend, names())}"
        )
    if arguments.compile is not None and arguments.compile not in COMPILERS:
        raise UsageError(
            f"--compile: expected one of the known names, got {arguments.compile!r}; "
            f"{nearest(arguments.compile, COMPILERS)}"
        )
    # A library that prints while it is probed must not spoil the JSON.
    with contextlib.redirect_stdout(sys.stderr):
        diagnosis = diagnose(
            arguments.device,
            arguments.backend,
            profile=arguments.profile,
            compiler=arguments.compile,
        )
    if arguments.json:
        print(json.dumps(diagnosis.to_dict(), indent=1, allow_nan=False))
    else:
        print_diagnosis(diagnosis, Console())
    return 1 if diagnosis.problems else 0


def diagnose(
    device_name: str = "auto",
    backend: str | None = None,
    *,
    profile: bool = False,
    compiler: str | None = None,
) -> Diagnosis:
    """Looks at everything.

    Args:
        device_name: where the backends run: "auto", "cpu", "cuda" or "cuda:N".
        backend: one that must be able to run; None asks the settings alone.
        profile: run every branch and see which kernels those are; needs a CUDA device.
        compiler: compile every backend, or ``backend`` alone, with this compiler of torch's; None
            compiles nothing for show.

    Raises:
        ConfigError: there is no such device here.
        UsageError: nothing can be profiled on that device.
    """
    variables = read_variables()
    machine = look_at_machine()
    device = choose_device("cpu" if device_name == "auto" and not machine.gpus else device_name)
    if profile:
        check_profile_device(device)
    providers = survey(device)
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
        profiles, faults = _profile(choices, typical) if profile and not mistake else ([], [])
        problems += faults
        report = None
        if compiler is not None:
            report, faults = look_at_compiling(
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
        choices=() if mistake is not None else tuple(choices),
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
    return frozenset({"fa2-dense", "fa2-varlen"} if settings.use_fa2 else ())


def _way_out(trial: Trial, backend: str | None, settings: Settings) -> str | None:
    """What would run if nobody asked for what cannot."""
    if backend is not None:
        asked, instead = f"--backend {backend}", None
    else:
        flags = {"NSA_BACKEND": settings.backend != "auto", "NSA_USE_FA2": settings.use_fa2}
        asked, instead = " and ".join(flag for flag, is_set in flags.items() if is_set), "auto"
    try:
        return f"Without {asked}, {resolved(trial, instead).backend} would run."
    except BackendUnavailable:
        return None


def _profile(choices: list[Choice], trials: list[Trial]) -> tuple[list[BranchProfile], list[str]]:
    """What ran, in the dtype that models are trained in, and what is wrong with it."""
    profiles, problems = [], []
    for choice, trial in zip(choices, trials, strict=True):
        if trial.dtype == trials[0].dtype and choice.backend is not None:
            found, faults = profile_choice(choice, trial)
            profiles += found
            problems += faults
    return profiles, problems


def _backend_row(name: str, trials: list[Trial], requested: bool) -> BackendRow:
    refused = {str(trial): unavailable(name, trial.problem) for trial in trials}
    refusals = {trial: reason for trial, reason in refused.items() if reason is not None}
    if len(set(refused.values())) == 1:  # the same answer to everything
        detail = next(iter(refused.values())) or ""
    else:
        detail = "; ".join(f"{trial}: {reason}" for trial, reason in refusals.items())
    return BackendRow(
        name=name,
        summary=TABLE[name].summary,
        requested=requested,
        available=len(refusals) < len(trials),
        detail=detail,
    )


def _parity(name: str, trials: list[Trial]) -> tuple[list[ParityResult], list[str]]:
    """Every comparison of one backend with the oracle, and what is wrong."""
    results, problems = [], []
    for trial in trials:
        if unavailable(name, trial.problem) is not None:
            continue
        inputs = trial.inputs()
        try:
            rows = [(row.name, row.error, row.bound) for row in attention_parity(name, inputs)]
            faults = selection_faults(name, inputs)
        except failures() as failure:
            problems.append(f"{name} failed, {trial}: {one_line(failure)}")
            continue
        for tensor, error, bound in [*rows, ("selection", float(len(faults)), 0.0)]:
            result = ParityResult(
                backend=name,
                device=str(trial.device),
                dtype=short(trial.dtype),
                packed=trial.packed,
                tensor=tensor,
                error=error,
                bound=bound,
            )
            results.append(result)
            if tensor != "selection" and not result.ok:
                problems.append(f"{name}, {trial}: {tensor} is {error:.2e} off, above {bound:.2e}")
        problems += [f"{name}, {trial}: selection: {fault}" for fault in faults]
    return results, problems


if __name__ == "__main__":
    sys.exit(main())
