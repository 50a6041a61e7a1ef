"""``diagnose --compile`` as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from nsa.tools.common.styles import BAD, DIM, GOOD, WARN, listed, table_of
from nsa.tools.diagnose.compile.branches import BACKEND, BranchKernel
from nsa.tools.diagnose.compile.report import CompileReport
from nsa.tools.diagnose.compile.toolchain import Folder, Toolchain, Variable
from nsa.tools.diagnose.compile.trials import CONFIG, CompileTrial, lengths

CARRIED = "python -m nsa.tools.train --compile blocks --compile-cache FILE"
"""The command that takes compiled code from one run, or machine, to another."""


def compile_tables(report: CompileReport) -> Iterator[RenderableType]:
    """Every table of the report."""
    yield _toolchain(report.toolchain)
    if report.trials:
        yield _trials(report)
    if report.left_out:
        lines = [f"{name}: {why}" for name, why in report.left_out.items()]
        yield listed("Not compiled:", lines, DIM)
    if report.branches:
        yield _branches(report.branches)
    if report.branches_refused is not None:
        yield listed(f"No branches of {BACKEND}:", [report.branches_refused], DIM)
    yield _variables(report.variables)


def compile_answer(report: CompileReport) -> str:
    """The answer to "does torch.compile work?", in a line."""
    if not report.trials:
        return "torch.compile: nothing was compiled"
    good = sum(trial.ok for trial in report.trials)
    return (
        f"torch.compile: {good} of {len(report.trials)} without graph breaks or recompiles, "
        f"through {report.compiler}"
    )


def _toolchain(found: Toolchain) -> Table:
    table = table_of("torch.compile")
    off, refusal = (Text(f"no: {why}", style=BAD) for why in (found.off, found.refusal))
    rows: dict[str, RenderableType] = {
        "torch": found.torch,
        "triton": found.triton or "absent",
        "switched on": "yes" if found.off is None else off,
        "makes code": found.compiler if found.refusal is None else refusal,
        "caches": Text(found.caches, style=WARN if found.caches.startswith("off") else ""),
        "Inductor's cache": _folder(found.inductor_cache),
    }
    if found.triton_cache is not None:
        rows["Triton's cache"] = _folder(found.triton_cache)
    for name, text in (*rows.items(), ("carried over by", CARRIED)):
        table.add_row(Text(name, style=DIM), text)
    return table


def _folder(folder: Folder) -> RenderableType:
    if folder.path is None:
        return Text(folder.note, style=DIM)
    size = f"{folder.files:,} files, {folder.bytes / 2**20:,.1f} MiB" if folder.files else "empty"
    counted = size if folder.complete else f"more than {size}"
    return f"{folder.path}: {counted}{f' ({folder.note})' if folder.note else ''}"


def _trials(report: CompileReport) -> Table:
    title = f"A tiny model's loss as one graph, forward and backward ({report.compiler})"
    table = table_of(title, "backend", "input", "graphs", "breaks", "recompiles", "seconds")
    for column in table.columns[2:]:
        column.justify = "right"
    for trial in report.trials:
        table.add_row(trial.backend, trial.kind, *_counts(trial), f"{trial.seconds:,.1f}")
    warm_up, after = (_tokens(numbers) for numbers in lengths(CONFIG.nsa))
    table.caption = (
        f"warm-up: {warm_up} tokens, at most one graph each; after it: {after}, "
        "which must find theirs"
    )
    table.caption_justify = "left"
    return table


def _tokens(numbers: Iterable[int]) -> str:
    *first, last = (f"{number:,}" for number in numbers)
    return f"{', '.join(first)} and {last}"


def _counts(trial: CompileTrial) -> Iterator[Text]:
    def number(count: int) -> Text:
        return Text(str(count), style=BAD if count else GOOD)

    failed = trial.failure is not None
    yield Text(str(trial.graphs), style=BAD if failed else GOOD)
    yield Text("failed", style=BAD) if failed and not trial.breaks else number(len(trial.breaks))
    yield Text("-", style=DIM) if failed else number(len(trial.recompiles))


def _branches(branches: Iterable[BranchKernel]) -> Table:
    table = table_of(f"What the branches of {BACKEND} are", "input", "branch", "what runs")
    for (kind, length), rows in groupby(branches, lambda row: (row.kind, row.length)):
        first: list[RenderableType] = [kind, Text(f"{length:,} tokens", style=DIM)]
        for row in rows:
            table.add_row(first.pop(0) if first else "", row.branch, _what(row))
        table.add_section()
    return table


def _what(branch: BranchKernel) -> Text:
    style = {"dense": GOOD, "triton": GOOD, "failed": BAD}.get(branch.kernel, "")
    left = f"left to {branch.backend} {branch.why}: " if branch.backend != BACKEND else ""
    return Text(f"{left}{branch.detail}", style=style)


def _variables(variables: Iterable[Variable]) -> Table:
    table = table_of("Variables that show or change more", "variable", "now", "what it does")
    table.columns[0].no_wrap = True  # it is there to be copied
    for variable in variables:
        style = DIM if variable.value is None else WARN
        now = Text(variable.value or "unset", style=style)
        table.add_row(variable.assignment, now, variable.meaning)
    return table
