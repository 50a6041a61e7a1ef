"""A diagnosis as tables for people."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nsa.tools._diagnosis import Diagnosis, ParityResult
from nsa.tools._flash_attn import BROKEN, WORKS, WRONG, Provider
from nsa.tools._machine import Machine

_GOOD, _BAD, _DIM = "green", "bold red", "dim"


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Prints every table, the advice, and a verdict."""
    console.print(_machine(diagnosis.machine))
    console.print(_providers(diagnosis.providers))
    console.print(_settings(diagnosis))
    console.print(_backends(diagnosis))
    console.print(_parity(diagnosis.parity))
    for title, lines, style in (
        ("Advice", diagnosis.advice, "yellow"),
        ("Problems", diagnosis.problems, _BAD),
    ):
        if lines:
            console.print(Text(title, style=style))
            for line in lines:
                console.print(Text(f"  - {line}"))
    if diagnosis.choice is not None:
        console.print(Text(f"What runs here: {diagnosis.choice}"))
    verdict = "Everything asked for works." if not diagnosis.problems else "Something is wrong."
    console.print(Text(verdict, style=_BAD if diagnosis.problems else _GOOD))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=bool(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _machine(machine: Machine) -> Table:
    table = _table("Machine")
    memory = "?" if machine.memory_gib is None else f"{machine.memory_gib} GiB"
    rows: list[tuple[str, str]] = [
        ("system", machine.os),
        ("cpu", f"{machine.cpu}, {machine.cores} cores, {memory}"),
        ("python", machine.python),
        ("nsa", machine.nsa),
        ("torch", f"{machine.torch}, {machine.torch_threads} threads"),
        ("numpy", machine.numpy or "absent"),
        ("triton", machine.triton or "absent"),
        ("CUDA runtime", machine.cuda_runtime or "none: a CPU-only torch"),
        ("NVIDIA driver", machine.cuda_driver or "none found"),
    ]
    for gpu in machine.gpus:
        kernels = "" if gpu.has_kernels else ", no code for it in this torch"
        rows.append(
            ("gpu", f"{gpu.name}, capability {gpu.capability}, {gpu.memory_gib} GiB{kernels}")
        )
    if not machine.gpus:
        rows.append(("gpu", "none that torch sees"))
    rows += sorted(machine.variables.items())
    for name, text in rows:
        table.add_row(Text(name, style=_DIM), Text(text))
    return table


def _providers(providers: Iterable[Provider]) -> Table:
    table = _table("FlashAttention-2", "provider", "version", "status", "detail")
    for provider in providers:
        style = {WORKS: _GOOD, BROKEN: _BAD, WRONG: _BAD}.get(provider.status, _DIM)
        table.add_row(
            provider.name,
            Text(provider.version or "-"),
            Text(provider.status, style=style),
            Text(provider.detail),
        )
    return table


def _settings(diagnosis: Diagnosis) -> Table:
    table = _table("Settings", "flag", "value", "source")
    for row in diagnosis.settings:
        style = _DIM if row.source == "default" else ""
        table.add_row(
            Text(row.flag), Text(_as_text(row.value), style=style), Text(row.source, style=style)
        )
    return table


def _as_text(value: object) -> str:
    """A setting as it is written in the environment."""
    if value is None:
        return "unset"
    return str(int(value)) if isinstance(value, bool) else str(value)


def _backends(diagnosis: Diagnosis) -> Table:
    table = _table("Backends", "backend", "here", "what it is", "what it cannot run, and why")
    for row in diagnosis.backends:
        name = Text(f"{row.name} (requested)" if row.requested else row.name)
        here = Text("available", style=_GOOD) if row.available else Text("no", style=_DIM)
        if row.requested and not row.available:
            here = Text("no", style=_BAD)
        table.add_row(name, here, Text(row.summary), Text(row.detail))
    return table


def _parity(results: Iterable[ParityResult]) -> Table:
    """A row for each run with the tensor nearest to its bound, and one for each that is past it."""
    title = "Forward and backward beside the oracle (worst tensor of each run)"
    table = _table(title, "run", "passed", "tensor", "error", "bound")
    runs: dict[str, list[ParityResult]] = {}
    for result in results:
        shape = "packed" if result.packed else "regular"
        run = f"{result.backend}, {result.device}, {result.dtype}, {shape}"
        runs.setdefault(run, []).append(result)
    for run, rows in runs.items():
        failed = [row for row in rows if not row.ok]
        passed = Text(f"{len(rows) - len(failed)} of {len(rows)}", style=_BAD if failed else _GOOD)
        for i, row in enumerate(failed or [max(rows, key=_closeness)]):
            first = (run, passed) if i == 0 else ("", "")
            table.add_row(*first, row.tensor, f"{row.error:.2e}", f"{row.bound:.2e}")
    return table


def _closeness(row: ParityResult) -> float:
    return row.error / row.bound if row.bound > 0 else 0.0
