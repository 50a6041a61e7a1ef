"""``--compile-cache``: what was compiled, in one file that another run or machine can start from.

The file is a line of JSON (what wrote it, sizes and checksums) and then what
``torch.compiler.save_cache_artifacts`` returned, once for each time that something was compiled: of
one result that grew, torch reads back the last part alone.

It holds compiled code and pickles, which torch runs: use only files that you trust as much as a
program. Of kernels for a CPU torch keeps the C++ source and compiles it again, so that there a hit
saves little; tracing the model is not saved anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nsa.errors import ConfigError
from nsa.training.files import replace_atomically, write_durably

_KIND = "nsa compile cache"
_FORMAT = 1
_START = f'{{"kind": "{_KIND}"'.encode()


class CompileCache:
    """The file of ``--compile-cache``.

    Args:
        path: the file; it need not exist.
        device: where the code will run.

    Raises:
        ConfigError: it cannot be read, or could not be written.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.loaded = False
        """Whether what the file holds was given to torch."""
        self._maker = _maker(device)
        self._parts: list[bytes] = []
        self._foreign = False
        if path.exists() and not path.is_file():
            raise ConfigError(f"--compile-cache: expected a file, got {path}, which is none")
        trial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stored = path.read_bytes() if path.exists() else b""
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
                if torch.compiler.load_cache_artifacts(part) is None:
                    raise ValueError("torch cannot read it")
            self.loaded = True
        except (ValueError, OSError) as error:
            say(f"note: {self.path}: {error}; compiling anew")

    def save(self, say: Callable[[str], None]) -> None:
        """Add what was compiled since the last call and write the file; say in one line what the
        disk refuses."""
        artifacts = None if self._foreign else torch.compiler.save_cache_artifacts()
        if artifacts is None:
            return
        self._parts.append(artifacts[0])
        try:
            replace_atomically(self.path, _join(self._parts, self._maker))
        except OSError as error:
            say(f"note: could not write {self.path}: {error.strerror or error}; continuing without")


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
    line, _, rest = stored.partition(b"\n")
    try:
        header: dict[str, Any] = json.loads(line)
        written = {name: header[name] for name in ("format", *maker)}
        listed = [(part["bytes"], part["sha256"]) for part in header["parts"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError("damaged: its first line does not parse") from None
    for name, mine in {"format": _FORMAT, **maker}.items():
        if written[name] != mine:
            raise ValueError(f"written for {name} {written[name]}, here is {name} {mine}")
    parts = []
    for size, digest in listed:
        part, rest = rest[:size], rest[size:]
        if hashlib.sha256(part).hexdigest() != digest:
            raise ValueError("damaged: its SHA-256 is not the one in its first line")
        parts.append(part)
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
