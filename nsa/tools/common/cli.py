"""What the command-line tools share: one-line errors, did-you-mean, exit codes, devices."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from nsa.errors import ConfigError, NSAError, UsageError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports
_EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are :class:`UsageError`, with the closest flag named."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_strictly(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parses every argument, or raises :class:`UsageError`."""
        arguments, unknown = self.parse_known_args(argv)
        if not unknown:
            return arguments
        given = unknown[0].partition("=")[0]
        if not given.startswith("-"):
            raise UsageError(f"expected a flag, got {given!r}; see --help")
        known = [flag for action in self._actions for flag in action.option_strings]
        close = difflib.get_close_matches(given, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "see --help"
        raise UsageError(f"expected a known flag, got {given}; {hint}")

    def error(self, message: str) -> NoReturn:
        """Called by argparse for everything but unknown flags."""
        raise UsageError(message)


def integer(text: str) -> int:
    """An argparse type whose message says what was expected."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None


def number(text: str) -> float:
    """An argparse type whose message says what was expected."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def run(body: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """Runs a tool's body and turns what may go wrong into one line on stderr and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a sign is no reason to end
    try:
        code = body(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader of our output is gone. Python would complain again when it flushes at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except NSAError as error:
        return fail(str(error))
    except torch.OutOfMemoryError:
        return fail("out of GPU memory; lower --batch-size or --seq-len")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return fail(f"{where}{error.strerror or error}")


def fail(message: str) -> int:
    """Prints ``error: message`` as one line on stderr; returns the exit code."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    return EXIT_ERROR


def choose_device(name: str) -> torch.device:
    """The device of a ``--device`` flag; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: for a name torch does not know, or a device this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if (device.index or 0) >= found:
            raise ConfigError(
                f"--device: expected a device of this machine, got {name!r}; "
                f"torch sees {found} CUDA devices"
            )
    return device
