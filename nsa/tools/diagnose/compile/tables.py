"""``diagnose --compile`` as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from nsa.tools.common.styles import BAD, DIM, GOOD, WARN, listed, table_of
from nsa.tools.diagnose.compile.branches import BACKEND, BranchKernel
from nsa.tools.diagnose.compile.report import CompileReport
from nsa.tools.diagnose.compile.toolchain import Folder, Toolchain, Variable
from nsa.tools.diagnose.compile.trials import CONFIG, CompileTrial, lengths

CARRIED = "python -m nsa.tools.train --compile blocks --compile-cache FILE"
"""What takes compiled code from one run, or machine, to another."""


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


def compile_answer(report: CompileReport) -> Text:
    """The answer to "does torch.compile work?", in a line."""
    if not report.trials:
        return Text("torch.compile: nothing was compiled")
    good = sum(trial.ok for trial in report.trials)
    return Text(
        f"torch.compile: {good} of {len(report.trials)} without graph breaks or recompiles, "
        f"through {report.compiler}"
    )


def _toolchain(found: Toolchain) -> Table:
    table = table_of("torch.compile")
    makes = (
        Text(found.compiler) if found.refusal is None else Text(f"no: {found.refusal}", style=BAD)
    )
    rows = [
        ("torch", Text(found.torch)),
        ("triton", Text(found.triton or "absent")),
        ("switched on", Text("yes") if found.off is None else Text(f"no: {found.off}", style=BAD)),
        ("makes code", makes),
        ("caches", Text(found.caches, style=WARN if found.caches.startswith("off") else "")),
        ("Inductor's cache", _folder(found.inductor_cache)),
    ]
    if found.triton_cache is not None:
        rows.append(("Triton's cache", _folder(found.triton_cache)))
    rows.append(("carried over by", Text(CARRIED)))
    for name, text in rows:
        table.add_row(Text(name, style=DIM), text)
    return table


def _folder(folder: Folder) -> Text:
    if folder.path is None:
        return Text(folder.note, style=DIM)
    size = f"{folder.files:,} files, {folder.bytes / 2**20:,.1f} MiB" if folder.files else "empty"
    counted = size if folder.complete else f"more than {size}"
    note = f" ({folder.note})" if folder.note else ""
    return Text(f"{folder.path}: {counted}{note}")


def _trials(report: CompileReport) -> Table:
    warm_up, after = lengths(CONFIG.nsa)
    title = f"A tiny model's loss as one graph, forward and backward ({report.compiler})"
    table = table_of(title, "backend", "input", "graphs", "breaks", "recompiles", "seconds")
    for column in table.columns[2:]:
        column.justify = "right"
    for trial in report.trials:
        table.add_row(trial.backend, trial.kind, *_counts(trial), f"{trial.seconds:,.1f}")
    table.caption = (
        f"warm-up: {_tokens(warm_up)} tokens, at most one graph each; after it: {_tokens(after)}, "
        "which must find theirs"
    )
    table.caption_justify = "left"
    return table


def _tokens(numbers: Iterable[int]) -> str:
    *first, last = (f"{number:,}" for number in numbers)
    return f"{', '.join(first)} and {last}"


def _counts(trial: CompileTrial) -> Iterator[Text]:
    yield Text(str(trial.graphs), style=BAD if trial.failure else GOOD)
    breaks, recompiles = len(trial.breaks), len(trial.recompiles)
    if trial.failure is not None and not breaks:
        yield Text("failed", style=BAD)
    else:
        yield Text(str(breaks), style=BAD if breaks else GOOD)
    if trial.failure is not None:
        yield Text("-", style=DIM)
    else:
        yield Text(str(recompiles), style=BAD if recompiles else GOOD)


def _branches(branches: Iterable[BranchKernel]) -> Table:
    table = table_of(f"What the branches of {BACKEND} are", "input", "branch", "what runs")
    before: tuple[str, int] | None = None
    row = 0
    for branch in branches:
        this = branch.kind, branch.length
        if this != before:
            table.add_section()
            before, row = this, 0
        first = (branch.kind, f"{branch.length:,} tokens", "", "")[row]
        table.add_row(Text(first, style=DIM if row else ""), branch.branch, _what(branch))
        row += 1
    return table


def _what(branch: BranchKernel) -> Text:
    style = {"dense": GOOD, "triton": GOOD, "failed": BAD}.get(branch.kernel, "")
    left = f"left to {branch.backend} {branch.why}: " if branch.backend != BACKEND else ""
    return Text(f"{left}{branch.detail}", style=style)


def _variables(variables: Iterable[Variable]) -> Table:
    table = table_of("Variables that show or change more", "variable", "now", "what it does")
    table.columns[0].no_wrap = True  # it is there to be copied
    for variable in variables:
        now = Text("unset", style=DIM) if variable.value is None else Text(variable.value)
        if variable.value is not None:
            now.stylize(WARN)
        table.add_row(Text(variable.assignment), now, Text(variable.meaning))
    return table
