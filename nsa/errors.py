"""One exception class per kind of mistake; what the library raises on purpose is an NSAError."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields

LINE = 200
"""Characters of a value that an error shows."""


class NSAError(Exception):
    """Base class of every error this library raises on purpose."""


class ConfigError(NSAError, ValueError):
    """A configuration that breaks a rule of the method or names an unknown value."""


class SettingsError(NSAError, ValueError):
    """An ``NSA_…`` environment flag that is unknown, does not parse, or contradicts another."""


class ShapeError(NSAError, ValueError):
    """Inputs whose shapes, dtypes, devices or index values do not fit together."""


class BackendUnavailable(NSAError):
    """A backend requested by name cannot run this problem; nothing else was run instead."""


class CacheError(NSAError):
    """A cache that cannot do what is asked of it: another configuration, dtype, device or batch, no
    room, or a sequence that is not there. It is as it was before."""


class CheckpointError(NSAError):
    """A checkpoint that is damaged, truncated, of another configuration or of a newer version."""


class MissingDependency(NSAError, ImportError):
    """A package that a part of the library needs is not installed, or too old."""


class UsageError(NSAError):
    """A command line that does not parse, or flags that contradict each other."""


class DataError(NSAError):
    """Data that cannot be used: an unreadable or empty path, or values that are not finite."""


def require(condition: bool, name: str, expected: str, got: object) -> None:
    """Refuse a value of a configuration that breaks a rule."""
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, got {show(got)}")


def show(value: object) -> str:
    """What was given, as far as it fits in a line."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # an int of more digits than Python prints, or nesting
        return f"{type(value).__name__} too long to print"
    return text if len(text) <= LINE else f"{text[:LINE]}…"


def is_int(value: object) -> bool:
    """Whether a value is an int; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether a value is a finite number; True and False are none."""
    if not (is_int(value) or isinstance(value, float)):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max  # type: ignore[operator]


def nearest(name: object, known: Sequence[str]) -> str:
    """List the known names, the closest one first if there is one."""
    folded = {option.lower(): option for option in known}
    text = name if isinstance(name, str) else show(name)
    close = difflib.get_close_matches(text[:LINE].lower(), folded, n=1)
    hint = f"did you mean {folded[close[0]]!r}? " if close else ""
    return f"{hint}(known: {', '.join(known)})"


def require_known(
    what: str, value: object, known: Sequence[str], error: type[NSAError] = ConfigError
) -> None:
    """Refuse a value that is none of the known ones, and name the nearest."""
    if not (isinstance(value, str) and value in known):
        raise error(
            f"{what}: expected one of the known names, got {show(value)}; {nearest(value, known)}"
        )


def require_fields(
    cls: type, given: Iterable[str], what: str = "", error: type[NSAError] = ConfigError
) -> None:
    """Refuse a name that is no field of a dataclass, and name the nearest."""
    names = tuple(entry.name for entry in fields(cls))
    for name in given:
        if name not in names:
            what = what or f"names of {cls.__name__}"
            raise error(f"expected {what}, got {show(name)}; {nearest(name, names)}")
