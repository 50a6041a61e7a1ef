"""A run: a folder (``config.json``, ``metrics.jsonl``, ``checkpoints/``) and the training in it."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from nsa.distributed.mesh import ALONE, Mesh
from nsa.errors import CheckpointError, NSAError, show
from nsa.training.attention_log import AttentionLog
from nsa.training.checkpoint import LATEST, CheckpointStore, load_checkpoint
from nsa.training.checkpoint_format import Checkpoint
from nsa.training.clock import Clock
from nsa.training.compile import Compilation
from nsa.training.config import RunConfig
from nsa.training.data import load_corpus, require_length
from nsa.training.files import (
    JSON_LIMIT,
    parse_json,
    read_file,
    remove_leftovers,
    replace_atomically,
    sealed,
    to_json,
    unsealed,
)
from nsa.training.interrupt import StopRequest
from nsa.training.lock import NAME as LOCK
from nsa.training.lock import FolderLock
from nsa.training.memory import require_memory_to_train
from nsa.training.metrics import JsonlWriter, NoWriter
from nsa.training.on_mesh import require_mesh
from nsa.training.trainer import GROUPS, StepResult, Trainer, config_of

_CONFIG = "config.json"
_METRICS = "metrics.jsonl"


class Display(Protocol):
    """Where people look while a model trains."""

    @property
    def lost(self) -> Exception | None:
        """Why nobody can look any more, if so: the run saves and stops."""

    def line(self, text: str) -> None:
        """Print one line."""

    def advance(self, step: int) -> None:
        """Note that a step is done."""

    def report(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Show the loss (nats per byte) and the speed."""


class Diverged(NSAError):
    """The loss or the gradient is no longer finite; nothing was saved after that."""


class Run:
    """Everything of one run, made and checked; nothing is written before :meth:`train` (the lock of
    a trainer that was killed is taken away).

    Args:
        folder: of the run; locked while :meth:`train` runs.
        config: model and training; of a resumed run, only what changes no number may differ from
            what is stored.
        resume: whether to continue the run in ``folder``; else there must be none.
        compile_cache: the file of ``--compile-cache``, or None.
        mesh: of several processes, each of which makes a run and trains it at the same time. Rank 0
            alone reads and writes the folder.

    Raises:
        CheckpointError: a run in the way, none to resume, a damaged one, one of another
            configuration or other data, or one that another process trains.
        ConfigError, DataError, UsageError: what this machine, the data or the mesh refuses.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        *,
        resume: bool,
        compile_cache: str | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self._mesh = mesh or Mesh(torch.device(config.train.device))
        self._ranks = self._mesh.ranks
        require_mesh(config, self._mesh.sizes, compile_cache)
        self.notes: list[str] = []
        """What was found that the user should know, a line each."""
        self._store = CheckpointStore(folder / "checkpoints", keep=config.train.keep)
        found = self._look(resume) if self._ranks.leads else None
        device = self._mesh.device
        self._compilation = Compilation(config.train.compile, device, compile_cache)
        self.corpus = load_corpus(config.train.data, config.train.split)
        require_length(self.corpus, config.train.seq_len)
        require_memory_to_train(config, self._mesh.sizes, self._ranks.size_here)
        self.trainer = Trainer(config, self.corpus, self._mesh)
        self._ranks.require_same({"bytes of --data": self.trainer.fingerprint})
        checkpoint = self._share(found)
        if checkpoint is not None:
            self.trainer.restore(checkpoint)
            before, now = checkpoint.value("threads", kind=int), torch.get_num_threads()
            rounding = config_of(checkpoint).differences(config, rounding=True)
            changes = [f"resuming with {text}" for text in rounding]
            if device.type == "cpu" and before != now:
                changes.append(f"saved with {show(before)} threads, resuming with {now}")
            saved, sizes = checkpoint.state.get("mesh", ALONE), self._mesh.sizes
            if saved != sizes:
                changes.append(f"saved on a mesh {show(saved)}, resuming on {sizes}")
            self.notes += [f"note: {text}: results may differ in the last bits" for text in changes]

    def _look(self, resume: bool) -> Checkpoint | None:
        """Read what is in the folder: the checkpoint to resume from, if there is one."""
        self._found = _state_of(self.folder)
        if os.path.lexists(self.folder / LOCK):  # a trainer runs, or was killed: better known now
            with FolderLock(self.folder, self.notes.append):
                pass
        if not resume:
            if os.path.lexists(self.folder / _CONFIG) or self._store.is_used():
                raise CheckpointError(
                    f"{self.folder} already holds a run: expected --resume to continue it, or "
                    "another --out"
                )
            return None
        self._refuse_differences(stored_config(self.folder))
        latest = self._store.latest()
        if latest is None:
            self.notes.append("note: no checkpoint was saved; resuming from step 0")
            return None
        checkpoint = load_checkpoint(latest, GROUPS)
        self._refuse_differences(config_of(checkpoint))
        self._note_missing(latest)
        return checkpoint

    def _share(self, found: Checkpoint | None) -> Checkpoint | None:
        """Tell every process which checkpoint rank 0 found; its tensors stay there."""
        told = self._ranks.share(lambda: found and (str(found.path), found.step, found.state))
        if found is not None or told is None:
            return found
        path, step, state = told
        return Checkpoint(path=Path(path), step=step, state=state, tensors={})

    def _note_missing(self, latest: Path) -> None:
        """Say what was taken in place of files that are gone."""
        if not os.path.lexists(self.folder / _CONFIG):
            self.notes.append(f"note: {_CONFIG} is missing; that of {latest.name} is taken")
        if not os.path.lexists(latest.with_name(LATEST)):
            self.notes.append(f"note: {LATEST} is missing; taking {latest.name}, the newest there")

    def train(self, display: Display) -> float | None:
        """Train up to the last step, or until a signal or a lost display asks to stop (then save
        first).

        Returns:
            The last validation loss (nats per byte), or None when it was stopped.

        Raises:
            Diverged: a number was not finite.
            CheckpointError: a checkpoint could not be written, or another trainer is in the folder.
            DataError: metrics could not be written.
            NSAError: as :meth:`nsa.training.compile.Compilation.session`.
        """
        with self._own(display) as lock, self._compilation.session(display.line):
            if self.trainer.step < self.config.train.steps:
                return self._loop(display, lock)
            if lock is not None:
                self._store.tidy()
            validation_loss = self.trainer.validate()
            self._note_start(display, "validation")
            return validation_loss

    @contextlib.contextmanager
    def _own(self, display: Display) -> Iterator[FolderLock | None]:
        """Make the folder this process's own; None where it is rank 0's."""
        if not self._ranks.leads:
            yield None
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with FolderLock(self.folder, display.line) as lock:
            if _state_of(self.folder) != self._found:
                raise CheckpointError(
                    f"{self.folder}: expected the run that was read at the start, got a changed "
                    "one: another trainer was there; start again"
                )
            remove_leftovers(self.folder, rf"{_CONFIG}|{_METRICS}")
            yield lock

    def _loop(self, display: Display, lock: FolderLock | None) -> float | None:
        trainer, train = self.trainer, self.config.train
        first, attention = trainer.step + 1, AttentionLog(trainer)
        # Lines of metrics past the checkpoint are dropped: those steps are run again.
        metrics_file: JsonlWriter | NoWriter = NoWriter()
        if lock is not None:
            path = self.folder / _METRICS
            metrics_file = JsonlWriter(path, step=trainer.step, say=display.line)
        with StopRequest() as stop, metrics_file as metrics:
            clock = Clock(trainer)
            while True:
                result = trainer.train_step()
                step, last = trainer.step, trainer.step == train.steps
                if step == first:
                    self._note_start(display, "step")
                self._keep_folder(display, lock)
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
                stopping = self._stopping(stop, display)
                if step % train.save_every == 0 or last or stopping:
                    self._finite(result)
                    metrics.sync()  # metrics on the disk are never behind the checkpoint
                    tensors = trainer.tensors()
                    if lock is not None:
                        self._store.save(step, tensors, trainer.state())
                    clock.restart()
                    if last:
                        return validation_loss
                    if stopping or self._stopping(stop, display):
                        return None

    def _stopping(self, stop: StopRequest, display: Display) -> bool:
        """Whether any process is to stop, or cannot be looked at any more."""
        return self._ranks.any(stop.requested or display.lost is not None)

    def _note_start(self, display: Display, first: str) -> None:
        """Say what runs, which is known after the first ``first``, and store the configuration."""
        self._compilation.ready(display.line, first)
        display.line(f"backend      {self._backend()}")
        if self._ranks.leads:
            self._write_config()

    def _keep_folder(self, display: Display, lock: FolderLock | None) -> None:
        """Put back what was removed: the model in memory is worth more than its folder."""
        if lock is None:
            return
        path = self.folder / _CONFIG
        if not os.path.lexists(path):
            self._write_config()
            display.line(f"note: {path} was removed while training; it is written anew")
        lock.hold()

    def _write_config(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_atomically(self.folder / _CONFIG, to_json(sealed(self.config.to_dict())))

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
                latest = self._store.newest()
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
    """Read the configuration of the run in a folder; without its file, that of the checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / _CONFIG
    try:
        return RunConfig.from_dict(unsealed(parse_json(read_file(path, limit=JSON_LIMIT))))
    except FileNotFoundError:
        latest = CheckpointStore(folder / "checkpoints", keep=1).latest()
        if latest is not None:
            return config_of(load_checkpoint(latest, ()))
        raise CheckpointError(
            f"--resume: expected a run in {folder}, got no {_CONFIG}; start one without --resume"
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # JSON, its seal, or what it holds
        raise CheckpointError(
            f"{path} is damaged: {error}; without it, that of the latest checkpoint is taken"
        ) from error


def _state_of(folder: Path) -> list[tuple[int, int]]:
    """Tell whether another trainer was in a folder: every write gives another state."""
    files = [folder / name for name in (_CONFIG, _METRICS, f"checkpoints/{LATEST}")]
    found = [os.lstat(path) for path in files if os.path.lexists(path)]
    return [(file.st_ino, file.st_mtime_ns) for file in found]
