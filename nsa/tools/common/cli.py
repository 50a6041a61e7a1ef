"""What the command-line tools share: flags of a dataclass, one-line errors, exit codes, devices."""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from itertools import pairwise
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import torch

from nsa.errors import ConfigError, NSAError, UsageError, require_known, show
from nsa.registry import names
from nsa.tools.common.failures import is_lack_of_memory
from nsa.tools.common.streams import OutputLost, standard_streams

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports
_SMALLER = "a smaller batch, shorter sequences or a smaller model"
_LONGEST_LINE = 2000
_EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
_T = TypeVar("_T")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are :class:`UsageError`, with the closest flag named."""

    def __init__(self, **options: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=form, **options)

    def parse_strictly(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parses every argument, or raises :class:`UsageError`."""
        for text in sys.argv[1:] if argv is None else argv:
            if "\0" in text:  # no system call takes it for a path
                raise UsageError(f"expected arguments without NUL, got {show(text)}")
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

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Called by argparse after ``--help``."""
        sys.stdout.flush()  # what fails here is still said in one line
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        """Called by argparse for everything but unknown flags."""
        raise UsageError(message)


def _typed(parse: Callable[[str], _T], what: str) -> Callable[[str], _T]:
    """An argparse type whose message says what was expected."""

    def typed(text: str) -> _T:
        try:
            return parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {what}, got {show(text)}") from None

    return typed


def _int64(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer of 64 bits, got {show(text)}")
    return value


integer, number = _typed(_int64, "an integer"), _typed(float, "a number")


def one_of(flag: str, known: Sequence[str]) -> Callable[[str], str]:
    """An argparse type that refuses a name that is not known, and tells the nearest."""

    def typed(text: str) -> str:
        require_known(flag, text, known, UsageError)
        return text

    return typed


def _pair(text: str, sign: str = ",") -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(sign))


_TYPES: dict[object, tuple[Callable[[str], object], str | None]] = {
    int: (integer, "N"),
    float: (number, "X"),
    str: (str, None),
    tuple[int, int]: (_typed(_pair, "two integers, such as 8,16"), "N,N"),
    tuple[tuple[int, int], ...]: (
        _typed(lambda text: tuple(_pair(part, ":") for part in text.split(",")), "N:N,N:N,…"),
        "N:N,…",
    ),
}
"""Of a field's type, what argparse parses the flag's value with, and what the help calls it."""


def add_fields(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    config: type,
    *,
    leave_out: Sequence[str] = (),
    show_defaults: bool = False,
    **options: dict[str, Any],
) -> None:
    """Add a flag for each field of a dataclass.

    The field's type says what the flag takes (int, float, str, bool, a Literal, pairs of ints, each
    also with ``| None``), and the docstring below the field is its help. A flag that is not given
    is left to ``argument_default`` of the parser, whatever the field's default is.

    Args:
        parser: gets the flags.
        config: a dataclass with a docstring below every field.
        leave_out: names of fields without a flag.
        show_defaults: whether the help names the field's default, where it has one.
        options: by the name of a field, what ``add_argument`` gets besides.
    """
    kinds, docs = get_type_hints(config), _docs_of_fields(config)
    for field in fields(config):
        if field.name in leave_out:
            continue
        kind, text = kinds[field.name], docs[field.name]
        if type(None) in get_args(kind):
            kind = get_args(kind)[0]
        arguments: dict[str, Any] = {}
        if get_origin(kind) is Literal:
            arguments["choices"] = get_args(kind)
        elif kind is bool:
            arguments["action"] = "store_true"
        else:
            arguments["type"], arguments["metavar"] = _TYPES[kind]
        if show_defaults and kind is not bool and field.default not in (MISSING, None):
            text += f" (default: {field.default})"
        arguments["help"] = text.replace("%", "%%")
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, **{**arguments, **options.get(field.name, {})})


def _docs_of_fields(config: type) -> dict[str, str]:
    """Read the docstring below each field of a dataclass, as help: one line, no final stop, a small
    first letter."""
    (definition,) = ast.parse(inspect.getsource(config)).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, below in pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant), (
                f"{config.__name__}.{field.target.id} has no docstring"
            )
            text = " ".join(str(below.value.value).replace("``", "").split()).removesuffix(".")
            is_word = not text[1].isupper()  # no abbreviation
            docs[field.target.id] = text[0].lower() + text[1:] if is_word else text
    return docs


def add_backend_and_device(parser: argparse.ArgumentParser) -> None:
    """Add the flags ``--backend`` and ``--device``."""
    parser.add_argument(
        "--backend", choices=names(), help="what computes NSA (default: the settings decide)"
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")


def run(body: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """Runs a tool's body and turns what may go wrong into one line on stderr and an exit code."""
    with standard_streams() as output:
        try:
            if output is None:
                raise UsageError(
                    "stdout: expected an open stream, got a closed one; send what nobody should "
                    f"see to {os.devnull}"
                )
            code = body(argv)
            output.flush()
            if output.lost is not None:
                raise output.lost
            return code
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except OutputLost as lost:
            # As every command behind "| head": in silence, unless there is more to say.
            code = fail(str(lost)) if lost.then or not lost.reader_left else EXIT_ERROR
            return _EXIT_BROKEN_PIPE if lost.reader_left else code
        except NSAError as error:
            return fail(str(error))
        except (RuntimeError, MemoryError) as error:
            if not is_lack_of_memory(error):
                raise
            where = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
            return fail(f"out of {where}; expected less to compute at once: {_SMALLER}")
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            return fail(f"{where}{error.strerror or error}")


def fail(message: str) -> int:
    """Prints ``error: message`` as one line on stderr; returns the exit code."""
    print("error:", printable(" ".join(message.split())), file=sys.stderr)
    return EXIT_ERROR


def printable(text: str) -> str:
    """Escape what would control a terminal, and cut what would fill it: files have strange names
    in them."""
    text = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
    return text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]}…"


def choose_device(name: str) -> torch.device:
    """The device of a ``--device`` flag; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: for a name torch does not know, or a device this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = None
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
    # Torch keeps eight bits of a number: cuda:256 would be cuda:0.
    if device is None or device.type not in ("cpu", "cuda") or str(device) != name:
        raise ConfigError(f"--device: expected auto, cpu, cuda or cuda:N, got {show(name)}")
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if (device.index or 0) >= found:
            raise ConfigError(
                f"--device: expected a device of this machine, got {name!r}; "
                f"torch sees {found} CUDA devices"
            )
    return device
