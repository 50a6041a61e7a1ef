"""How to run: the ``NSA_…`` environment flags, read once and strictly.

The environment is read when ``nsa`` is imported and never again. A mistake in it is kept and raised
at the first use, so that ``python -m nsa.tools.diagnose`` can still explain it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from nsa.config import MOST_TOKENS, Keyed
from nsa.errors import LINE, SettingsError, nearest, require_fields, show
from nsa.registry import TABLE, fa2_names
from nsa.registry import names as backend_names

PROVIDERS = ("auto", "flash_attn", "aten", "math")
LOG_LEVELS = ("debug", "info", "warning", "error")
LENGTH_FLAGS = ("fa2_min_len_win", "fa2_min_len_cmp")
"""Fields that a choice compares with the length."""


def _field(default: Any, expected: Callable[[object], str | None], **more: Any) -> Any:
    """A field of :class:`Settings`; ``expected`` tells of a wrong value what it should be."""
    return field(default=default, metadata={"expected": expected, **more})


def _choice(default: str, known: Callable[[], tuple[str, ...]]) -> Any:
    def expected(value: object) -> str | None:
        return None if isinstance(value, str) and value in known() else "one of the known names"

    return _field(default, expected, known=known, parse=lambda flag, text: text)


def _integer(default: int, minimum: int) -> Any:
    def expected(value: object) -> str | None:
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            return f"an integer >= {minimum}"
        return None if value <= MOST_TOKENS else f"an integer <= {MOST_TOKENS}"

    def parse(flag: str, text: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise SettingsError(f"{flag}: expected an integer, got {show(text)}") from None

    return _field(default, expected, parse=parse)


def _switch(default: bool | None) -> Any:
    known = (False, True) if default is not None else (None, False, True)

    def expected(value: object) -> str | None:
        return None if any(value is option for option in known) else "0 or 1"

    def parse(flag: str, text: str) -> bool:
        if text not in ("0", "1"):
            raise SettingsError(f"{flag}: expected 0 or 1, got {show(text)}")
        return text == "1"

    return _field(default, expected, parse=parse)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(Keyed):
    """The flags of one process, typed; each field is ``NSA_`` and its name in capitals.

    Raises :class:`nsa.SettingsError` for a value out of range or flags that contradict each other.
    """

    backend: str = _choice("auto", backend_names)
    """The backend; "auto" lets the library choose and log its choice."""
    use_fa2: bool | None = _switch(None)
    """True: FlashAttention-2 or an error. False: "auto" never takes it."""
    use_fa2_win: bool | None = _switch(None)
    """The same for the window branch inside an FA-2 backend; False sends it to ``sdpa``."""
    use_fa2_cmp: bool | None = _switch(None)
    """The same for the compressed branch inside an FA-2 backend."""
    fa2_min_len_win: int = _integer(1, minimum=1)
    """A batch whose longest sequence is shorter uses ``sdpa`` for the window branch (tokens)."""
    fa2_min_len_cmp: int = _integer(1, minimum=1)
    """The same for the compressed branch (tokens)."""
    fa2_provider: str = _choice("auto", lambda: PROVIDERS)
    """Where FlashAttention-2 comes from."""
    prealloc_varlen_n: int = _integer(0, minimum=0)
    """Rows of the varlen workspace that is kept between calls."""
    prealloc_varlen_k: int = _integer(0, minimum=0)
    """Keys of the varlen workspace that is kept between calls."""
    check: bool = _switch(False)
    """Costly checks: finite inputs, index ranges, ``cu_seqlens`` on CUDA."""
    log: str = _choice("warning", lambda: LOG_LEVELS)
    """Level of the ``nsa`` logger."""
    nvtx: bool = _switch(False)
    """NVTX ranges around each branch, for a profiler."""

    def __post_init__(self) -> None:
        self._check()
        self._make_key()

    def _check(self) -> None:
        for flag, entry in zip(FLAGS, fields(self), strict=True):
            value = getattr(self, entry.name)
            expected = entry.metadata["expected"](value)
            if expected is not None:
                known = entry.metadata.get("known")
                hint = f"; {nearest(value, known())}" if known else ""
                raise SettingsError(f"{flag}: expected {expected}, got {show(value)}{hint}")
        fa2 = self.backend != "auto" and TABLE[self.backend].fa2
        if self.use_fa2 is True and self.backend != "auto" and not fa2:
            raise SettingsError(
                f"NSA_USE_FA2=1 contradicts NSA_BACKEND={self.backend}: expected NSA_BACKEND "
                f"unset, auto, {' or '.join(fa2_names())}; unset one of the two"
            )
        if self.use_fa2 is False and fa2:
            raise SettingsError(
                f"NSA_USE_FA2=0 contradicts NSA_BACKEND={self.backend}: expected a backend other "
                "than FA-2; unset one of the two"
            )

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """Parses every ``NSA_…`` name of ``environ``; the empty string means unset."""
        entries = dict(zip(FLAGS, fields(cls), strict=True))
        values: dict[str, Any] = {}
        if not isinstance(environ, Mapping):
            raise SettingsError(f"environ: expected names and texts, got {show(environ)}")
        for flag, text in environ.items():
            if not str(flag).startswith("NSA_") or not text:
                continue
            if not isinstance(text, str):
                raise SettingsError(f"{flag}: expected text, got {show(text)}")
            if flag not in entries:
                name = flag[:LINE]
                raise SettingsError(
                    f"{name}: expected a known flag, got an unknown one; {nearest(name, FLAGS)}"
                )
            values[entries[flag].name] = entries[flag].metadata["parse"](flag, text)
        return cls(**values)


FLAGS = tuple(f"NSA_{entry.name.upper()}" for entry in fields(Settings))


class FlagRow(NamedTuple):
    """One line of what ``diagnose`` prints about the flags."""

    flag: str
    value: object
    source: str
    """"default", "environment" or "use_settings"."""


_environment: dict[str, str] = {}
_from_environment: Settings | None = None
_environment_error: str | None = None
_override: ContextVar[Settings | None] = ContextVar("nsa_settings", default=None)
_levels: dict[object, int | str] = {}
"""By None what the logger's level was, then that of every open block which set it."""
_levels_lock = threading.Lock()


def read_environment(environ: Mapping[str, str] | None = None) -> None:
    """Reads the flags of the process (once, at import); an error is kept for the first use."""
    global _from_environment, _environment_error
    environ = os.environ if environ is None else environ
    _environment.clear()
    _environment.update({k: v for k, v in environ.items() if k.startswith("NSA_") and v})
    try:
        _from_environment, _environment_error = Settings.from_environ(environ), None
    except SettingsError as error:
        _from_environment, _environment_error = None, str(error)
        return
    logger = logging.getLogger("nsa")
    if "NSA_LOG" in _environment:
        _attach_handler(logger)
        logger.setLevel(_from_environment.log.upper())


def _attach_handler(logger: logging.Logger) -> None:
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(levelname)s: %(message)s"))
        logger.addHandler(handler)


def current_settings() -> Settings:
    """The settings in force here; raises the kept :class:`SettingsError` of a bad environment."""
    override = _override.get()
    if override is not None:
        return override
    if _from_environment is None:
        raise SettingsError(_environment_error or "the environment has not been read")
    return _from_environment


def environment_error() -> str | None:
    """What was wrong with the environment at import, or None."""
    return _environment_error


def foreign_variable(name: str) -> str | None:
    """A variable that belongs to another library, for ``diagnose``; None if unset or empty."""
    return os.environ.get(name) or None


@contextlib.contextmanager
def use_settings(settings: Settings | None = None, **changes: Any) -> Iterator[Settings]:
    """Puts other settings in force inside a ``with`` block (this thread or task only).

    The level of the ``nsa`` logger is the process': of overlapping blocks the latest decides.

    Args:
        settings: the base; None takes the settings in force.
        changes: fields of :class:`Settings` to replace.

    Raises:
        SettingsError: an unknown field or a value that the field does not take.
    """
    require_fields(Settings, changes, "a field of Settings", SettingsError)
    if settings is not None and not isinstance(settings, Settings):
        raise SettingsError(f"settings: expected Settings, got {show(settings)}")
    before = _override.get() or _from_environment
    chosen = replace(settings if settings is not None else current_settings(), **changes)
    token = _override.set(chosen)
    changes_level = before is None or chosen.log != before.log
    try:
        with _log_level(chosen.log) if changes_level else contextlib.nullcontext():
            yield chosen
    finally:
        _override.reset(token)


@contextlib.contextmanager
def _log_level(level: str) -> Iterator[None]:
    """A level of the logger while this block is open; threads may leave theirs in any order."""
    logger, block = logging.getLogger("nsa"), object()
    with _levels_lock:
        _levels.setdefault(None, logger.level)
        _levels[block] = level.upper()
        logger.setLevel(level.upper())
    try:
        yield
    finally:
        with _levels_lock:
            del _levels[block]
            logger.setLevel([*_levels.values()][-1])
            if len(_levels) == 1:
                _levels.clear()


def explain_settings() -> list[FlagRow]:
    """Every flag with its value and where that value came from.

    With a bad environment the values are the raw texts, so that the mistake can be seen.
    """
    override = _override.get()
    rows = []
    for entry, flag in zip(fields(Settings), FLAGS, strict=True):
        base: object = (
            getattr(_from_environment, entry.name)
            if _from_environment is not None
            else _environment.get(flag, entry.default)
        )
        source = "environment" if flag in _environment else "default"
        if override is not None and getattr(override, entry.name) != base:
            base, source = getattr(override, entry.name), "use_settings"
        rows.append(FlagRow(flag, base, source))
    known = set(FLAGS)
    rows += [
        FlagRow(flag, text, "environment (unknown)")
        for flag, text in sorted(_environment.items())
        if flag not in known
    ]
    return rows


read_environment()
