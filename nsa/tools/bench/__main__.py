"""Times NSA beside dense attention, each kernel after a check: ``python -m nsa.tools.bench``.

Every backend that can run, branch by branch and as a whole, on one machine in one run, with dense
causal attention beside it. What does not agree with the oracle on a small problem is not timed.

Exit code 0: everything was measured, or said why not. 1: a parity check failed, a kernel failed, or
a backend that was asked for cannot run. 2: the command line is wrong. 130: interrupted; what was
measured until then is printed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from nsa.backends import unavailable
from nsa.settings import Settings, current_settings, use_settings
from nsa.tools.bench.advice import advice
from nsa.tools.bench.facts import facts, heading, print_facts
from nsa.tools.bench.flags import make_plan
from nsa.tools.bench.plan import Plan
from nsa.tools.bench.plot import draw, require_matplotlib
from nsa.tools.bench.rows import Journal, Row, groups
from nsa.tools.bench.run import Runner
from nsa.tools.bench.table import print_rows, title
from nsa.tools.bench.timing import Ceilings, make_clock, measure_ceilings
from nsa.tools.common.cli import fail, run

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
    with use_settings(current_settings(), **changes) as settings, _on(plan.device):
        if plan.plot is not None:
            require_matplotlib()
            _check_writable(plan.plot)
        why_not = _cannot_find(plan, settings)
        if why_not is not None:
            fail(why_not)
            return 1
        with _opened(plan.jsonl) as file:
            return _bench(plan, settings, Journal(file), argv)


def _bench(plan: Plan, settings: Settings, journal: Journal, argv: Sequence[str] | None) -> int:
    clock = make_clock(plan.device)
    ceilings = measure_ceilings(plan.device, plan.dtypes, clock)
    known = facts(plan, settings, ceilings, argv)
    journal.write(known)
    runner = Runner(plan, settings, clock)
    console = _console()
    print_facts(known, ceilings, runner.skipped, console)
    progress = _Progress(runner.steps(), journal, console)
    try:
        with progress:
            runner.run(progress)
    finally:  # Ctrl-C keeps what was measured
        rows = progress.rows
        _print_advice(rows, console)
        _print_faults(runner.faults, console)
        if plan.plot is not None:
            _draw(rows, ceilings, known, plan.plot, console)
    return 1 if runner.faults else 0


def _cannot_find(plan: Plan, settings: Settings) -> str | None:
    """Why ``--find-fa2-min-len`` has nothing to compare, if so."""
    for shape in plan.shapes() if plan.find_min_len else ():
        for name in plan.backends:
            why_not = unavailable(name, shape.problem, settings)
            if why_not is not None:
                return f"--find-fa2-min-len: {name} cannot run here: {why_not}"
    return None


class _Progress:
    """Keeps the rows, writes them to the journal, and prints each table when it is complete.

    On a terminal it draws a bar on stderr, too.
    """

    def __init__(self, steps: int, journal: Journal, console: Console) -> None:
        self._journal, self._console = journal, console
        self.rows: list[Row] = []
        self._printed = 0
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("", total=steps)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        self._print_table()

    def doing(self, text: str) -> None:
        """See :class:`nsa.tools.bench.run.Listener`."""
        self._bar.update(self._task, description=text)

    def row(self, row: Row) -> None:
        """See :class:`nsa.tools.bench.run.Listener`."""
        if self.rows and len(groups([self.rows[-1], row])) > 1:
            self._bar.stop()  # it would be in the way of the table
            self._print_table()
            self._bar.start()
        self.rows.append(row)
        self._journal.write(row.to_dict())

    def advance(self) -> None:
        """See :class:`nsa.tools.bench.run.Listener`."""
        self._bar.advance(self._task)

    def _print_table(self) -> None:
        """The rows since the last table."""
        print_rows(self.rows[self._printed :], self._console)
        self._printed = len(self.rows)


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Makes a CUDA device the current one, on whose stream kernels run and events are recorded."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


@contextlib.contextmanager
def _opened(path: Path | None) -> Iterator[TextIO | None]:
    """The file of the JSON lines, empty; None without a path."""
    if path is None:
        yield None
        return
    with open(path, "w", encoding="utf-8") as file:
        yield file


def _check_writable(path: Path) -> None:
    """Finds out before anything is measured; leaves no empty file behind."""
    existed = path.exists()
    with open(path, "ab"):
        pass
    if not existed:
        os.unlink(path)


def _console() -> Console:
    """Stdout; as wide as the tables where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=_WIDTH)


def _print_advice(rows: list[Row], console: Console) -> None:
    for group in groups(rows):
        lines = advice(group)
        if lines:
            console.print(Text(f"FA-2 or sdpa, {title(group[0])}:", style="bold"))
            for line in lines:
                console.print(Text(line), soft_wrap=True)  # to be copied as they are
            console.print()


def _print_faults(faults: list[str], console: Console) -> None:
    if faults:
        console.print(Text("Problems", style="bold red"))
        for fault in dict.fromkeys(faults):
            console.print(Text(f"  - {fault}"))


def _draw(
    rows: list[Row], ceilings: Ceilings, known: dict[str, Any], path: Path, console: Console
) -> None:
    drawn = draw(rows, ceilings, heading(known), path)
    text = f"plot written to {path}" if drawn else f"nothing of the whole to draw in {path}"
    console.print(Text(text), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
