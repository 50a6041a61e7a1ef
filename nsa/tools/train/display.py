"""How a run looks: a progress bar on a terminal, plain lines anywhere else, a table at the end."""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from nsa.tools.common.cli import printable
from nsa.tools.common.progress import Bar
from nsa.tools.common.streams import OutputLost
from nsa.training.data import Baselines
from nsa.training.run import Run


class Display:
    """Shows the numbers of a training run; ``bar`` must be entered.

    Args:
        step: optimizer steps done before.
        steps: the last step.
        drawn: whether to draw a bar; None asks whether stdout is a terminal.
    """

    def __init__(self, *, step: int, steps: int, drawn: bool | None = None) -> None:
        self._steps = steps
        self.lost: OutputLost | None = None
        """Why stdout takes no more, if so; nothing is raised."""
        self.bar = Bar(
            steps,
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            completed=step,
            stdout=True,
            drawn=drawn,
            loss="-",
            speed="-",
        )

    def line(self, text: str) -> None:
        """Print one line."""
        try:
            self.bar.line(text)
        except OutputLost as lost:
            self.lost = lost

    def advance(self, step: int) -> None:
        """Note that a step is done."""
        self.bar.show(completed=step)

    def report(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Show the loss (nats per byte) and the speed."""
        numbers = {"loss": f"{loss:.4f}", "speed": f"{tokens_per_second:,.0f}"}
        self.bar.show(**numbers)
        if not self.bar.drawn:
            self.line(
                f"step {step}/{self._steps}  loss {numbers['loss']}  {numbers['speed']} tokens/s  "
                f"{_clock(self.bar.time_left)} left"
            )


def _clock(seconds: float | None) -> str:
    """``1:02:03`` or ``2:03``; ``-:--`` for None."""
    if seconds is None:
        return "-:--"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def print_header(run: Run) -> None:
    """Print the resolved configuration, every value of it."""

    def line(values: dict[str, Any]) -> str:
        return printable(", ".join(f"{name} {value}" for name, value in values.items()))

    trainer, corpus, parts = run.trainer, run.corpus, run.config.to_dict()
    nsa = parts["model"].pop("nsa")
    cut = f"; of {corpus.cut!r} only the end" if corpus.cut else ""
    threads = f", {torch.get_num_threads()} threads" if trainer.device.type == "cpu" else ""
    several = trainer.mesh.ranks.size > 1
    sizes = (f"{name} {size}" for name, size in trainer.mesh.sizes.items())
    mesh = f", {trainer.mesh.ranks.size} processes: {', '.join(sizes)}" if several else ""
    resumed = f", resuming from step {trainer.step}" if trainer.step else ""
    print(f"run          {run.folder}{resumed}")
    print(
        f"data         {printable(corpus.source)}: {len(corpus.train):,} bytes to train on "
        f"({corpus.train_files} files), {len(corpus.validation):,} to validate "
        f"({corpus.validation_files}{cut}), {corpus.skipped} files skipped"
    )
    print(f"model        {line(parts['model'])}, {trainer.model.num_parameters():,} parameters")
    print(f"attention    {line(nsa)}")
    print(f"training     {line(parts['train'])}")
    print(f"device       {trainer.device}{threads}{mesh}", flush=True)


def print_result(validation_loss: float, counted: Baselines) -> None:
    """Print the model beside what counting bytes achieves, as a table, and the verdict."""
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
