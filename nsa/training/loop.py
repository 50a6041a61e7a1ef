"""The training loop: steps, metrics, validations, checkpoints, and stopping in between."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from nsa.errors import NSAError
from nsa.training.checkpoint import CheckpointStore
from nsa.training.interrupt import StopRequest
from nsa.training.metrics import MetricsFile
from nsa.training.trainer import StepResult, Trainer


class Display(Protocol):
    """Where people look while a model trains."""

    def line(self, text: str) -> None:
        """Print one line."""

    def advance(self, step: int) -> None:
        """Note that a step is done."""

    def report(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Show the loss (nats per byte) and the speed."""


class Diverged(NSAError):
    """The loss or the gradient is no longer finite; nothing was saved after that."""


def fit(
    trainer: Trainer,
    *,
    store: CheckpointStore,
    metrics_path: Path,
    display: Display,
    started: Callable[[], None],
    validated: Callable[[], None] = lambda: None,
) -> float | None:
    """Trains up to the last step, or until a signal asks to stop (it saves then).

    Args:
        trainer: at the step to go on from.
        store: where checkpoints go.
        metrics_path: where metrics go; lines past the trainer's step are dropped first.
        display: where people look.
        started: called once, after the first step (of a finished run, the validation): what runs
            is known by then.
        validated: called after each validation.

    Returns:
        The last validation loss (nats per byte), or None when it was stopped.

    Raises:
        Diverged: a number was not finite.
        CheckpointError: a checkpoint could not be written.
    """
    train = trainer.config.train
    validation_loss = math.nan
    if trainer.step >= train.steps:
        validation_loss = trainer.validate()
        started()
        return validation_loss
    with StopRequest() as stop, MetricsFile(metrics_path, step=trainer.step) as metrics:
        clock = _Clock(trainer)
        first = trainer.step
        while trainer.step < train.steps:
            result = trainer.train_step()
            if trainer.step == first + 1:
                started()
            step, last = trainer.step, trainer.step == train.steps
            display.advance(step)
            if step % train.log_every == 0 or last:
                loss, grad_norm = _finite(result, step, store)
                speed = clock.tokens_per_second()
                metrics.write(
                    step=step,
                    loss=loss,
                    grad_norm=grad_norm,
                    lr=train.learning_rate(step - 1),
                    tokens=step * trainer.tokens_per_step,
                    tokens_per_second=round(speed, 1),
                )
                display.report(step, loss=loss, tokens_per_second=speed)
            if step == first + 1:  # it compiled, and warmed caches up: no measure of the others
                clock.restart()
            if step % train.eval_every == 0 or last:
                validation_loss = trainer.validate()
                metrics.write(step=step, validation_loss=validation_loss)
                display.line(f"step {step}: validation loss {validation_loss:.4f} nats per byte")
                validated()
                clock.restart()
            if step % train.save_every == 0 or last or stop.requested:
                _finite(result, step, store)
                metrics.sync()  # metrics on the disk are never behind the checkpoint
                store.save(step, trainer.tensors(), trainer.state())
                clock.restart()
                if stop.requested and not last:
                    return None
    return validation_loss


class _Clock:
    """Speed since the last reading; validations and saves do not count."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.restart()

    def restart(self) -> None:
        self._step, self._time = self._trainer.step, time.perf_counter()

    def tokens_per_second(self) -> float:
        steps = self._trainer.step - self._step
        elapsed = time.perf_counter() - self._time
        self.restart()
        return steps * self._trainer.tokens_per_step / max(elapsed, 1e-9)


def _finite(result: StepResult, step: int, store: CheckpointStore) -> tuple[float, float]:
    loss, grad_norm = float(result.loss), float(result.grad_norm)
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            latest = store.latest()
            raise Diverged(
                f"{name} at step {step}: expected a finite number, got {value}; lower --lr or "
                f"raise --warmup (last checkpoint: {latest.name if latest else 'none'})"
            )
    return loss, grad_norm
