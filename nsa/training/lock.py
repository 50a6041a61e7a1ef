"""One trainer at a time in a folder."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import stat
from collections.abc import Callable
from pathlib import Path

from nsa.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = "lock"
"""The file; it is there while a trainer runs, and after one was killed."""

_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class FolderLock:
    """Keeps other trainers out of a folder; a context manager.

    The system lets go of the lock when the process ends, however it ends. The file says who holds
    it, for the message that others get.

    Args:
        folder: it must be there.
        say: prints a line; called where a lock does not reach.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.path = folder / NAME
        self._say = say
        self._descriptor: int | None = None

    def hold(self) -> None:
        """Take the lock, or take it anew where the file is gone with its folder.

        Raises:
            CheckpointError: another trainer has it; its process and machine are named.
            OSError: the folder cannot be written to.
        """
        while not self._is_held():
            self._close()
            flags = os.O_RDWR | os.O_CREAT
            flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
            self._descriptor = os.open(self.path, flags, 0o666)
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise CheckpointError(f"{self.path}: expected a regular file, got something else")
            self._lock(self._descriptor)

    def _lock(self, descriptor: int) -> None:
        reaches = fcntl is not None
        try:
            if reaches:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise CheckpointError(
                    f"{self.path.parent}: expected no other trainer in it, got "
                    f"{_owner(descriptor) or 'another process'}; wait until it ends, or choose "
                    "another --out"
                ) from None
            reaches = False
        last = _owner(descriptor)
        here = platform.node() or "this machine"
        if last and (not reaches or not last.endswith(f" on {here}")):
            self._say(f"note: {self.path} was left by {last}; if that still trains, stop this one")
        elif not reaches:
            self._say(f"note: {self.path} cannot be locked; start no other trainer in this folder")
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f"{os.getpid()} {here}\n".encode())

    def _is_held(self) -> bool:
        """Whether the file at the path is still the one that was locked."""
        if self._descriptor is None:
            return False
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._descriptor), os.lstat(self.path))
        return False

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> FolderLock:
        with contextlib.ExitStack() as undone:
            undone.callback(self._close)
            self.hold()
            undone.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_held():
            with contextlib.suppress(OSError):  # a lock file that stays keeps nobody out
                os.unlink(self.path)
        self._close()


def _owner(descriptor: int) -> str | None:
    """Say which process wrote the file; None where nobody did."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    text = os.read(descriptor, 300).decode("ascii", "replace")
    match = re.fullmatch(r"([0-9]{1,10}) ([\w.-]{1,255})\n", text, re.ASCII)
    return f"process {match[1]} on {match[2]}" if match else None
