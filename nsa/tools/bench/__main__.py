"""Times NSA beside dense attention, each kernel after a check: ``python -m nsa.tools.bench``.

Every backend that can run, branch by branch and as a whole, on one machine in one run, with dense
causal attention beside it. What does not agree with the oracle on a small problem is not timed.

Exit code 0: everything was measured, or said why not. 1: a parity check failed, a kernel failed, or
a backend that was requested cannot run. 2: the command line is wrong. 130: interrupted; what was
measured until then is printed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from nsa.backends import unavailable
from nsa.settings import Settings, current_settings, use_settings
from nsa.tools.bench.advice import advice
from nsa.tools.bench.decode import DecodeRow, as_dict, decode_rows, print_decode
from nsa.tools.bench.flags import Plan, make_plan
from nsa.tools.bench.plot import draw, require_matplotlib
from nsa.tools.bench.report import header, heading, print_header, print_rows
from nsa.tools.bench.rows import Row, groups, write_line
from nsa.tools.bench.run import Runner
from nsa.tools.bench.timing import Clock, make_clock, measure_ceilings
from nsa.tools.common.cli import fail, run
from nsa.tools.common.progress import Bar
from nsa.tools.common.streams import Output

_WIDTH = 100
"""Columns of the tables where stdout is no terminal."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    plan = make_plan(argv)
    changes: dict[str, Any] = {} if plan.provider is None else {"fa2_provider": plan.provider}
    if plan.find_min_len:  # what is looked for must not decide
        changes |= {"use_fa2_win": None, "use_fa2_cmp": None}
        changes |= {"fa2_min_len_win": 1, "fa2_min_len_cmp": 1}
    with contextlib.ExitStack() as stack:
        settings = stack.enter_context(use_settings(current_settings(), **changes))
        if plan.device.type == "cuda":  # kernels run and events are recorded on the current device
            stack.enter_context(torch.cuda.device(plan.device))
        if plan.plot is not None:
            require_matplotlib()
            _check_writable(plan.plot)
        why_not = _cannot_find(plan, settings)
        if why_not is not None:
            fail(why_not)
            return 1
        file = None
        if plan.jsonl is not None:
            opened = stack.enter_context(open(plan.jsonl, "w", encoding="utf-8"))
            file = Output(opened, str(plan.jsonl))
        return _bench(plan, settings, file, argv)


def _tune(plan: Plan, settings: Settings, console: Console) -> int:
    for trial in plan.trials:
        why_not = unavailable("compiled", trial.problem, settings)
        if why_not is not None:
            fail(f"--tune: compiled cannot run this: {why_not}")
            return 1
    from nsa.tools.bench.tune.run import tune  # needs triton

    clock = make_clock(plan.device)
    return tune(plan.trials, clock, console, seconds=plan.seconds, runs=plan.runs)


def _bench(plan: Plan, settings: Settings, file: Output | None, argv: Sequence[str] | None) -> int:
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    if plan.tune:
        return _tune(plan, settings, console)
    clock = make_clock(plan.device)
    dtypes = tuple(dict.fromkeys(trial.dtype for trial in plan.trials))
    ceilings = measure_ceilings(plan.device, dtypes, clock)
    known = header(plan.device, settings, ceilings, argv)
    write_line(file, known)
    if plan.decode is not None:
        print_header(known, {}, console)
        return _decode(plan, plan.decode, settings, clock, file, console)
    runner = Runner(plan, settings, clock)
    print_header(known, runner.skipped, console)
    rows: list[Row] = []
    try:
        _measure(runner, file, rows, console)
    finally:  # Ctrl-C keeps what was measured
        _print_advice(rows, console)
        _print_faults(runner.faults, console)
        if plan.plot is not None:
            drawn = draw(rows, ceilings, heading(known), plan.plot)
            text = "plot written to" if drawn else "nothing of the whole to draw in"
            console.print(Text(f"{text} {plan.plot}"), soft_wrap=True)
    return 1 if runner.faults else 0


def _decode(
    plan: Plan, step: int, settings: Settings, clock: Clock, file: Output | None, console: Console
) -> int:
    rows: list[DecodeRow] = []
    try:
        with Bar(len(plan.trials)) as bar:
            bar.show(description="one step of decode")
            for row in decode_rows(plan.trials, plan.backends, step, settings, clock, plan.runs):
                rows.append(row)
                write_line(file, as_dict(row))
                bar.show(completed=len({(row.heads, row.dtype, row.length) for row in rows}))
    finally:  # Ctrl-C keeps what was measured
        print_decode(rows, console)
    return 1 if any(row.note for row in rows) else 0


def _measure(runner: Runner, file: Output | None, rows: list[Row], console: Console) -> None:
    """Fills ``rows``, writes each, and prints each table when it is complete."""
    printed = 0
    bar = Bar(runner.steps)

    def doing(text: str) -> None:
        bar.show(description=text, completed=runner.done)

    try:
        with bar:
            for row in runner.rows(doing):
                if len(groups([*rows[-1:], row])) > 1:
                    bar.stop()  # it would be in the way of the table
                    print_rows(rows[printed:], console)
                    printed = len(rows)
                    bar.start()
                rows.append(row)
                write_line(file, row.to_dict())
    finally:
        print_rows(rows[printed:], console)


def _cannot_find(plan: Plan, settings: Settings) -> str | None:
    """Why ``--find-fa2-min-len`` has nothing to compare, if so."""
    for trial in plan.trials if plan.find_min_len else ():
        for name in plan.backends:
            why_not = unavailable(name, trial.problem, settings)
            if why_not is not None:
                return f"--find-fa2-min-len: {name} cannot run here: {why_not}"
    return None


def _check_writable(path: Path) -> None:
    """Finds out before anything is measured; leaves no empty file behind."""
    existed = path.exists()
    with open(path, "ab"):
        pass
    if not existed:
        os.unlink(path)


def _print_advice(rows: list[Row], console: Console) -> None:
    for group in groups(rows):
        lines = advice(group)
        if lines:
            console.print(Text(f"FA-2 or sdpa, {group[0].title}:", style="bold"))
            for line in lines:
                console.print(Text(line), soft_wrap=True)  # to be copied as they are
            console.print()


def _print_faults(faults: list[str], console: Console) -> None:
    if faults:
        console.print(Text("Problems", style="bold red"))
        for fault in dict.fromkeys(faults):
            console.print(Text(f"  - {fault}"))


if __name__ == "__main__":
    sys.exit(main())
