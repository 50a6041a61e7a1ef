"""A run: a folder (``config.json``, ``metrics.jsonl``, ``checkpoints/``) and the training in it."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Protocol

import torch

from nsa.errors import CheckpointError, NSAError
from nsa.training.attention_log import AttentionLog
from nsa.training.checkpoint import CheckpointStore, load_checkpoint
from nsa.training.compile import Compilation
from nsa.training.config import RunConfig
from nsa.training.data import load_corpus, require_length
from nsa.training.files import JsonlWriter, replace_atomically, to_json
from nsa.training.interrupt import StopRequest
from nsa.training.trainer import GROUPS, StepResult, Trainer


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


class Run:
    """Everything of one run, made and checked; nothing is written before :meth:`train`.

    Args:
        folder: of the run; one process at a time may write to it.
        config: model and training; of a resumed run, only what changes no number may differ from
            what is stored.
        resume: whether to continue the run in ``folder``; else there must be none.
        compile_cache: the file of ``--compile-cache``, or None.

    Raises:
        CheckpointError: a run in the way, none to resume, a damaged one, or one of another
            configuration or other data.
        ConfigError, DataError, UsageError: what this machine or the data refuses.
    """

    def __init__(
        self, folder: Path, config: RunConfig, *, resume: bool, compile_cache: str | None = None
    ) -> None:
        self.folder = folder
        self.config = config
        self.notes: list[str] = []
        """What may make a resumed run differ from one never interrupted."""
        self._store = CheckpointStore(folder / "checkpoints", keep=config.train.keep)
        checkpoint = None
        if resume:
            self._refuse_differences(stored_config(folder))
            latest = self._store.latest()
            if latest is not None:
                checkpoint = load_checkpoint(latest, GROUPS)
                saved = RunConfig.from_dict(checkpoint.state["config"])
                self._refuse_differences(saved)
        else:
            for name in ("config.json", "checkpoints"):
                if (folder / name).exists():
                    raise CheckpointError(
                        f"{folder} already holds a run: expected --resume to continue it, or "
                        "another --out"
                    )
        device = torch.device(config.train.device)
        self._compilation = Compilation(config.train.compile, device, compile_cache)
        self.corpus = load_corpus(config.train.data)
        require_length(self.corpus, config.train.seq_len)
        self.trainer = Trainer(config, self.corpus)
        if checkpoint is not None:
            self.trainer.restore(checkpoint)
            before, now = checkpoint.state["threads"], torch.get_num_threads()
            if device.type == "cpu" and before != now:
                self.notes.append(f"saved with {before} threads, resuming with {now}")
            rounding = saved.differences(config, rounding=True)
            self.notes += [f"resuming with {text}" for text in rounding]

    def train(self, display: Display) -> float | None:
        """Train up to the last step, or until a signal asks to stop (then save first).

        Returns:
            The last validation loss (nats per byte), or None when it was stopped.

        Raises:
            Diverged: a number was not finite.
            CheckpointError: a checkpoint could not be written.
            DataError: metrics could not be written.
            NSAError: as :meth:`nsa.training.compile.Compilation.session`.
        """
        with self._compilation.session(display.line):
            if self.trainer.step < self.config.train.steps:
                return self._loop(display)
            validation_loss = self.trainer.validate()
            self._note_start(display, "validation")
            return validation_loss

    def _loop(self, display: Display) -> float | None:
        trainer, train = self.trainer, self.config.train
        first, attention = trainer.step + 1, AttentionLog(trainer)
        # Lines of metrics past the checkpoint are dropped: those steps are run again.
        metrics_file = JsonlWriter(self.folder / "metrics.jsonl", step=trainer.step)
        with StopRequest() as stop, metrics_file as metrics:
            clock = _Clock(trainer)
            while True:
                result = trainer.train_step()
                step, last = trainer.step, trainer.step == train.steps
                if step == first:
                    self._note_start(display, "step")
                display.advance(step)
                if step % train.log_every == 0 or last:
                    loss, grad_norm = self._finite(result)
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
                if step == first:  # it compiled, and warmed caches up: no measure of the others
                    clock.restart()
                if train.log_attention_every and step % train.log_attention_every == 0:
                    scalars, warnings = attention.metrics()
                    metrics.write(step=step, **scalars)
                    for text in warnings:
                        display.line(f"step {step}: warning: {text}")
                    clock.restart()
                if step % train.eval_every == 0 or last:
                    validation_loss = trainer.validate()
                    metrics.write(step=step, validation_loss=validation_loss)
                    text = f"validation loss {validation_loss:.4f} nats per byte"
                    display.line(f"step {step}: {text}")
                    self._compilation.keep(display.line)  # the first validation compiles, too
                    clock.restart()
                if step % train.save_every == 0 or last or stop.requested:
                    self._finite(result)
                    metrics.sync()  # metrics on the disk are never behind the checkpoint
                    self._store.save(step, trainer.tensors(), trainer.state())
                    clock.restart()
                    if last:
                        return validation_loss
                    if stop.requested:
                        return None

    def _note_start(self, display: Display, first: str) -> None:
        """Say what runs, which is known after the first ``first``, and store the configuration."""
        self._compilation.ready(display.line, first)
        display.line(f"backend      {self._backend()}")
        replace_atomically(self.folder / "config.json", to_json(self.config.to_dict()))

    def _backend(self) -> str:
        resolution = self.trainer.model.resolution
        if resolution is None:
            return "dense: torch.nn.functional.scaled_dot_product_attention"
        branches = ", ".join(f"{step} {name}" for step, name in resolution.per_branch.items())
        return f"{resolution.backend} ({resolution.reason}); {branches}"

    def _finite(self, result: StepResult) -> tuple[float, float]:
        """Read loss and gradient norm, and refuse what is not finite."""
        loss, grad_norm = float(result.loss), float(result.grad_norm)
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                latest = self._store.latest()
                raise Diverged(
                    f"{name} at step {self.trainer.step}: expected a finite number, got {value}; "
                    "lower --lr or raise --warmup (last checkpoint: "
                    f"{latest.name if latest else 'none'})"
                )
        return loss, grad_norm

    def _refuse_differences(self, stored: RunConfig) -> None:
        differences = stored.differences(self.config)
        if differences:
            raise CheckpointError(
                f"{self.folder} holds a run of another configuration: {', '.join(differences)} "
                "(stored -> requested); drop those flags, or choose another --out"
            )


def stored_config(folder: Path) -> RunConfig:
    """Read the configuration of the run in a folder.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / "config.json"
    try:
        return RunConfig.from_dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise CheckpointError(
            f"--resume: expected a run in {folder}, got no config.json; start one without --resume"
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:  # JSON, or what it holds
        raise CheckpointError(f"{path} is damaged: {error}") from error


class _Clock:
    """Measures speed since its last reading; validations and saves do not count."""

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
