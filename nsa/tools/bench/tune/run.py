"""``bench --tune``: the best tiles for one problem on this GPU, as rows of the tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from rich.console import Console
from rich.text import Text

from nsa.backends.compiled.tiling import capability_of, sm
from nsa.core.build import build_once
from nsa.errors import BackendUnavailable
from nsa.tools.bench.cases import heads_label, make_data
from nsa.tools.bench.parity import backend_parity
from nsa.tools.bench.timing import Clock, measure
from nsa.tools.bench.tune.problem import Table, tables
from nsa.tools.bench.tune.report import print_found
from nsa.tools.bench.tune.search import Bench, Found, search
from nsa.tools.common.cli import fail
from nsa.tools.common.failures import failures, one_line
from nsa.tools.common.problems import Trial, short
from nsa.tools.common.progress import Bar


def tune(
    trials: Sequence[Trial],
    clock: Clock,
    console: Console,
    *,
    seconds: float,
    runs: int,
) -> int:
    """Tunes every table for each problem, which ``compiled`` can run, and prints what it found;
    returns the exit code."""

    def median(call: Callable[[], object], times: int) -> float:
        return measure(call, clock, seconds=times * seconds, runs=runs).median

    for trial in trials:
        bench = Bench(partial(build_side_by_side, trial), median)
        parity = backend_parity("compiled", trial)
        if parity.fault is not None:
            fail(f"--tune: today's tiles are wrong here, so that nothing was tuned: {parity.fault}")
            return 1
        with torch.no_grad():
            _tune_one(trial, bench, console)
    return 0


def _tune_one(trial: Trial, bench: Bench, console: Console) -> None:
    device, config = trial.device, trial.config
    capability, name = capability_of(device), torch.cuda.get_device_name(device)
    console.print(Text(f"{name} ({sm(capability)}), {heads_label(config)}, T = {trial.length}"))
    of_problem = tables(make_data(trial))
    for table in of_problem:
        console.print(Text(f"  {table.file}: tiles {table.row.measured}"))
    done: list[tuple[Table, list[Found]]] = []
    steps = 2 * sum(len(one.candidates) for table in of_problem for one in table.launches)
    try:
        with Bar(steps) as bar:

            def step(what: str) -> None:
                bar.show(description=what)
                bar.step()

            for table in of_problem:
                done.append((table, [Found(launch) for launch in table.launches]))
                search(done[-1][1], bench, step)
    finally:  # Ctrl-C keeps what was found
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}[trial.dtype]
        title = f"heads {heads_label(config)}, {short(trial.dtype)}, T = {trial.length}, {name}"
        measured = f"{name}, {dtype}, G {config.group}"
        print_found(done, title, measured, (capability, config.head_dim, config.dv), console)


def build_side_by_side(
    trial: Trial, jobs: Sequence[tuple[Hashable, Callable[[], object]]]
) -> Iterator[str]:
    """Builds the kernels of rehearsals, as many at once as there are cores; yields for each why it
    failed, or an empty string."""

    def build(job: tuple[Hashable, Callable[[], object]]) -> str:
        key, rehearse = job
        try:
            build_once((trial, key), trial.device, rehearse)
        except BackendUnavailable:  # not for the tiles
            raise
        except failures() as error:
            return one_line(error)
        return ""

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield from pool.map(build, jobs)
    finally:  # Ctrl-C does not wait for what has not begun
        pool.shutdown(wait=False, cancel_futures=True)
