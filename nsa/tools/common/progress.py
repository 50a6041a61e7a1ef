"""How a run looks while it trains: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from nsa.training.baselines import Baselines


class Display:
    """Prints lines and, on a terminal, keeps a progress bar below them; a context manager.

    Args:
        step: where training goes on from.
        steps: where it ends.
        live: whether to draw the bar; None asks whether stdout is a terminal.
    """

    def __init__(self, *, step: int, steps: int, live: bool | None = None) -> None:
        self._steps = steps
        self._first = step
        self._started = time.perf_counter()
        self._progress: Progress | None = None
        if sys.stdout.isatty() if live is None else live:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[speed]} tokens/s"),
                TextColumn("{task.fields[left]} left"),
            )
            self._task: TaskID = self._progress.add_task(
                "train", total=steps, completed=step, loss="-", speed="-", left="-"
            )

    def __enter__(self) -> Display:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def line(self, text: str) -> None:
        """Prints one line, above the bar."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def advance(self, step: int) -> None:
        """A step is done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def restart(self, step: int) -> None:
        """Estimates the time left from here on."""
        self._first, self._started = step, time.perf_counter()

    def report(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """New numbers: the loss in nats per byte and the speed."""
        left = self._time_left(step)
        if self._progress is None:
            self.line(
                f"step {step}/{self._steps}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  "
                f"{left} left"
            )
        else:
            self._progress.update(
                self._task,
                completed=step,
                loss=f"{loss:.4f}",
                speed=f"{tokens_per_second:,.0f}",
                left=left,
            )

    def _time_left(self, step: int) -> str:
        """Validations and saves so far are in the average, so they are in the estimate."""
        elapsed = time.perf_counter() - self._started
        seconds = round(elapsed / max(1, step - self._first) * (self._steps - step))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def print_result(validation_loss: float, counted: Baselines) -> None:
    """The model beside what counting bytes achieves, as a table, and the verdict."""
    table = Table(title="validation loss", title_justify="left")
    table.add_column("")
    table.add_column("nats per byte", justify="right")
    table.add_column("bits per byte", justify="right")
    rows = (("unigram", counted.unigram), ("bigram", counted.bigram), ("model", validation_loss))
    for name, nats in rows:
        table.add_row(name, f"{nats:.4f}", f"{nats / math.log(2):.4f}")
    Console().print(table)
    gap = counted.bigram - validation_loss
    side = "below" if gap > 0 else "NOT below"
    print(f"The model is {side} the bigram: {abs(gap):.4f} nats per byte apart.")
