"""Checkpoints on disk: written whole or not at all, and checked when read.

A store is a folder::

    step-000200/            one checkpoint; older ones are removed
        model.safetensors  optimizer.safetensors  rng.safetensors
        state.json          everything that is not a tensor
        manifest.json       the step, size and SHA-256 of the other files, and its own SHA-256;
                            written last
    latest                  the name of the newest complete checkpoint

A checkpoint is written under a temporary name, put on the disk, renamed, and only then named by
``latest``. Whatever happens on the way (a kill, a full disk), ``latest`` names a complete one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nsa.errors import CheckpointError, show
from nsa.training.checkpoint_format import (
    MANIFEST,
    Checkpoint,
    name_of,
    read_checkpoint,
    safetensors,
    step_in,
    write_checkpoint,
)
from nsa.training.files import (
    read_file,
    remove_leftovers,
    replace_atomically,
    sync_folder,
    temporary_of,
)

LATEST = "latest"
"""The file that names a checkpoint."""

_LISTED = re.compile(r"step-[\w.+-]{1,100}", re.ASCII)
"""What ``latest`` may name."""
_NAMES = rf"{LATEST}|step-[0-9]+"
"""What a save writes."""
_NAME_LIMIT = 1 << 10
_SHOWN_NAMES = 5


class CheckpointStore:
    """The checkpoints of one run.

    Only folders that :meth:`save` made are ever removed: their name is a step in six digits or
    more, they are no links, and they have a manifest.

    Args:
        folder: where they live; made at the first save.
        keep: how many to keep, the newest first.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        safetensors()  # a missing package is better found before training than after
        self.folder = folder
        self.keep = keep
        self._saved: Path | None = None

    def latest(self) -> Path | None:
        """Find the newest complete checkpoint; None when nothing has been saved.

        It is the one that ``latest`` names; where that file is missing (a kill in the first save, a
        hand), the one of the highest step.

        Raises:
            CheckpointError: ``latest`` cannot be read, or does not name a folder that is there.
        """
        pointer = self.folder / LATEST
        try:
            name = read_file(pointer, limit=_NAME_LIMIT).decode(errors="replace").strip()
        except FileNotFoundError:
            return max(self._own(), key=_step_of, default=None)
        except OSError as error:
            raise CheckpointError(f"cannot read {pointer}: {error.strerror or error}") from error
        found = [path for path in _entries(self.folder) if _LISTED.fullmatch(path.name)]
        names = sorted((path.name for path in found if os.path.isdir(path)), key=_natural)
        if name not in names:
            known = ", ".join(names[-_SHOWN_NAMES:])
            fix = "write one of those into it to resume from it"
            if not known:
                fix = "delete it to begin at step 0"
            raise CheckpointError(
                f"{pointer}: expected the name of a checkpoint beside it, got {show(name)} "
                f"(found: {known or 'none'}); {fix}"
            )
        return self.folder / name

    def is_used(self) -> bool:
        """Whether a checkpoint was saved, be it there or not."""
        return os.path.lexists(self.folder / LATEST) or bool(self._own())

    def newest(self) -> Path | None:
        """Find :meth:`latest`, or None where it is damaged, for a message about something else."""
        try:
            return self.latest()
        except CheckpointError:
            return None

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> Path:
        """Write one checkpoint and make it the latest, whatever became of the others.

        Args:
            step: optimizer steps done.
            tensors: a name for each group of tensors, and the group; each becomes one file.
            state: values that JSON can hold.

        Raises:
            CheckpointError: the disk refused; the checkpoints already there are as they were.
        """
        final = self.folder / name_of(step)
        if self._saved == final and final.is_dir():  # an interrupt right after a periodic save
            return final
        previous = self.newest()
        temporary = temporary_of(final)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder, _NAMES)
            write_checkpoint(temporary, step, tensors, state)
            self._make_way(final)
            os.rename(temporary, final)
            sync_folder(self.folder)
            replace_atomically(self.folder / LATEST, f"{final.name}\n".encode())
        except OSError as error:
            intact = f"{previous} is intact" if previous else "there is no earlier one"
            raise CheckpointError(
                f"could not save {final}: {error.strerror or error}; {intact}"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._saved = final
        self._remove_old(final)
        return final

    def tidy(self) -> None:
        """Remove what killed processes left, as every save does: for a run that saves no more."""
        latest = self.latest()
        if latest is not None:
            remove_leftovers(self.folder, _NAMES)
            self._remove_old(latest)

    def _remove_old(self, final: Path) -> None:
        for old in sorted(self._own(), key=_step_of)[: -self.keep]:
            if old != final:
                # What is in use, or another's, stays: the checkpoint that counts is written.
                with contextlib.suppress(OSError):
                    self._remove(old)

    def _own(self) -> list[Path]:
        """List the checkpoints that :meth:`save` made here."""
        return [path for path in _entries(self.folder) if _is_own(path)]

    def _make_way(self, path: Path) -> None:
        """Free the name of a checkpoint: of an abandoned run, or of somebody's own making."""
        if _is_own(path):
            self._remove(path)
        elif os.path.lexists(path):
            asides = (path.with_name(f"{path.name}.aside{number}") for number in itertools.count(1))
            os.rename(path, next(aside for aside in asides if not os.path.lexists(aside)))

    def _remove(self, path: Path) -> None:
        """Delete a checkpoint; its name is gone before its files, so it is never half there."""
        trash = temporary_of(path).with_suffix(".old.tmp")
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)  # the rest goes with the next save


def _entries(folder: Path) -> list[Path]:
    """List a folder; one that is not there is empty."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror or error}") from error


def _is_own(path: Path) -> bool:
    complete = os.path.isfile(path / MANIFEST)
    return step_in(path.name) >= 0 and complete and not path.is_symlink()


def _natural(name: str) -> tuple[int, str]:
    return len(name), name


def _step_of(path: Path) -> int:
    return step_in(path.name)


def load_checkpoint(path: Path, groups: Iterable[str]) -> Checkpoint:
    """Read one checkpoint back and check sizes and checksums.

    Args:
        path: a run's folder, its folder of checkpoints, or one checkpoint.
        groups: the groups of tensors wanted; the files of the others are not read.

    Raises:
        CheckpointError: nothing there, or a file that is missing, truncated, changed, or written
            in another format.
    """
    return read_checkpoint(find_checkpoint(path), groups)


def find_checkpoint(path: Path) -> Path:
    """Find the checkpoint that a path means: itself, or the latest of a run or a store.

    Raises:
        CheckpointError: there is none.
    """
    there = os.path.isdir(path)
    if there and (path.name.startswith("step-") or os.path.exists(path / MANIFEST)):
        return path
    for folder in (path, path / "checkpoints"):
        latest = CheckpointStore(folder, keep=1).latest() if os.path.isdir(folder) else None
        if latest is not None:
            return latest
    what = "a file" if os.path.isfile(path) else "nothing there"
    if there:
        what = "a folder without one"
    raise CheckpointError(f"{path}: expected a run or a checkpoint folder, got {what}")
