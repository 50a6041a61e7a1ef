"""A diagnosis as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from nsa.backends.compiled.tiling import UNTUNED
from nsa.backends.fa2.providers import BROKEN, WORKS, WRONG, Report
from nsa.tools.common.machine import Machine
from nsa.tools.common.styles import BAD, DIM, GOOD, WARN, listed, table_of
from nsa.tools.diagnose.choices import BranchChoice, Choice
from nsa.tools.diagnose.compile.tables import compile_answer, compile_tables
from nsa.tools.diagnose.profile import BranchProfile
from nsa.tools.diagnose.ranks import DistributedReport
from nsa.tools.diagnose.report import BackendRow, Diagnosis, ParityResult
from nsa.tools.diagnose.tiles import TUNE, TileRow

_COMPILE_HINT = "torch.compile: --compile shows graphs, recompiles, caches and kernels"
_STATUS_STYLES = {WORKS: GOOD, BROKEN: BAD, WRONG: BAD}


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Print every table and the advice; last the verdict, or what is wrong and how to mend it."""
    # what is printed is data: no part of it is markup
    console = Console(markup=False, emoji=False, highlight=False)
    for part in _parts(diagnosis):
        console.print(part)


def _parts(diagnosis: Diagnosis) -> Iterator[RenderableType]:
    yield _machine(diagnosis.machine)
    yield _providers(diagnosis.providers)
    yield _settings(diagnosis)
    yield _backends(diagnosis.backends)
    yield _parity(diagnosis.parity)
    if diagnosis.choices:
        yield _choices(diagnosis.choices)
    if diagnosis.tiles:
        yield _tiles(diagnosis.tiles)
    yield _distributed(diagnosis.distributed)
    if diagnosis.profile is not None:
        yield _profile(diagnosis.profile)
    if diagnosis.compile is not None:
        yield from compile_tables(diagnosis.compile)
    if diagnosis.advice:
        yield listed("Advice", diagnosis.advice, WARN)
    yield _COMPILE_HINT if diagnosis.compile is None else compile_answer(diagnosis.compile)
    if diagnosis.choices:
        yield _fa2(diagnosis)
    if not diagnosis.problems:
        yield Text("Everything asked for works.", style=GOOD)
        return
    yield listed("Something is wrong:", diagnosis.problems, BAD)
    if diagnosis.way_out is not None:
        yield diagnosis.way_out


def _machine(machine: Machine) -> Table:
    table = table_of("Machine")
    memory = "?" if machine.memory_gib is None else f"{machine.memory_gib} GiB"
    rows = [
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
        code = "" if gpu.has_kernels else ", no code for it in this torch"
        rows.append(("gpu", f"{gpu.name}, capability {gpu.capability}, {gpu.memory_gib} GiB{code}"))
    if not machine.gpus:
        rows.append(("gpu", "none that torch sees"))
    for name, text in (*rows, *sorted(machine.variables.items())):
        table.add_row(Text(name, style=DIM), text)
    return table


def _providers(providers: Iterable[Report]) -> Table:
    table = table_of("FlashAttention-2", "provider", "version", "status", "detail")
    for report in providers:
        status = Text(report.status, style=_STATUS_STYLES.get(report.status, DIM))
        fix = f" (fix: {report.fix})" if report.fix is not None else ""
        table.add_row(report.name, report.version or "-", status, f"{report.detail}{fix}")
    return table


def _settings(diagnosis: Diagnosis) -> Table:
    table = table_of("Settings", "flag", "value", "source")
    for row in diagnosis.settings:
        style = DIM if row.source == "default" else ""
        table.add_row(row.flag, Text(_as_text(row.value), style), Text(row.source, style))
    return table


def _as_text(value: object) -> str:
    """A setting as it is written in the environment."""
    if value is None:
        return "unset"
    return str(int(value)) if isinstance(value, bool) else str(value)


def _backends(backends: Iterable[BackendRow]) -> Table:
    table = table_of("Backends", "backend", "here", "what it is", "what it cannot run, and why")
    for row in backends:
        here = Text("no", style=BAD if row.requested else DIM)
        if row.available:
            here = Text("available", style=GOOD)
        name = f"{row.name} (requested)" if row.requested else row.name
        table.add_row(name, here, row.summary, row.detail)
    return table


def _parity(results: Iterable[ParityResult]) -> Table:
    """A row for each run with the tensor nearest to its bound, and one for each that is past it."""
    title = "Forward and backward beside the oracle (worst tensor of each run)"
    table = table_of(title, "run", "passed", "tensor", "error", "bound")
    runs: dict[str, list[ParityResult]] = {}
    for result in results:
        shape = "packed" if result.packed else "regular"
        run = f"{result.backend}, {result.device}, {result.dtype}, {shape}"
        runs.setdefault(run, []).append(result)
    for run, rows in runs.items():
        failed = [row for row in rows if not row.ok]
        passed = Text(f"{len(rows) - len(failed)} of {len(rows)}", style=BAD if failed else GOOD)
        nearest = max(rows, key=lambda row: row.error / row.bound if row.bound > 0 else 0.0)
        for i, row in enumerate(failed or [nearest]):
            first = (run, passed) if i == 0 else ("", "")
            table.add_row(*first, row.tensor, f"{row.error:.2e}", f"{row.bound:.2e}")
    return table


def _choices(choices: Iterable[Choice]) -> Table:
    table = table_of("What runs here", "input", "branch", "backend", "provider")
    for choice in choices:
        length = Text(f"{choice.length:,} tokens", style=DIM)
        if choice.backend is None:
            kind = Text.assemble(choice.kind, "\n", length)
            table.add_row(kind, "every", Text("refused", style=BAD), choice.reason)
        first: list[RenderableType] = [choice.kind, length]
        for branch in choice.branches:
            backend = Text(branch.backend, style=GOOD if branch.fa2 else "")
            table.add_row(first.pop(0) if first else "", branch.branch, backend, _source(branch))
        if choice.branches:
            table.add_row("", Text("why", style=DIM), "", Text(choice.reason, style=DIM))
        table.add_section()
    return table


def _source(branch: BranchChoice) -> Text:
    if branch.provider is None:
        return Text(branch.why or "-", style=DIM)
    return Text(branch.provider if branch.fa2 else f"{branch.provider}: not FA-2, plain PyTorch")


def _distributed(report: DistributedReport) -> Table:
    title = "Several processes (--all-reduce under torchrun: do they meet?)"
    table = table_of(title)
    parallel = "data, tensor and context parallel"
    gpus = f"{report.gpus} GPU" + "s" * (report.gpus != 1)
    nccl = "absent: not in this torch" if report.nccl is None else f"{report.nccl}, {gpus}"
    if report.nccl is not None and report.gpus > 1:
        nccl += f": {parallel}"
    rows = (
        ("torch.distributed", "available" if report.available else "absent: not in this torch"),
        ("gloo (CPUs)", f"available: {parallel}" if report.gloo else "absent"),
        ("NCCL (GPUs)", nccl),
        ("peer access", report.peers),
    )
    for name, text in rows:
        table.add_row(Text(name, style=DIM), text)
    return table


def _tiles(rows: Iterable[TileRow]) -> Table:
    columns = ("gpu", "heads", "window, compressed", "selection", "selected")
    table = table_of("Where the tiles of compiled's kernels were measured, in bf16", *columns)
    untuned = [row for row in rows if not row.tuned]
    for row in rows:
        cells = (row.window_and_compressed, row.selection, row.selected)
        table.add_row(row.gpu, row.heads, *(Text(x, WARN if x == UNTUNED else "") for x in cells))
    if untuned:
        table.caption = f"{UNTUNED}: they run; {TUNE} {untuned[0].heads} finds faster ones"
        table.caption_justify = "left"
    return table


def _profile(profiles: Iterable[BranchProfile]) -> Table:
    """A row for each branch, then its kernels."""
    title = "Kernels of one forward and backward, random block lists"
    table = table_of(title, "kernel", "calls", "µs", "FA-2")
    for branch in profiles:
        source = f"{branch.backend}, {branch.provider}" if branch.provider else branch.backend
        name = Text(f"{branch.kind} {branch.branch}: {source}", style="bold")
        calls = sum(kernel.calls for kernel in branch.kernels)
        total = sum(kernel.microseconds for kernel in branch.kernels)
        ran = Text(f"ran: {branch.fa2_ran}", style=GOOD if branch.fa2_ran == "yes" else "")
        table.add_row(name, str(calls), f"{total:,.0f}", ran)
        for kernel in branch.kernels:
            cells = f"  {kernel.name}", str(kernel.calls), f"{kernel.microseconds:,.0f}"
            style = GOOD if kernel.fa2 else DIM
            table.add_row(*cells, "FA-2" if kernel.fa2 else "", style=style)
        table.add_section()
    return table


def _fa2(diagnosis: Diagnosis) -> str:
    """The answer to "is FlashAttention-2 really used?"."""
    if diagnosis.profile is not None:
        ran = [(row.kind, row.branch) for row in diagnosis.profile if row.fa2_ran == "yes"]
        return f"FA-2 ran: {f'yes, for {_by_kind(ran)}' if ran else 'no'}"
    chosen = [(choice.kind, row) for choice in diagnosis.choices for row in choice.branches]
    chosen = [(kind, row) for kind, row in chosen if row.fa2]
    if not chosen:
        return "FA-2 is used: no"
    sources = ", ".join(sorted({str(row.provider) for _, row in chosen}))
    where = _by_kind((kind, row.branch) for kind, row in chosen)
    return f"FA-2 is used: yes, {sources}, for {where}; --profile shows the kernels"


def _by_kind(branches: Iterable[tuple[str, str]]) -> str:
    """As in "regular bfloat16 (selected, window), packed bfloat16 (window)"."""
    names: dict[str, list[str]] = {}
    for kind, branch in branches:
        names.setdefault(kind, []).append(branch)
    return ", ".join(f"{kind} ({', '.join(found)})" for kind, found in names.items())
