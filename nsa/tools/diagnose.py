"""Says what this machine can run, and proves it: ``python -m nsa.tools.diagnose``.

Exit code 0: everything asked for works. 1: a requested backend cannot run, a backend is not within
its accuracy bounds, or the ``NSA_…`` environment is wrong. 2: the command line is wrong.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console

from nsa.backends import TABLE, resolve, unavailable
from nsa.backends.contract import Problem
from nsa.config import NSAConfig, nearest
from nsa.errors import BackendUnavailable
from nsa.settings import (
    BACKENDS,
    Settings,
    current_settings,
    environment_error,
    explain_settings,
    use_settings,
)
from nsa.testing.inputs import Inputs, make_inputs, random_blocks
from nsa.testing.parity import attention_parity, selection_faults
from nsa.tools._advice import advice
from nsa.tools._cli import Parser, UsageError, choose_device, run
from nsa.tools._diagnosis import BackendRow, Diagnosis, ParityResult
from nsa.tools._flash_attn import look_at_flash_attn, look_at_torch
from nsa.tools._machine import look_at_machine
from nsa.tools._tables import print_diagnosis

_CONFIG = NSAConfig.preset("tiny")
_LENGTHS = (131, 0, 70)
"""Tokens of the packed sequences; their sum is the regular batch's length."""

_EXAMPLES = """\
examples:
  python -m nsa.tools.diagnose
  NSA_BACKEND=fa2-dense python -m nsa.tools.diagnose
  python -m nsa.tools.diagnose --backend sdpa --json
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One small problem that every backend is asked to run."""

    device: torch.device
    dtype: torch.dtype
    packed: bool

    def __str__(self) -> str:
        kind = "packed" if self.packed else "regular"
        return f"{kind} {_short(self.dtype)} on {self.device.type}"

    @property
    def problem(self) -> Problem:
        return Problem(
            config=_CONFIG,
            device=self.device,
            dtype=self.dtype,
            length=max(_LENGTHS) if self.packed else sum(_LENGTHS),
            packed=self.packed,
            needs_grad=True,
        )

    def inputs(self) -> Inputs:
        """Random inputs of the problem, with a list of blocks."""
        inputs = make_inputs(
            _CONFIG,
            length=None if self.packed else sum(_LENGTHS),
            lengths=_LENGTHS if self.packed else None,
            dtype=self.dtype,
            device=self.device,
        )
        return replace(inputs, block_idx=random_blocks(inputs, _CONFIG.num_selected))


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
    add("--backend", metavar="NAME", help=f"fail unless this one runs: {', '.join(BACKENDS)}")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--json", action="store_true", help="print JSON for programs instead of tables")
    arguments = parser.parse_strictly(argv)
    if arguments.backend is not None and arguments.backend not in BACKENDS:
        raise UsageError(
            f"--backend: expected one of the known names, got {arguments.backend!r}; "
            f"{nearest(arguments.backend, BACKENDS)}"
        )
    # A library that prints while it is probed must not spoil the JSON.
    with contextlib.redirect_stdout(sys.stderr):
        diagnosis = diagnose(arguments.device, arguments.backend)
    if arguments.json:
        print(json.dumps(diagnosis.to_dict(), indent=1, allow_nan=False))
    else:
        print_diagnosis(diagnosis, Console())
    return 1 if diagnosis.problems else 0


def diagnose(device_name: str = "auto", backend: str | None = None) -> Diagnosis:
    """Looks at everything.

    Args:
        device_name: where the backends run: "auto", "cpu", "cuda" or "cuda:N".
        backend: one that must be able to run; None asks the settings alone.

    Raises:
        ConfigError: there is no such device here.
    """
    machine = look_at_machine()
    device = choose_device("cpu" if device_name == "auto" and not machine.gpus else device_name)
    call_on = device if device.type == "cuda" else None
    flash_attn = look_at_flash_attn(call_on)
    mistake = environment_error()
    problems = [] if mistake is None else [mistake]
    settings_rows = tuple(explain_settings())
    trials = [
        Trial(device=device, dtype=dtype, packed=packed)
        for dtype in _dtypes(device)
        for packed in (False, True)
    ]
    with use_settings(Settings() if mistake is not None else current_settings()) as settings:
        choice, refusal = _choice(trials, backend)
        problems += refusal
        requested = _requested(settings, backend)
        rows = tuple(_backend_row(name, trials, name in requested) for name in TABLE)
        parity: list[ParityResult] = []
        for row in rows:
            if row.available:
                results, faults = _parity(row.name, trials)
                parity += results
                problems += faults
    return Diagnosis(
        machine=machine,
        providers=(flash_attn, look_at_torch(call_on)),
        settings=settings_rows,
        settings_error=mistake,
        backends=rows,
        choice=choice if mistake is None else None,
        parity=tuple(parity),
        problems=tuple(problems),
        advice=tuple(advice(machine, flash_attn, mistake)),
    )


def _dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    if device.type == "cpu":
        return (torch.float32,)
    half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return (half, torch.float32)


def _requested(settings: Settings, backend: str | None) -> frozenset[str]:
    """The backends that must run: of the flag, else of the environment."""
    if backend is not None:
        return frozenset({backend})
    if settings.backend != "auto":
        return frozenset({settings.backend})
    return frozenset({"fa2-dense", "fa2-varlen"} if settings.use_fa2 else ())


def _choice(trials: list[Trial], backend: str | None) -> tuple[str | None, list[str]]:
    """What a plain call runs here and why, or else the refusal as a problem.

    A backend may refuse some trials, such as packed ones; a request fails when all are refused.
    """
    refusals = []
    for trial in trials:
        problem = trial.problem
        try:
            resolution = resolve(
                problem.config,
                device=problem.device,
                dtype=problem.dtype,
                length=problem.length,
                packed=problem.packed,
                needs_grad=problem.needs_grad,
                backend=backend,
            )
        except BackendUnavailable as error:
            refusals.append(str(error))
        else:
            return f"{resolution} for {trial}", []
    return None, refusals[:1]


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
        except RuntimeError as failure:  # what a kernel raises that cannot run after all
            message = " ".join(str(failure).split())
            problems.append(f"{name} failed, {trial}: {type(failure).__name__}: {message}")
            continue
        for tensor, error, bound in [*rows, ("selection", float(len(faults)), 0.0)]:
            result = ParityResult(
                backend=name,
                device=str(trial.device),
                dtype=_short(trial.dtype),
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


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
