"""Where a text ends: tokens or sequences of tokens that are looked for as it grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

from nsa.errors import ConfigError, show

Stop = int | Sequence[int] | Sequence[Sequence[int]] | Sequence[int | Sequence[int]] | None
"""A token, or bytes (a sequence of tokens), or several of either."""


def stop_sequences(stop: object) -> list[tuple[int, ...]]:
    """Check what a user gave as ``stop``.

    Raises:
        ConfigError: it is none.
    """
    if stop is None:
        return []
    several = stop if isinstance(stop, (list, tuple, set, frozenset)) else [stop]
    found: list[tuple[int, ...]] = []
    for one in several:
        tokens: list[Any] = (
            list(one) if isinstance(one, Sequence) and not isinstance(one, str) else [one]
        )
        if not (tokens and all(is_token(x) for x in tokens)):
            raise ConfigError(
                "stop: expected a token (an int >= 0), bytes, or a list of tokens and of "
                f"sequences of them, got {show(stop)}"
            )
        found.append(tuple(int(x) for x in tokens))
    return found


def is_token(x: object) -> bool:
    """Whether a value is an int >= 0 of 63 bits; a numpy integer is."""
    try:
        return isinstance(x, SupportsIndex) and 0 <= x.__index__() < 2**63
    except TypeError:  # an array or tensor that is no single integer
        return False


class Tail:
    """The end of one text that is not given out yet, since it may be the start of a stop.

    Args:
        stops: not empty, each.
    """

    def __init__(self, stops: Sequence[tuple[int, ...]]) -> None:
        self._stops = stops
        self._edges = {stop[0] for stop in stops} | {stop[-1] for stop in stops}
        self._held: list[int] = []

    def add(self, token: int) -> tuple[list[int], bool]:
        """Take one more token: those that are certain now, and whether a stop has come."""
        if not self._held and token not in self._edges:
            return [token], False
        held = [*self._held, token]
        ended = [len(stop) for stop in self._stops if tuple(held[-len(stop) :]) == stop]
        if ended:
            self._held = []
            return held[: len(held) - max(ended)], True
        keep = max((self._begun(held, stop) for stop in self._stops), default=0)
        certain, self._held = held[: len(held) - keep], held[len(held) - keep :]
        return certain, False

    def flush(self) -> list[int]:
        """What is held, when the text ends for another reason."""
        held, self._held = self._held, []
        return held

    @staticmethod
    def _begun(held: list[int], stop: tuple[int, ...]) -> int:
        """How many of the last tokens are the beginning of a stop, at most."""
        most = min(len(held), len(stop) - 1)
        return next((n for n in range(most, 0, -1) if tuple(held[-n:]) == stop[:n]), 0)
