"""The progress bar of every tool: one bar on a terminal, nothing anywhere else."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

_TASK = TaskID(0)
ESTIMATE_S = 3600.0
"""Seconds of steps that an estimate of the time left averages over: rich's default of 30 would jump
at every validation or save."""


class Bar(Progress):
    """A progress bar of one task; a context manager.

    Args:
        total: steps of the whole.
        columns: by default ``M/N``, the bar, the time elapsed and the description. The time left is
            worth a column only where steps take equally long.
        completed: steps done before.
        stdout: whether the bar is on stdout and stays when it ends; else it is on stderr and goes.
        drawn: whether to draw it; None asks whether the stream is a terminal.
        fields: first values of the fields that columns show.
    """

    def __init__(
        self,
        total: int,
        *columns: ProgressColumn,
        completed: int = 0,
        stdout: bool = False,
        drawn: bool | None = None,
        **fields: Any,
    ) -> None:
        columns = columns or (
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
        )
        console = Console(stderr=not stdout, force_terminal=drawn)
        self.drawn = console.file.isatty() if drawn is None else drawn
        """Whether anything is drawn."""
        super().__init__(
            *columns,
            console=console,
            transient=not stdout,
            disable=not self.drawn,
            speed_estimate_period=ESTIMATE_S,
        )
        self.add_task("", total=total, completed=completed, **fields)

    def step(self) -> None:
        """Count one more step as done."""
        self.advance(_TASK)

    def show(self, **values: Any) -> None:
        """Set ``completed``, ``description``, or a field that a column shows."""
        self.update(_TASK, **values)

    def line(self, text: str) -> None:
        """Print one line above the bar, on its stream."""
        if self.drawn:
            self.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.console.file, flush=True)

    @property
    def time_left(self) -> float | None:
        """Seconds until the last step, from the speed of those after the first; None until a second
        step is done. Known whether or not the bar is drawn."""
        return self.tasks[0].time_remaining
