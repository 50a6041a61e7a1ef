"""From which length FA-2 beats ``sdpa``, as settings to put into the environment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nsa.tools.bench.flags import DECIDED
from nsa.tools.bench.rows import Row

ALWAYS = 1


def least_length(times: Sequence[tuple[int, float, float]]) -> int | None:
    """The length from which FA-2 is faster, as far as it was measured.

    Args:
        times: ``(T, seconds of FA-2, seconds of sdpa)``, in any order.

    Returns:
        The smallest T from which FA-2 is faster at every T measured; :data:`ALWAYS` if that is the
        smallest of all, None if it is slower at the largest.
    """
    least = None
    for T, fa2, sdpa in sorted(times, reverse=True):
        if fa2 >= sdpa:
            return least
        least = T
    return None if least is None else ALWAYS


def advice(rows: Iterable[Row]) -> list[str]:
    """Lines to paste into a shell, comments in between; none if there is nothing to compare.

    Args:
        rows: of one head layout, dtype and device. Where FA-2 and ``sdpa`` both computed a branch,
            forward and backward together decide.
    """
    rows = list(rows)
    times = {branch: _times(rows, branch) for branch in DECIDED}
    return [line for branch, of in times.items() if of for line in _lines(branch, of)]


def _times(rows: list[Row], branch: str) -> list[tuple[int, float, float]]:
    """``(longest sequence, FA-2, sdpa)``; FA-2's own backend for the kind of batch."""
    seconds: dict[str, dict[int, float]] = {"fa2": {}, "sdpa": {}}
    for row in rows:
        wanted = "fa2-varlen" if row.trial.packed else "fa2-dense"
        kind = {"sdpa": "sdpa", wanted: "fa2"}.get(row.backend)
        timing = row.measured.both
        if row.branch == branch and kind and timing is not None and row.runs_on == row.backend:
            seconds[kind][max(row.trial.lengths)] = timing.median
    return [
        (T, fa2, seconds["sdpa"][T]) for T, fa2 in seconds["fa2"].items() if T in seconds["sdpa"]
    ]


def _lines(branch: str, times: list[tuple[int, float, float]]) -> list[str]:
    flag = DECIDED[branch]
    lengths = sorted(T for T, _, _ in times)
    measured = f"T = {lengths[0]}"
    if len(lengths) > 1:
        measured = f"{len(lengths)} lengths from {lengths[0]} to {lengths[-1]}"
    least = least_length(times)
    if least == ALWAYS:
        text = f"FA-2 is always the faster one ({measured})"
        return [f"# {branch}: {text}: leave NSA_FA2_MIN_LEN_{flag} unset"]
    if least is None:
        text, setting = f"sdpa is the faster one at T = {lengths[-1]}", f"USE_FA2_{flag}=0"
    else:
        text, setting = (
            f"FA-2 is the faster one from T = {least} on",
            f"FA2_MIN_LEN_{flag}={least}",
        )
    return [f"# {branch}: {text} ({measured})", f"NSA_{setting}"]
