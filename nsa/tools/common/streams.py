"""Output that can be lost (its reader leaves, its disk is full, its terminal closes), said once."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

from nsa.errors import NSAError


class OutputLost(NSAError):
    """A stream or a file takes no more.

    Args:
        name: what it is called.
        reason: what the system says.
        then: what was done about it; empty if the tool just ends.
    """

    def __init__(self, name: str, reason: OSError, then: str = "") -> None:
        text = f"{name}: {reason.strerror or reason}"
        super().__init__(f"{text}; {then}" if then else text)
        self.name, self.reason, self.then = name, reason, then

    @property
    def reader_left(self) -> bool:
        """Whether it is a pipe that nobody reads any more, as behind ``| head``."""
        return isinstance(self.reason, BrokenPipeError)


class Output:
    """A text stream that raises :class:`OutputLost` once; what is written after that is dropped.

    Dropped, so that those who print on their way out, and Python at its exit, need not care. A
    thread other than the main one, such as that of a progress bar, only notes the loss.

    Args:
        stream: the stream, whose other methods are this one's, too.
        name: what to call it.
        raises: whether to raise; :attr:`lost` tells in any case.
    """

    def __init__(self, stream: TextIO, name: str, *, raises: bool = True) -> None:
        self._stream, self._name, self._raises = stream, name, raises
        self.lost: OutputLost | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or drop, a text."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._try(self._stream.flush)

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except OSError as error:
            self.lost = OutputLost(self._name, error)
            with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            if self._raises and threading.current_thread() is threading.main_thread():
                raise self.lost from error


@contextlib.contextmanager
def standard_streams() -> Iterator[Output | None]:
    """Make stdout and stderr an :class:`Output` each; yield that of stdout, None for a closed one.

    Stderr raises nothing: what cannot be told is left to the exit code.
    """
    before = sys.stdout, sys.stderr
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # else the next file gets the number of a closed stream, and what others write to it
    os.close(number)
    with contextlib.ExitStack() as stack:
        if sys.stderr is None:  # 2>&-
            sys.stderr = stack.enter_context(open(os.devnull, "w"))
        sys.stderr = cast(TextIO, Output(sys.stderr, "stderr", raises=False))
        output = None
        if sys.stdout is not None:  # >&-
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors="replace")  # a sign that is missing ends nothing
            output = Output(sys.stdout, "stdout")
            sys.stdout = cast(TextIO, output)
        try:
            yield output
        finally:
            with contextlib.suppress(OutputLost):  # here, or Python complains at its exit
                sys.stderr.flush()
                if output is not None:
                    output.flush()
            sys.stdout, sys.stderr = before
