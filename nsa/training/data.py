"""Bytes to train on: text files, their split, batches by position, and what counting achieves."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nsa.errors import DataError

Split = Literal["bytes", "files"]

STDLIB = "stdlib"
SEPARATOR = b"\0"
"""Stands before every document; text does not contain it."""

_BYTES = 256
_COUNTED_AT_ONCE = 1 << 24
_LEAST, _CUT, _MOST = 20, 10, 5
"""The validation split has a 20th to a fifth of all bytes; where a file is cut for it, a tenth."""
_SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules"})
_SKIPPED_IN_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """A train and a validation text, in bytes."""

    source: str
    """What ``--data`` named."""
    train: np.ndarray
    """uint8, the training documents end to end."""
    validation: np.ndarray
    """uint8, the others."""
    train_files: int
    validation_files: int
    cut: str | None
    """The file in both splits, since as a whole it would be most of the validation split."""
    skipped: int
    """Files left out: empty, unreadable, or not text."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of both splits: equal where training sees the same bytes."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            digest.update(len(split).to_bytes(8, "little"))
            digest.update(split.data)
        return digest.hexdigest()


def load_corpus(source: str, split: Split = "bytes") -> Corpus:
    """Read a text file, every text file under a folder, or the Python standard library.

    Files go to the validation split in the order of a hash of their path relative to the folder, so
    the split is the same on every machine that has the same files. Everything is kept in memory.

    Args:
        source: a path, or "stdlib" for the ``*.py`` files of the running Python's standard library,
            without tests and installed packages.
        split: "bytes": files go to the validation split until it has a 20th of all bytes; one that
            would bring it past a fifth (a single file always does) is cut, its end making it a
            tenth. "files": a 20th of the files, of whatever size.

    Raises:
        DataError: a path that does not exist, cannot be read, or holds no text.
    """
    root, suffix, skipped = Path(source), "", _SKIPPED_FOLDERS
    if source == STDLIB:
        root, suffix = Path(sysconfig.get_path("stdlib")), ".py"
        skipped |= _SKIPPED_IN_STDLIB
    elif not source or not root.exists():
        raise DataError(
            f"--data: expected a file or folder of text, got {source!r}, which is "
            f"not there (or {STDLIB!r} for Python's own source)"
        )
    if root.is_file():
        left_out, documents = 0, {root.name: _require_text(root)}
    else:
        paths = list(_walk(root, suffix=suffix, skipped=skipped))
        texts = {path.relative_to(root).as_posix(): _read_text(path) for path in paths}
        documents = {name: text for name, text in texts.items() if text is not None}
        left_out = len(paths) - len(documents)
        if not documents:
            raise DataError(
                f"--data: expected text files in {root}, got {len(paths)} files, none of "
                "them readable, non-empty text"
            )
    by_files = split == "files" and len(documents) > 1
    train, validation = (_split_files if by_files else _split_bytes)(documents)
    return Corpus(
        source=source,
        train=_join(train),
        validation=_join(validation),
        train_files=len(train),
        validation_files=len(validation),
        cut=next(iter(train.keys() & validation.keys()), None),
        skipped=left_out,
    )


def _by_hash(documents: Iterable[str]) -> list[str]:
    return sorted(documents, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())


def _split_bytes(documents: dict[str, bytes]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Split by size; a document that is cut is in both."""
    train, validation, size = dict(documents), {}, 0
    total = sum(map(len, documents.values()))
    for name in _by_hash(documents):
        if _LEAST * size >= total:
            break
        text = train.pop(name)
        if _MOST * (size + len(text)) > total:
            end = len(text) - max(1, total // _CUT - size)
            train[name], text = text[:end], text[end:]
        validation[name] = text
        size += len(text)
    return train, validation


def _split_files(documents: dict[str, bytes]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Split by count: what runs did before sizes were looked at, and go on with."""
    # The files with the smallest hashes, not those under a threshold: never an empty split.
    names = _by_hash(documents)[: max(1, round(len(documents) / _LEAST))]
    validation = {name: documents[name] for name in names}
    return {name: documents[name] for name in documents.keys() - validation.keys()}, validation


def _walk(root: Path, *, suffix: str, skipped: frozenset[str]) -> Iterator[Path]:
    """Yield files under a folder in sorted order, hidden ones and links to folders left out."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(
            name for name in subfolders if name not in skipped and not name.startswith(".")
        )
        for name in sorted(files):
            if name.endswith(suffix) and not name.startswith("."):
                yield Path(folder, name)


def _read_text(path: Path) -> bytes | None:
    """Read a text file; None for one that is empty, unreadable, or not text."""
    try:
        # A pipe or a device under the folder would block or never end.
        return _require_text(path) if path.is_file() else None
    except (OSError, DataError):
        return None


def _require_text(path: Path) -> bytes:
    """Read the one file that ``--data`` names, or say why it will not do."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"--data: cannot read {path}: {error.strerror}") from error
    if not data.strip():
        raise DataError(f"--data: expected text in {path}, got an empty file")
    if SEPARATOR in data:
        raise DataError(f"--data: expected text in {path}, got a binary file (it has NUL bytes)")
    return data


def _join(documents: dict[str, bytes]) -> np.ndarray:
    joined = b"".join(SEPARATOR + documents[name] for name in sorted(documents))
    return np.frombuffer(joined, dtype=np.uint8)


def require_length(corpus: Corpus, seq_len: int) -> None:
    """Refuse a corpus with a split too short for one sequence.

    Raises:
        DataError: naming the split and both lengths.
    """
    for name, split in (("training", corpus.train), ("validation", corpus.validation)):
        if len(split) < seq_len + 1:
            raise DataError(
                f"--data: expected at least {seq_len + 1} bytes in the {name} split "
                f"(--seq-len {seq_len} and one more), got {len(split)}; give more text or a "
                "shorter --seq-len"
            )


def training_batch(
    corpus: Corpus,
    *,
    seed: int,
    index: int,
    batch_size: int,
    seq_len: int,
    rows: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """Draw batch number ``index`` of a run: windows at random offsets; of these some rows.

    The offsets depend on ``seed`` and ``index`` alone, so a resumed run draws what the interrupted
    one would have drawn, without replaying anything.

    Returns:
        tokens and targets, int64 ``[batch_size, seq_len]`` on the CPU, or the ``rows`` of it.
    """
    generator = np.random.default_rng([seed, index])
    starts = generator.integers(0, len(corpus.train) - seq_len, size=batch_size)
    return _windows(corpus.train, starts[rows], seq_len)


def validation_starts(corpus: Corpus, *, count: int, seq_len: int) -> np.ndarray:
    """Find offsets of at most ``count`` windows, none overlapping, evenly spread over the split."""
    available = (len(corpus.validation) - 1) // seq_len
    count = min(count, available)
    return np.arange(count, dtype=np.int64) * available // count * seq_len


def validation_batches(
    corpus: Corpus, *, count: int, batch_size: int, seq_len: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the validation windows in batches; tokens and targets, int64 ``[B, T]``."""
    starts = validation_starts(corpus, count=count, seq_len=seq_len)
    for first in range(0, len(starts), batch_size):
        yield _windows(corpus.validation, starts[first : first + batch_size], seq_len)


def _windows(data: np.ndarray, starts: np.ndarray, seq_len: int) -> tuple[Tensor, Tensor]:
    window = torch.from_numpy(data[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64))
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


class Baselines(NamedTuple):
    """What counting alone achieves on the validation windows, in nats per byte."""

    unigram: float
    bigram: float


def baselines(corpus: Corpus, *, count: int, seq_len: int) -> Baselines:
    """Fit byte frequencies on the training split and score the bytes that the model is scored on.

    Unigram: add-one smoothing. Bigram: the pair counts, with one imaginary observation of every
    first byte spread over the unigram, so that an unseen pair costs a finite amount. Arguments as
    for :func:`validation_batches`.
    """
    train = corpus.train
    counts = np.zeros(_BYTES**2, dtype=np.int64)
    for first in range(0, len(train) - 1, _COUNTED_AT_ONCE):  # all of it as int32 would take 4x
        chunk = train[first : first + _COUNTED_AT_ONCE + 1].astype(np.int32)
        counts += np.bincount(chunk[:-1] * _BYTES + chunk[1:], minlength=_BYTES**2)
    pairs = counts.reshape(_BYTES, _BYTES)
    unigram = (np.bincount(train, minlength=_BYTES) + 1) / (len(train) + _BYTES)
    bigram = (pairs + unigram) / (pairs.sum(1, keepdims=True) + 1)

    starts = validation_starts(corpus, count=count, seq_len=seq_len)
    before, after = (x.flatten().numpy() for x in _windows(corpus.validation, starts, seq_len))
    return Baselines(
        unigram=float(-np.log(unigram[after]).mean()),
        bigram=float(-np.log(bigram[before, after]).mean()),
    )
