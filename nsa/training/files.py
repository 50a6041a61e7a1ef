"""Files that survive a crash, and files that somebody else may have made.

Written ones are replaced whole or not at all. The kind and the size of one are checked before it is
read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

JSON_LIMIT = 1 << 20
"""Bytes in a file of JSON; the largest of ours has 20,000."""
_DAY = 24 * 3600
_HOST = "h" + hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_SEAL = "sha256"
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read, and never wait for one that is a pipe or a device.

    Raises:
        OSError: as ``open``, and for everything but a regular file or a link to one.
    """
    _require_regular(path, os.stat(path).st_mode)  # to open a device may already do something
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", opener=lambda name, default: os.open(name, default | flags))  # noqa: SIM115
    try:
        _require_regular(path, os.fstat(file.fileno()).st_mode)
    except OSError:
        file.close()
        raise
    return file


def read_file(path: Path, *, limit: int) -> bytes:
    """Read a regular file of at most ``limit`` bytes.

    Raises:
        OSError: as :func:`open_regular`, and for a file that is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            text = f"expected at most {limit} bytes, got {size}"
            raise OSError(errno.EFBIG, text, str(path))
        data = file.read(size + 1)
    if len(data) > size:
        raise OSError(errno.EFBIG, "expected a file at rest, got one that grows", str(path))
    return data


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((text for holds, text in _KINDS if holds(mode)), "something else")
        raise OSError(errno.EINVAL, f"expected a regular file, got {kind}", str(path))


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: it is none; the text repeats nothing of ``data``.
    """
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("expected JSON, got one nested too deep") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"expected JSON, got {error}") from None
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def to_json(value: Mapping[str, Any]) -> bytes:
    """Encode a file of JSON that people may read."""
    return (json.dumps(value, indent=1) + "\n").encode()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add the checksum of ``values`` to them."""
    return {**values, _SEAL: _checksum(values)}


def unsealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check and drop what :func:`sealed` added; files of earlier versions have none.

    Raises:
        ValueError: the values are not those that were sealed.
    """
    rest = {name: value for name, value in values.items() if name != _SEAL}
    if _SEAL in values and values[_SEAL] != _checksum(rest):
        raise ValueError(
            "expected what it was written with, got other values than its own SHA-256 says"
        )
    return rest


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_durably(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write a file that is not there yet, and wait until it is on the disk.

    Args:
        mode: the permissions; the umask may take from them.
    """
    try:
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)  # write() does not say which file
        raise


def replace_atomically(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``; a crash at any moment leaves the old content or the new.

    The permissions of a file that is there are kept. A link is replaced, not followed.
    """
    temporary = temporary_of(path)
    try:
        before = os.lstat(path).st_mode
    except FileNotFoundError:
        before = 0
    try:
        temporary.unlink(missing_ok=True)
        if stat.S_ISREG(before):
            mode = stat.S_IMODE(before) & 0o777
            write_durably(temporary, data, mode=mode)
            os.chmod(temporary, mode)
        else:
            write_durably(temporary, data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def temporary_of(path: Path) -> Path:
    """Name the file that becomes ``path`` when it is whole; no other process has that name."""
    return path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove what killed processes left under a name of :func:`temporary_of`.

    A process of another machine, or one whose number is in use again, is gone when it has not
    written for a day. What cannot be removed does no harm and stays.

    Args:
        folder: where to look; it need not exist.
        names: a regular expression; only files that would have become a name it matches are ours.
    """
    pattern = re.compile(rf"\.(?:{names})(\.h[0-9a-f]{{8}})?\.([0-9]+)(\.old)?\.tmp")
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            match = pattern.fullmatch(entry.name)
            if match is None:
                continue
            here = match[1] in (None, f".{_HOST}")
            old = time.time() - entry.stat(follow_symlinks=False).st_mtime > _DAY
            if old or (here and not _is_running(int(match[2]))):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)


def _is_running(process: int) -> bool:
    """Whether another process of this machine has the number."""
    if os.name == "nt":  # there is no signal 0, and every signal ends it
        return process != os.getpid()
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return process != os.getpid()  # ours: of an earlier process with our number


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable, where the system can."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
