"""``--compile-cache``: what was compiled, in one file that another run or machine can start from.

The file is a line of JSON (what wrote it, sizes and checksums) and then what
``torch.compiler.save_cache_artifacts`` returned, once for each time that something was compiled: of
one result that grew, torch reads back the last part alone.

It holds compiled code and pickles, which torch runs: use only files that you trust as much as a
program. A file that others can write to is refused; a new one is readable by its owner alone. Of
kernels for a CPU torch keeps the C++ source and compiles it again, so that there a hit
saves little; tracing the model is not saved anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import platform
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from nsa.errors import ConfigError, is_int, show
from nsa.training.files import (
    JSON_LIMIT,
    open_regular,
    parse_json,
    remove_leftovers,
    replace_atomically,
    temporary_of,
    write_durably,
)

_KIND = "nsa compile cache"
_FORMAT = 1
_START = f'{{"kind": "{_KIND}"'.encode()
_UNUSABLE = (
    RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError,
    EOFError, OSError, MemoryError, pickle.PickleError,
)  # fmt: skip
"""What torch raises of a body that is none of its own, or of another version of it."""


class CompileCache:
    """The file of ``--compile-cache``.

    Args:
        path: the file, or a link to it; it need not exist.
        device: where the code will run.

    Raises:
        ConfigError: it cannot be read, could not be written, or others can write to it.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.loaded = False
        """Whether what the file holds was given to torch."""
        self._maker = _maker(device)
        self._parts: list[bytes] = []
        self._foreign = False
        if "\0" in str(path):
            raise ConfigError(
                f"--compile-cache: expected a path without NUL, got {show(str(path))}"
            )
        if path.exists() and not path.is_file():
            raise ConfigError(f"--compile-cache: expected a file, got {path}, which is none")
        try:
            self._file = Path(os.path.realpath(path))
            folder = self._file.parent
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder, re.escape(self._file.name))
            self._stored = _read_own(self._file) if self._file.exists() else b""
            trial = temporary_of(self._file)
            try:
                write_durably(trial, b"")
            finally:
                trial.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--compile-cache: cannot use {path}: {error.strerror or error}"
            ) from error

    def load(self, say: Callable[[str], None]) -> None:
        """Give the file to torch; say in one line what is wrong with it."""
        stored, self._stored = self._stored, b""
        if not stored:
            return
        if not stored.startswith(_START):
            self._foreign = True
            say(f"note: {self.path} is no compile cache; compiling anew, and leaving it as it is")
            return
        try:
            for part in _split(stored, self._maker):
                _give_to_torch(part)
            self.loaded = True
        except ValueError as error:
            say(f"note: {self.path}: {error}; compiling anew")

    def save(self, say: Callable[[str], None]) -> None:
        """Add what was compiled since the last call and write the file; say in one line what the
        disk refuses."""
        artifacts = None if self._foreign else torch.compiler.save_cache_artifacts()
        if artifacts is None:
            return
        self._parts.append(artifacts[0])
        try:
            if not self._file.exists():
                write_durably(self._file, b"", mode=0o600)  # what replaces it keeps the mode
            replace_atomically(self._file, _join(self._parts, self._maker))
        except OSError as error:
            say(f"note: could not write {self.path}: {error.strerror or error}; continuing without")


def _read_own(path: Path) -> bytes:
    """Read a file that nobody else can have changed.

    Raises:
        ConfigError: its owner is another user than this one or root, or others can write to it.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        writable = stat.S_IMODE(status.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
        if os.name != "nt" and (writable or status.st_uid not in (0, os.geteuid())):
            raise ConfigError(
                "--compile-cache: expected a file that only you can write to, since torch runs "
                f"what it holds, got {path}, {stat.filemode(status.st_mode)} of user "
                f"{status.st_uid}; chmod go-w it if you trust it, or name another"
            )
        return file.read()


def _give_to_torch(part: bytes) -> None:
    """Load what one call of ``save_cache_artifacts`` returned.

    Raises:
        ValueError: torch cannot use it.
    """
    try:
        with _silent(logging.getLogger("torch.compiler._cache")):  # it would print a traceback
            read = torch.compiler.load_cache_artifacts(part) is not None
    except _UNUSABLE as error:
        reason = show(f"{type(error).__name__}: {error}")
        raise ValueError(f"torch cannot use it ({reason})") from error
    if not read:
        raise ValueError("torch cannot read it")


@contextlib.contextmanager
def _silent(log: logging.Logger) -> Iterator[None]:
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _maker(device: torch.device) -> dict[str, str]:
    """Name what compiled code depends on, as far as a name can; torch's own keys say the rest."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} (sm{major}{minor})"
    else:
        name = f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    version = ".".join(platform.python_version_tuple()[:2])
    return {"torch": torch.__version__, "python": version, "device": name}


def _join(parts: list[bytes], maker: dict[str, str]) -> bytes:
    listed = [{"bytes": len(part), "sha256": hashlib.sha256(part).hexdigest()} for part in parts]
    header = {"kind": _KIND, "format": _FORMAT, **maker, "parts": listed}
    return json.dumps(header).encode() + b"\n" + b"".join(parts)


def _split(stored: bytes, maker: dict[str, str]) -> list[bytes]:
    """Invert :func:`_join`.

    Raises:
        ValueError: damage, or another maker.
    """
    end = stored.find(b"\n", 0, JSON_LIMIT)
    try:
        header = parse_json(stored[: max(end, 0)])
        written = {name: header[name] for name in ("format", *maker)}
        listed = [(part["bytes"], part["sha256"]) for part in header["parts"]]
        if not all(is_int(size) and size >= 0 for size, _ in listed):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError("damaged: its first line does not parse") from None
    for name, mine in {"format": _FORMAT, **maker}.items():
        if written[name] != mine:
            theirs = show(written[name]).strip("'")
            raise ValueError(f"written for {name} {theirs}, here is {name} {mine}")
    parts, at = [], end + 1
    for size, digest in listed:
        part = stored[at : at + size]
        if hashlib.sha256(part).hexdigest() != digest:
            raise ValueError("damaged: its SHA-256 is not the one in its first line")
        parts.append(part)
        at += size
    if at != len(stored):
        raise ValueError("damaged: it goes on where its first line says that it ends")
    return parts


class CacheUse:
    """Counts what torch's caches did since this was made, whoever filled them."""

    def __init__(self) -> None:
        self._first = self._last = _counts()

    def since_last_call(self) -> tuple[int, int]:
        """Count graphs taken from a cache, and graphs compiled."""
        before, self._last = self._last, _counts()
        return self._last[0] - before[0], self._last[1] - before[1]

    def __str__(self) -> str:
        hits, misses = (now - before for now, before in zip(_counts(), self._first, strict=True))
        if hits and misses:
            return f"{hits} of {hits + misses} graphs hit"
        return "hit" if hits else "miss" if misses else "not used"


def _counts() -> tuple[int, int]:
    """Graphs that Inductor took from a cache, and graphs that it compiled, in this process."""
    from torch._dynamo.utils import counters

    inductor = counters["inductor"]
    compiled = inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"]
    return inductor["fxgraph_cache_hit"], compiled
