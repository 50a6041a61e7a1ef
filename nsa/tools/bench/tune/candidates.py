"""The tiles that a search tries: what has been worth a try on some GPU, as far as it fits this one.

Today's come first, whatever they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from nsa.backends.compiled.select import tiles as select
from nsa.backends.compiled.selected import tiles as selected
from nsa.backends.compiled.tiling import Capability
from nsa.backends.compiled.window import tiles as window
from nsa.backends.compiled.window.tiles import Tiles
from nsa.tools.bench.tune.search import Candidate

_WINDOW = {
    "fwd": (
        *(Tiles(128, 64, 8, 2, 128), Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 3)),
        *(Tiles(128, 64, 4, 2), Tiles(128, 64, 4, 3), Tiles(128, 128, 8, 2)),
        *(Tiles(128, 32, 8, 2, 128), Tiles(128, 32, 8, 3, 128), Tiles(128, 32, 4, 3)),
        *(Tiles(64, 32, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3), Tiles(64, 128, 4, 2)),
    ),
    "bwd_dq": (
        *(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2, 128), Tiles(128, 64, 8, 3)),
        *(Tiles(128, 32, 8, 2), Tiles(128, 32, 8, 2, 128), Tiles(64, 64, 4, 2)),
        *(Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2), Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 3)),
        *(Tiles(64, 128, 8, 2), Tiles(32, 64, 4, 2)),
    ),
    "bwd_dkv": (
        *(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 1), Tiles(64, 128, 8, 2), Tiles(64, 128, 8, 3)),
        *(Tiles(32, 128, 8, 2), Tiles(32, 128, 8, 3), Tiles(64, 64, 8, 2), Tiles(64, 64, 4, 2)),
        *(Tiles(64, 64, 8, 2, 128), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 3)),
        *(Tiles(32, 64, 4, 2), Tiles(32, 64, 8, 2), Tiles(64, 32, 4, 2)),
    ),
}
_SELECT = (
    *((128, 64, 8, 3, 128), (128, 64, 8, 3, None), (128, 64, 8, 2, 128), (128, 64, 8, 4, 128)),
    *((128, 32, 8, 3, 128), (128, 128, 8, 3, None), (128, 64, 4, 3, None), (64, 64, 4, 3, None)),
    *((64, 64, 4, 3, 128), (64, 64, 4, 2, None), (64, 128, 4, 3, None), (64, 32, 4, 3, None)),
    *((128, 16, 4, 3, None), (64, 16, 4, 3, None)),
)
_ROWS = (32, 64, 128)
_STEPS = {
    "forward": ((64, 2), (64, 3), (64, 4), (32, 2), (32, 4), (128, 2)),
    "dq": ((64, 1), (64, 2), (64, 3), (32, 2), (32, 3), (128, 1)),
    "dkv": ((64, 1), (64, 2), (64, 3), (32, 1), (32, 2), (128, 1)),
}
"""Keys of a step and stages of the selected branch's launches."""
_REGISTERS = 168
"""Of a thread of dk and dv, so that three programs of 128 threads share a multiprocessor."""


def window_candidates(
    part: str, dtype: torch.dtype, D: int, V: int, capability: Capability
) -> tuple[Candidate, ...]:
    """Of one field of :class:`WindowTiles`."""
    today = window.tiles_for(dtype, D, V, capability)

    def fitted(tiles: Tiles) -> Tiles:
        changes: dict[str, Any] = {part: tiles}
        row = replace(today, **changes)
        return getattr(window.fitted(row, dtype, D, V, capability), part)

    tiles = (getattr(today, part), *map(fitted, _WINDOW[part]))
    return _once(Candidate(x, {part: x}) for x in tiles)


def select_candidates(row: select.Row, fit: Callable[..., Any]) -> tuple[Candidate, ...]:
    """``fit``: :func:`select_tiles` of the problem, by its row."""
    tiles = (row.tiles, *(select.SelectTiles(*sizes) for sizes in _SELECT))
    return _once(Candidate(fit(row=replace(row, tiles=x)), {"tiles": x}) for x in tiles)


def selected_candidates(
    part: str, row: selected.Row, fit: Callable[..., Any]
) -> tuple[Candidate, ...]:
    """Of one field of the row, for several numbers of rows; ``fit``: :func:`tiles_for` of the
    problem, by its row."""
    steps = [(rows, step) for rows in _ROWS for step in _STEPS[part]]
    entries: list[dict[str, Any]] = [{"rows": rows, part: step} for rows, step in steps]
    if part == "dkv":
        entries += [{**entry, "dkv_maxnreg": _REGISTERS} for entry in entries if entry[part][1] < 3]
        entries = [{"dkv_maxnreg": None, **entry} for entry in entries]
    fields = ("rows", part, *(("dkv_maxnreg",) if part == "dkv" else ()))
    today = {name: getattr(row, name) for name in fields}

    def candidate(entry: dict[str, Any]) -> Candidate:
        return Candidate(getattr(fit(row=replace(row, **entry)), part), entry, entry["rows"])

    return _once(map(candidate, (today, *entries)))


def _once(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Without those whose launch is tiled as that of one before."""
    found: dict[Any, Candidate] = {}
    for x in candidates:
        found.setdefault((x.tiles, x.group), x)
    return tuple(found.values())
