"""A run of ``bench`` for people: what it ran on, and a table for each head layout and dtype."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nsa.backends.fa2.providers import describe
from nsa.errors import BackendUnavailable
from nsa.settings import Settings
from nsa.tools.bench.cases import BRANCHES, DENSE, WHOLE
from nsa.tools.bench.peers import PEERS, installed
from nsa.tools.bench.rows import Row, groups
from nsa.tools.bench.timing import PASSES, Ceilings
from nsa.tools.common.failures import OUT_OF_MEMORY
from nsa.tools.common.machine import GIB, collect_machine

_COMMAND = "python -m nsa.tools.bench"
_OF_MACHINE = ("os", "cpu", "cores", "python", "nsa", "torch", "torch_threads")
_OF_CUDA = ("cuda_runtime", "cuda_driver", "triton")
_ORDER = {branch: i for i, branch in enumerate((*BRANCHES, DENSE))}
_DIM, _BAD = "dim", "red"
_LEGEND = """\
Milliseconds: the median, ± half the distance of the 10th from the 90th percentile.
both: forward with a graph and backward. × dense: how many times as fast as the fastest dense row.
error/bound: the largest error of the parity check as a share of what is allowed."""


def header(
    device: torch.device, settings: Settings, ceilings: Ceilings, argv: Sequence[str] | None
) -> dict[str, Any]:
    """What rows were measured on, as plain values for JSON."""
    machine = collect_machine()
    on_cuda = device.type == "cuda"
    arguments = sys.argv[1:] if argv is None else argv
    return {
        "kind": "header",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"{_COMMAND} {shlex.join(arguments)}".strip(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if on_cuda else machine.cpu,
        **{name: getattr(machine, name) for name in _OF_MACHINE + _OF_CUDA},
        "python": machine.python.partition(",")[0],
        **{name: installed(name) for name in PEERS},
        "fa2_provider": _provider(settings, device),
        "settings": _changed(settings),
        "ceilings": asdict(ceilings),
    }


def _changed(settings: Settings) -> dict[str, Any]:
    """The flags that are not at their default."""
    values, defaults = asdict(settings), asdict(Settings())
    return {f"NSA_{name.upper()}": x for name, x in values.items() if x != defaults[name]}


def _provider(settings: Settings, device: torch.device) -> str | None:
    """What FA-2 runs on; None where there is none."""
    try:
        return describe(settings.fa2_provider, device)
    except BackendUnavailable:
        return None


def heading(known: dict[str, Any]) -> str:
    """The machine of a header in one line."""
    text = f"{known['device_name']}, torch {known['torch']}"
    threads = known["torch_threads"]
    return f"{text}, threads: {threads}" if known["device"] == "cpu" else text


def print_header(known: dict[str, Any], skipped: dict[str, str], console: Console) -> None:
    """Prints what a reader of the tables has to know."""
    ceilings = known["ceilings"]
    rates = [f"{rate(x, 'FLOP/s')} {name}" for name, x in ceilings["flops_per_second"].items()]
    products = f"{', '.join(rates)} ({ceilings['matmul_size']}³)"
    copied = rate(ceilings["bytes_per_second"], "B/s")
    table = Table.grid(padding=(0, 2, 0, 0))

    def line(name: str, text: str, style: str = "") -> None:
        table.add_row(Text(name, style=_DIM), Text(text, style=style))

    line("device", heading(known))
    line("ceilings", f"{products}, {copied} copied (read + written)")
    line("inputs", "random, so that neighbours share few selected blocks")
    if known["fa2_provider"] is not None:
        line("FA-2", f"from {known['fa2_provider']}")
    if known["settings"]:
        values = {k: int(x) if isinstance(x, bool) else x for k, x in known["settings"].items()}
        line("settings", " ".join(f"{flag}={x}" for flag, x in values.items()))
    for why in dict.fromkeys(skipped.values()):
        names = [name for name, reason in skipped.items() if reason == why]
        line("skipped", f"{', '.join(names)}: {why}", _DIM)
    console.print(table)
    console.print()
    console.print(Text(_LEGEND, style=_DIM))
    console.print()


def print_rows(rows: Iterable[Row], console: Console) -> None:
    """Prints a table for each group of rows."""
    for group in groups(rows):
        console.print(_table(group))
        for i, note in enumerate(_notes(group), 1):
            console.print(Text(f"  [{i}] {note}", style=_DIM))
        console.print()


def milliseconds(seconds: float) -> str:
    """Three digits that count."""
    value = seconds * 1e3
    digits = next((d for d, limit in ((3, 1), (2, 10), (1, 100)) if value < limit), 0)
    return f"{value:,.{digits}f}"


def rate(per_second: float, unit: str) -> str:
    """``102 GFLOP/s``, ``3.02 TB/s``."""
    prefix, size = next(
        ((p, s) for p, s in (("T", 1e12), ("G", 1e9)) if per_second >= s), ("M", 1e6)
    )
    return f"{per_second / size:.3g} {prefix}{unit}"


def _table(group: list[Row]) -> Table:
    table = Table(
        title=group[0].title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    columns: dict[str, Callable[[Row], Text]] = {"computed by": _computed_by}
    notes = _notes(group)
    for name in PASSES:
        columns[name] = partial(_time, name=name, notes=notes)
    dense = _fastest_dense(group)
    if dense:
        columns["× dense"] = partial(_ratio, dense=dense)
    if any(row.measured.peak_bytes is not None for row in group):
        columns["peak GiB"] = _peak
    columns["error/bound"] = _share
    table.add_column("branch", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="left" if name == "computed by" else "right", no_wrap=True)
    for length in dict.fromkeys(row.trial.length for row in group):
        rows = [row for row in group if row.trial.length == length]
        rows.sort(key=lambda row: _ORDER.get(row.branch, -1))
        table.add_section()
        table.add_row(Text(f"T = {length}", style="bold"))
        for branch, row in zip([None, *(row.branch for row in rows)], rows, strict=False):
            first = Text("" if row.branch == branch else row.branch)
            table.add_row(first, *(cell(row) for cell in columns.values()))
    return table


def _computed_by(row: Row) -> Text:
    if row.runs_on == row.backend:
        return Text(row.backend)
    return Text.assemble(row.backend, (f" → {row.runs_on}", _DIM))


def _time(row: Row, *, name: str, notes: list[str]) -> Text:
    """The time of a pass; in the first column also why there is none."""
    timing = getattr(row.measured, name)
    if row.note:
        text = OUT_OF_MEMORY
        if row.note != OUT_OF_MEMORY:
            text = f"no [{notes.index(row.note) + 1}]"
        return Text(text if name == PASSES[0] else "", style=_BAD)
    if timing is None:
        return Text("-", style=_DIM)
    spread = f"±{timing.spread:.0%}" if timing.spread < 10 else "±>999%"
    return Text.assemble(milliseconds(timing.median), (f" {spread:>4}", _DIM))


def _peak(row: Row) -> Text:
    peak = row.measured.peak_bytes
    return Text("-" if peak is None else f"{peak / GIB:.2f}")


def _share(row: Row) -> Text:
    known = row.parity is not None and math.isfinite(row.parity)
    return Text(f"{row.parity:.2f}" if known else "-")


def _notes(group: list[Row]) -> list[str]:
    """The reasons, once each, to stand below the table."""
    return list(dict.fromkeys(row.note for row in group if row.note not in ("", OUT_OF_MEMORY)))


def _fastest_dense(group: list[Row]) -> dict[int, float]:
    """Seconds of forward and backward, by T."""
    found: dict[int, float] = {}
    for row in group:
        both, T = row.measured.both, row.trial.length
        if row.branch == DENSE and both is not None:
            found[T] = min(both.median, found.get(T, math.inf))
    return found


def _ratio(row: Row, *, dense: dict[int, float]) -> Text:
    """How many times as fast as the fastest dense one, forward and backward together."""
    both, fastest = row.measured.both, dense.get(row.trial.length)
    if fastest is None or both is None or row.branch not in (*WHOLE, DENSE):
        return Text("")
    ratio = fastest / both.median
    return Text(f"{ratio:.2f}", style="green" if ratio > 1 else "")
