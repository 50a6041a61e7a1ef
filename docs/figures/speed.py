"""Draws speed.svg: time of one attention call over T, every backend beside dense attention.

It reads the JSON lines of one run of ``python -m nsa.tools.bench --jsonl FILE`` with ``all+select``
among its branches: ``python docs/figures/speed.py [FILE.jsonl [OUT.svg]]``, by default h100.jsonl
and speed.svg beside this file. A file with several head layouts, dtypes, batch sizes or packings
is refused: a figure compares lines of one problem.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svg import Figure

FOLDER = Path(__file__).parent
SOURCE, OUT = FOLDER / "h100.jsonl", FOLDER / "speed.svg"
WIDTH, HEIGHT, MARGIN = 860, 428, 24
TOP, BOTTOM = 74, 330
PANELS = ((62, 272), (478, 688))
"""Left and right end of each panel; the names of the lines stand to its right."""
PASSES = (("forward_ms", "Forward"), ("both_ms", "Forward and backward"))
WHOLE, DENSE = "all+select", "dense"
NAME_HEIGHT = 17
"""Pixels between the names of two lines."""
STYLES = {
    "compiled": ("green", "triangle"),
    "fa2-dense": ("orange", "square"),
    "fa2-varlen": ("yellow", "diamond"),
    "sdpa": ("blue", "circle"),
    "reference": ("muted", "circle"),
    "dense cuDNN": ("text", "cross"),
    "dense FA-2": ("muted", "plus"),
    "dense SDPA": ("text", "cross"),
}
"""Colour and marker of each line; those of dense attention are dashed."""
MARKERS = {
    "triangle": "M0 -5L5 4L-5 4Z",
    "square": "M-4 -4L4 -4L4 4L-4 4Z",
    "diamond": "M0 -5L5 0L0 5L-5 0Z",
    "circle": "M-4 0A4 4 0 1 1 4 0A4 4 0 1 1 -4 0Z",
    "cross": "M-4 -4L4 4M-4 4L4 -4",
    "plus": "M-5 0L5 0M0 -5L0 5",
}

Lines = dict[str, dict[int, float]]
"""Milliseconds by T, by the name of a line."""


def draw(records: Sequence[dict[str, Any]]) -> str:
    """The figure as text.

    Args:
        records: the header and the rows of a run, as ``--jsonl`` writes them.

    Raises:
        ValueError: there is nothing to compare, or more than one problem.
    """
    header, rows = _parse(records)
    panels = [_lines(rows, name) for name, _ in PASSES]
    times = [time for lines in panels for line in lines.values() for time in line.values()]
    lengths = sorted({row["length"] for row in rows})
    if not times or len(lengths) < 2:
        raise ValueError(f"expected times at two lengths or more, got {len(times)} at {lengths}")
    figure = Figure(
        WIDTH,
        HEIGHT,
        "Time of one attention call over the number of tokens",
        "Two logarithmic plots, forward at the left, forward and backward at the right, with one "
        "line for each backend of Native Sparse Attention and for each dense kernel.",
    )
    scale = (math.log(min(times) / 1.4), math.log(max(times) * 1.4))
    for (left, right), lines, (_, title) in zip(PANELS, panels, PASSES, strict=True):
        figure.text(left, 32, title, "title")
        figure.text(left, 51, "time (ms)", "note")
        _axes(figure, left, right, lengths, scale)
        _panel(figure, left, right, lines, lengths, scale)
    key = (
        "Solid: Native Sparse Attention, selection included, φ not. Dashed: dense causal attention."
    )
    figure.text(MARGIN, HEIGHT - 36, key, "note")
    row = rows[0]
    sizes = f"heads {row['heads']}, {row['dtype']}, batch {row['batch']}"
    machine = f"{header['device_name']}, torch {header['torch']}"
    figure.text(MARGIN, HEIGHT - 17, f"Medians; {machine}; {sizes}", "note")
    return str(figure)


def _parse(records: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header, and the rows that are drawn."""
    headers = [record for record in records if record["kind"] == "header"]
    if len(headers) != 1:
        raise ValueError(f"expected the header of one run, got {len(headers)}")
    rows = [
        record
        for record in records
        if record["kind"] == "row" and record["branch"] in (WHOLE, DENSE) and record["note"] is None
    ]
    for branch in (WHOLE, DENSE):
        if all(row["branch"] != branch for row in rows):
            raise ValueError(f"expected rows of the branch {branch}, got none")
    unknown = {row["backend"] for row in rows} - set(STYLES)
    if unknown:
        raise ValueError(f"expected names of STYLES, got {sorted(unknown)}: add a row for each")
    problems = {
        (row["heads"], row["dtype"], row["batch"], bool(row["packed_lengths"])) for row in rows
    }
    if len(problems) != 1:
        raise ValueError(f"expected rows of one problem, got {sorted(problems)}")
    return headers[0], rows


def _lines(rows: list[dict[str, Any]], name: str) -> Lines:
    lines: Lines = {}
    for row in rows:
        if row[name] is not None:
            lines.setdefault(row["backend"], {})[row["length"]] = row[name]
    return lines


def _axes(
    figure: Figure, left: float, right: float, lengths: list[int], scale: tuple[float, float]
) -> None:
    for power in range(math.floor(scale[0] / math.log(10)), math.ceil(scale[1] / math.log(10)) + 1):
        time = 10.0**power
        if scale[0] <= math.log(time) <= scale[1]:
            y = _y(time, scale)
            figure.path([(left, y), (right, y)], "stroke", "s-faint")
            figure.text(left - 8, y + 4, f"{time:,g}", "note", anchor="end")
    for length in lengths:
        x = _x(length, left, right, lengths)
        figure.path([(x, TOP), (x, BOTTOM)], "stroke", "s-faint")
        name = f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"
        figure.text(x, BOTTOM + 18, name, "note", anchor="middle")
    figure.path([(left, TOP), (left, BOTTOM), (right, BOTTOM)], "stroke", "s-line")
    figure.text((left + right) / 2, BOTTOM + 36, "T (tokens)", "note", anchor="middle")


def _panel(
    figure: Figure,
    left: float,
    right: float,
    lines: Lines,
    lengths: list[int],
    scale: tuple[float, float],
) -> None:
    ends = {}
    for name, line in lines.items():
        colour, marker = STYLES[name]
        dashed = ("dashed",) if name.startswith("dense") else ()
        points = [
            (_x(T, left, right, lengths), _y(time, scale)) for T, time in sorted(line.items())
        ]
        figure.path(points, "stroke", "thick", f"s-{colour}", *dashed)
        for x, y in points:
            fill = f"f-{colour}" if MARKERS[marker].endswith("Z") else "stroke"
            figure.element(
                "path",
                fill,
                "thick",
                f"s-{colour}",
                d=MARKERS[marker],
                transform=f"translate({x:.2f} {y:.2f})",
            )
        ends[name] = points[-1]
    wanted = {name: y for name, (_, y) in ends.items()}
    for name, y in _apart(wanted).items():
        end = max(lines[name])
        x, from_y = ends[name]
        figure.path([(x + 8, from_y), (right + 20, y)], "stroke", "s-line")
        figure.text(
            right + 24, y + 4, f"{name}, {_rounded(lines[name][end])}", f"f-{STYLES[name][0]}"
        )


def _rounded(time: float) -> str:
    """Three digits, or all before the point."""
    return f"{time:,.0f}" if time >= 100 else f"{time:.3g}"


def _apart(wanted: dict[str, float]) -> dict[str, float]:
    """Heights of the names, near those wanted and at least ``NAME_HEIGHT`` from each other."""
    placed: dict[str, float] = {}
    groups: list[list[str]] = []
    for name in sorted(wanted, key=lambda name: wanted[name]):
        groups.append([name])
        while True:  # a group of names that touch is centred on the mean of what they want
            for group in groups:
                middle = sum(wanted[member] for member in group) / len(group)
                for i, member in enumerate(group):
                    placed[member] = middle + (i - (len(group) - 1) / 2) * NAME_HEIGHT
            if len(groups) < 2 or placed[groups[-1][0]] - placed[groups[-2][-1]] >= NAME_HEIGHT:
                break
            groups[-2:] = [groups[-2] + groups[-1]]
    return placed


def _x(length: int, left: float, right: float, lengths: list[int]) -> float:
    low, high = math.log(lengths[0]), math.log(lengths[-1])
    margin = 12
    return left + margin + (math.log(length) - low) / (high - low) * (right - left - 2 * margin)


def _y(time: float, scale: tuple[float, float]) -> float:
    low, high = scale
    return BOTTOM - (math.log(time) - low) / (high - low) * (BOTTOM - TOP)


def main(arguments: Sequence[str]) -> None:
    source = Path(arguments[0]) if arguments else SOURCE
    out = Path(arguments[1]) if len(arguments) > 1 else OUT
    lines = source.read_text(encoding="utf-8").splitlines()
    out.write_text(draw([json.loads(line) for line in lines]), encoding="utf-8")
    print(f"written: {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
