"""What a search found, for people: a table of times, and the rows to put into the library."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from nsa.backends.compiled.tiling import Capability
from nsa.tools.bench.report import milliseconds
from nsa.tools.bench.tune.problem import Table
from nsa.tools.bench.tune.search import Found, choose_group

_FOLDER = "nsa/backends/compiled"
_MOST_NOTES = 5
"""Of a launch's candidates that failed, so many are told in full."""


def tuned_row(table: Table, found: list[Found], measured: str, capability: Capability) -> Any:
    """Today's row with what was found, as far as the search went; None where it found nothing."""
    if not any(one.trials for one in found):
        return None
    changes: dict[str, Any] = {"measured": measured}
    if hasattr(table.row, "capability"):
        changes["capability"] = capability
    group = choose_group(found)
    for one in found:
        best = one.best(group)
        changes |= {} if best is None else best.candidate.entry
    return replace(table.row, **changes)


def print_found(
    done: list[tuple[Table, list[Found]]],
    title: str,
    measured: str,
    key: tuple[Any, ...],
    console: Console,
) -> None:
    """Prints times, what failed, and rows.

    Args:
        done: every table that was begun.
        measured: what the rows say of themselves.
        key: compute capability, D, V, as :data:`nsa.backends.compiled.window.tiles.TILES` has them.
    """
    table = RichTable(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in ("launch", "today's tiles", "ms", "best tiles", "ms", "gain"):
        table.add_column(name, justify="right" if name in ("ms", "gain") else "left")
    notes: list[str] = []
    for _, found in done:
        group = choose_group(found)
        for one in found:
            table.add_row(one.launch.name, *_cells(one, group))
            notes += _notes(one)
    console.print(table)
    for note in notes:
        console.print(Text(f"  - {note}", style="dim"), soft_wrap=True)
    for of, found in done:
        row = tuned_row(of, found, measured, key[0])
        if row is None:
            continue
        changed = replace(row, measured=of.row.measured) != of.row
        text = "a row" if changed else "today's tiles are the best: a row that says so"
        whole = all(one.complete for one in found)
        head = f"{text} for {of.into} of {_FOLDER}/{of.file}"
        console.print(Text(f"\n{head}{'' if whole else ' (not all was tried)'}:", style="bold"))
        source = python(row)
        if of.into == "TILES":
            source = f"{key!r}: {source}"
        console.print(Text(f"{source},"), soft_wrap=True)  # to be copied as it is
    console.print()


def python(x: Any) -> str:
    """An expression that makes a dataclass again; fields with their default are left out."""
    if not is_dataclass(x):
        return repr(x)
    given = {field.name: getattr(x, field.name) for field in fields(x) if not _is_default(x, field)}
    return f"{type(x).__name__}({', '.join(f'{name}={python(y)}' for name, y in given.items())})"


def _is_default(x: Any, field: Any) -> bool:
    return field.default is not MISSING and getattr(x, field.name) == field.default


def _cells(found: Found, group: Any) -> tuple[str, ...]:
    if not found.trials:
        return ("", "", "", "", "not tried")
    today, best = found.today, found.best(group)
    assert best is not None
    gain = today.seconds / best.seconds - 1
    cells = (short(today.candidate.tiles), milliseconds(today.seconds))
    if best is today:
        return (*cells, "the same", "", "")
    return (*cells, short(best.candidate.tiles), milliseconds(best.seconds), f"{gain:+.0%}")


def short(tiles: Any) -> str:
    """``block_m 128, block_n 64, …``; defaults are left out."""
    given = ((x.name, getattr(tiles, x.name)) for x in fields(tiles) if not _is_default(tiles, x))
    return ", ".join(f"{name.removeprefix('num_')} {value}" for name, value in given)


def _notes(found: Found) -> list[str]:
    """Why candidates were not timed; those that are alike together."""
    failed: dict[str, list[str]] = {}
    for trial in found.trials:
        if trial.note:
            failed.setdefault(trial.note, []).append(short(trial.candidate.tiles))
    return [
        f"{found.launch.name}: {note} ({'; '.join(tiles[:_MOST_NOTES])})"
        for note, tiles in failed.items()
    ]
