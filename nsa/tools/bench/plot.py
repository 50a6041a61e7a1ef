"""Time over T, on logarithmic axes: backends, dense attention, and the floors of the machine."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nsa.errors import UsageError
from nsa.tools.bench.cases import DENSE, WHOLE
from nsa.tools.bench.report import rate
from nsa.tools.bench.rows import Row, groups
from nsa.tools.bench.timing import Ceilings
from nsa.tools.bench.work import work
from nsa.tools.common.problems import short

# Okabe and Ito's palette, which the colour-blind can tell apart
_STYLES: dict[str, dict[str, Any]] = {
    "sdpa": {"color": "#0072B2", "marker": "o"},
    "fa2-dense": {"color": "#D55E00", "marker": "s"},
    "fa2-varlen": {"color": "#E69F00", "marker": "D"},
    "compiled": {"color": "#009E73", "marker": "^"},
    "reference": {"color": "#999999", "marker": "v"},
    "dense FA-2": {"color": "#000000", "marker": "x", "linestyle": "--"},
    "dense cuDNN": {"color": "#666666", "marker": "+", "linestyle": "--"},
    "dense SDPA": {"color": "#000000", "marker": "x", "linestyle": "--"},
}
_ARITHMETIC = {"color": "#CC79A7", "linestyle": ":"}
_BYTES = {"color": "#56B4E9", "linestyle": "-."}
_POINTS = 60
"""Lengths at which a floor is computed."""


def require_matplotlib() -> None:
    """Finds out before anything is measured.

    Raises:
        UsageError: matplotlib is not installed or does not import.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        text = f"--plot needs matplotlib ({error}): pip install 'nsa-torch[bench]'"
        raise UsageError(text) from error


def draw(rows: Iterable[Row], ceilings: Ceilings, heading: str, path: Path) -> bool:
    """Writes a figure: one row of panels for each table, forward at the left, both at the right.

    Rows of single branches are left out; the ceilings give the floors; the heading stands above
    everything. Returns whether there was anything to draw.
    """
    from matplotlib.figure import Figure  # an optional package

    tables = [part for group in groups(rows) if (part := _drawn(group))]
    if not tables:
        return False
    figure = Figure(figsize=(11, 1.4 + 4.2 * len(tables)), layout="constrained")
    figure.suptitle(heading, fontsize=11)
    panels = figure.subplots(len(tables), 2, squeeze=False, sharex="row", sharey="row")
    for (left, right), group in zip(panels, tables, strict=True):
        _panel(left, group, "forward", ceilings)
        _panel(right, group, "both", ceilings)
        left.set_title(f"{group[0].title}: forward", fontsize=10, loc="left")
        right.set_title("forward + backward", fontsize=10, loc="left")
        left.set_ylabel("time (ms)")
    for panel in panels[-1]:
        panel.set_xlabel("T (tokens)")
    lines: dict[str, Any] = {}
    for panel in panels.flat:
        for line, label in zip(*panel.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, line)
    figure.legend(
        lines.values(), lines, loc="outside lower center", ncols=min(4, len(lines)), frameon=False
    )
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        error.filename = error.filename or str(path)  # write() does not say which file
        raise
    return True


def _drawn(group: list[Row]) -> list[Row]:
    """The rows of the whole, with the selection in it if that was measured, and the dense ones."""
    found = [row for row in group if not row.note]
    branches = [branch for branch in reversed(WHOLE) if any(r.branch == branch for r in found)]
    if not branches:
        return []
    return [row for row in found if row.branch in (branches[0], DENSE)]


def _panel(panel: Any, group: list[Row], name: str, ceilings: Ceilings) -> None:
    for backend in dict.fromkeys(row.backend for row in group):
        mine = [row for row in group if row.backend == backend]
        points = [(row.trial.length, getattr(row.measured, name)) for row in mine]
        times = [(length, timing) for length, timing in points if timing is not None]
        label = backend if mine[0].branch == DENSE else f"{backend}, {mine[0].branch}"
        milliseconds = [timing.median * 1e3 for _, timing in times]
        style = {"linestyle": "-", "linewidth": 1.8, "markersize": 6, **_STYLES.get(backend, {})}
        panel.plot([length for length, _ in times], milliseconds, label=label, **style)
    lengths = sorted({row.trial.length for row in group})
    whole = next((row for row in group if row.branch != DENSE), group[0])
    ratio = lengths[-1] / lengths[0]  # even steps of a logarithmic axis
    grid = sorted({round(lengths[0] * ratio ** (i / _POINTS)) for i in range(_POINTS + 1)})
    works = [work(whole.branch, whole.trial.with_length(length)) for length in grid]
    passes = [both[:1] if name == "forward" else both for both in works]
    flops = ceilings.flops_per_second[short(whole.trial.dtype)]
    moved = ceilings.bytes_per_second
    label = f"NSA's floor: arithmetic at {rate(flops, 'FLOP/s')}"
    floor = [1e3 * sum(one.flops for one in of) / flops for of in passes]
    panel.plot(grid, floor, label=label, linewidth=1.8, **_ARITHMETIC)
    label = f"NSA's floor: bytes at {rate(moved, 'B/s')}"
    floor = [1e3 * sum(one.bytes for one in of) / moved for of in passes]
    panel.plot(grid, floor, label=label, linewidth=1.8, **_BYTES)
    _axes(panel, lengths)


def _axes(panel: Any, lengths: list[int]) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.margins(x=0.07)
    panel.set_xticks(lengths, [f"{length:,}" for length in lengths])
    panel.set_xticks([], minor=True)
    if len(lengths) == 1:  # one point, which needs room at both sides
        panel.set_xlim(lengths[0] / 2, lengths[0] * 2)
    panel.yaxis.set_major_formatter("{x:,g}")
    panel.grid(which="major", color="#dddddd", linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
