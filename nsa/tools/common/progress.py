"""The progress bar of every tool: one bar on a terminal, nothing anywhere else."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

ESTIMATE_S = 3600.0
"""Seconds of steps that an estimate of the time left averages over: rich's default of 30 would jump
at every validation or save."""


class Bar:
    """A progress bar; a context manager. Make it with :func:`progress`."""

    def __init__(self, rich: Progress, total: int, completed: int, fields: dict[str, Any]) -> None:
        self._rich = rich
        self._id = rich.add_task("", total=total, completed=completed, **fields)
        self.drawn = not rich.disable
        """Whether anything is drawn: its stream is a terminal."""

    def __enter__(self) -> Bar:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Draw the bar (again)."""
        self._rich.start()

    def stop(self) -> None:
        """Take the bar away, to print something else; :meth:`start` brings it back."""
        self._rich.stop()

    def advance(self) -> None:
        """Count one more step as done."""
        self._rich.advance(self._id)

    def update(self, **values: Any) -> None:
        """Set ``completed``, ``description``, or a field that a column shows."""
        self._rich.update(self._id, **values)

    def line(self, text: str) -> None:
        """Print one line above the bar, on its stream."""
        if self.drawn:
            self._rich.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._rich.console.file, flush=True)

    @property
    def time_left(self) -> float | None:
        """Seconds until the last step, from the speed of those after the first; None until a second
        step is done. Known whether or not the bar is drawn."""
        return self._rich.tasks[0].time_remaining


def progress(
    total: int,
    *columns: ProgressColumn,
    completed: int = 0,
    stdout: bool = False,
    drawn: bool | None = None,
    **fields: Any,
) -> Bar:
    """Make a progress bar.

    Args:
        total: steps of the whole.
        columns: by default ``M/N``, the bar, the time elapsed and the description. The time left is
            worth a column only where steps take equally long.
        completed: steps done before.
        stdout: whether the bar is on stdout and stays when it ends; else it is on stderr and goes.
        drawn: whether to draw it; None asks whether the stream is a terminal.
        fields: first values of the fields that columns show.
    """
    columns = columns or (
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    console = Console(stderr=not stdout, force_terminal=drawn)
    terminal = console.file.isatty()
    bar = Progress(
        *columns,
        console=console,
        transient=not stdout,
        disable=not (terminal if drawn is None else drawn),
        speed_estimate_period=ESTIMATE_S,
    )
    return Bar(bar, total, completed, fields)
