"""One exception class per kind of mistake; what the library raises on purpose is an NSAError."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import fields

_SHOWN = 200
"""Characters of a value that an error repeats."""


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


class CheckpointError(NSAError):
    """A checkpoint that is damaged, truncated, or belongs to another configuration."""


class UsageError(NSAError):
    """A command line that does not parse, or flags that contradict each other."""


class DataError(NSAError):
    """Data that cannot be used: an unreadable or empty path, or values that are not finite."""


def require(condition: bool, name: str, expected: str, got: object) -> None:
    """Refuse a value of a configuration that breaks a rule."""
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, got {shown(got)}")


def shown(value: object) -> str:
    """Show a value that a stranger may have written: short, and with every control sign escaped."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep, or an int of too many digits
        return f"a {type(value).__name__} too large to show"
    if len(text) > _SHOWN:
        text = f"{text[:_SHOWN]}… ({len(text):,} characters)"
    return text


def is_int(value: object) -> bool:
    """Whether a value is an int; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether a value is a finite number; True and False are none."""
    return (is_int(value) or isinstance(value, float)) and math.isfinite(value)  # type: ignore[arg-type]


def nearest(name: object, known: Sequence[str]) -> str:
    """List the known names, the closest one first if there is one."""
    folded = {option.lower(): option for option in known}
    close = difflib.get_close_matches(str(name).lower(), folded, n=1)
    hint = f"did you mean {folded[close[0]]!r}? " if close else ""
    return f"{hint}(known: {', '.join(known)})"


def require_known(
    what: str, value: object, known: Sequence[str], error: type[NSAError] = ConfigError
) -> None:
    """Refuse a value that is none of the known ones, and name the nearest."""
    if value not in known:
        raise error(
            f"{what}: expected one of the known names, got {shown(value)}; {nearest(value, known)}"
        )


def require_fields(
    cls: type, given: Iterable[str], what: str = "", error: type[NSAError] = ConfigError
) -> None:
    """Refuse a name that is no field of a dataclass, and name the nearest."""
    names = tuple(entry.name for entry in fields(cls))
    for name in given:
        if name not in names:
            what = what or f"names of {cls.__name__}"
            raise error(f"expected {what}, got {shown(name)}; {nearest(name, names)}")
