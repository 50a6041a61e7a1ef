"""The run itself: every problem, every backend, every branch, one row each."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch

from nsa.backends import TABLE, unavailable
from nsa.settings import Settings
from nsa.tools.bench.baselines import Refusal, Refusing, Rival, dense_rivals
from nsa.tools.bench.cases import WHOLE, Data, Shape, Timed, make_data, timed_branch
from nsa.tools.bench.fla import NAME as FLA
from nsa.tools.bench.fla import find_fla, installed
from nsa.tools.bench.flops import Work, backward_work, forward_work
from nsa.tools.bench.parity import Parity, backend_parity, rival_parity
from nsa.tools.bench.plan import Plan
from nsa.tools.bench.rows import ANY, Row
from nsa.tools.bench.timing import Clock, Measurement, measure_passes
from nsa.tools.common.failures import OUT_OF_MEMORY, failures, one_line


class Listener(Protocol):
    """Is told what happens."""

    def doing(self, text: str) -> None:
        """This is measured next."""
        ...

    def row(self, row: Row) -> None:
        """A row is done."""
        ...

    def advance(self) -> None:
        """One backend or kernel is done with one problem: a step of :meth:`Runner.steps`."""
        ...


class Runner:
    """Measures a plan.

    Args:
        plan: what to measure.
        settings: in force while it runs.
        clock: of the plan's device.
    """

    def __init__(self, plan: Plan, settings: Settings, clock: Clock) -> None:
        self._plan, self._settings, self._clock = plan, settings, clock
        self._parities: dict[tuple[object, ...], Parity] = {}
        self.faults: list[str] = []
        """Why the exit code is 1."""
        self.skipped: dict[str, str] = {}
        """Backends that were not asked for and cannot run, and why."""
        self._rivals = self._find_rivals()
        self._backends = {shape: self._find_backends(shape) for shape in plan.shapes()}

    def steps(self) -> int:
        """How often the listener will be told to advance."""
        return sum(len(names) + len(self._rivals) for names in self._backends.values())

    def run(self, listener: Listener) -> None:
        """Measures everything."""
        for shape, names in self._backends.items():
            self._run_shape(shape, names, listener)
            if shape.device.type == "cuda":
                _free_memory()

    def _find_backends(self, shape: Shape) -> list[str]:
        if self._plan.backends:
            return [name for name in self._plan.backends if name in TABLE]
        names = []
        for name in TABLE:
            if name == "reference":  # for those who ask for it: it is quadratic
                continue
            why_not = unavailable(name, shape.problem, self._settings)
            if why_not is None and name == "compiled" and shape.device.type == "cpu":
                why_not = "compiles for minutes on a CPU; ask for it with --backends"
            if why_not is None:
                names.append(name)
            else:
                self.skipped.setdefault(name, why_not)
        return names

    def _find_rivals(self) -> list[Rival]:
        plan = self._plan
        found: list[Rival] = []
        wanted = plan.device.type == "cuda" and "selected" in plan.branches
        if FLA in plan.backends or (not plan.backends and wanted):
            if FLA not in plan.backends and installed() is None:
                self.skipped[FLA] = "not installed: pip install fla-core"
            else:
                try:
                    found.append(find_fla(plan.device))
                except Refusal as refusal:
                    found.append(Refusing(FLA, "selected", str(refusal)))
        if plan.dense:
            found += dense_rivals(plan.device, plan.sequences > 0, self._settings)
        return found

    def _run_shape(self, shape: Shape, names: list[str], listener: Listener) -> None:
        listener.doing(f"T = {shape.length}: inputs")
        data = self._make_data(shape)
        done: dict[tuple[str, str], Measurement] = {}
        for name in names:
            if isinstance(data, str):
                listener.row(_row(shape, name, ANY, note=data))
            else:
                self._run_backend(name, shape, data, done, listener)
            listener.advance()
        for rival in self._rivals:
            listener.doing(f"T = {shape.length}: {rival.name}")
            row = _row(shape, rival.name, rival.branch)
            if isinstance(data, str):
                row = replace(row, note=data)
            else:
                row = self._run_rival(rival, row, data)
            listener.row(row)
            listener.advance()

    def _make_data(self, shape: Shape) -> Data | str:
        """The inputs and their block list, or why there are none."""
        try:
            return make_data(shape)
        except failures() as error:
            note = one_line(error)
        _free_memory()  # not before the traceback is gone, which holds on to tensors
        if note != OUT_OF_MEMORY:
            note = f"inputs: {note}"
            self.faults.append(f"T = {shape.length}: {note}")
        return note

    def _run_backend(
        self,
        name: str,
        shape: Shape,
        data: Data,
        done: dict[tuple[str, str], Measurement],
        listener: Listener,
    ) -> None:
        """The rows of one backend; ``done`` has what runs on a backend that had its turn."""
        listener.doing(f"T = {shape.length}: {name}, parity")
        why_not = unavailable(name, shape.problem, self._settings)
        if why_not is not None:
            note = f"{name} was asked for and cannot run this: {why_not}"
            self.faults.append(note)
            listener.row(_row(shape, name, ANY, note=note))
            return
        resolution = shape.resolve(name, self._settings)
        parities = {}
        for other in dict.fromkeys((name, *resolution.per_branch.values())):
            parities[other] = self._parity(other, shape, partial(backend_parity, other, shape))
            if self._is_fault(other, parities[other]):
                note = f"{other}: {parities[other].fault}"
                worst = parities[other].worst
                listener.row(_row(shape, name, ANY, note=note, parity=worst))
                return
        for branch in self._plan.branches:
            listener.doing(f"T = {shape.length}: {name}, {branch}")
            if branch in WHOLE:
                runs_on, worst = name, max(parity.worst for parity in parities.values())
            else:
                runs_on = resolution.per_branch[branch]
                worst = parities[runs_on].worst
            row = _row(shape, name, branch, runs_on=runs_on, parity=worst)
            if (branch, runs_on) in done:
                row = replace(row, measured=done[branch, runs_on], work=_work(row))
            else:
                make = partial(timed_branch, branch, data, resolution, self._settings)
                row = self._attempt(row, make)
                if not row.note:
                    done[branch, runs_on] = row.measured
            listener.row(row)

    def _run_rival(self, rival: Rival, row: Row, data: Data) -> Row:
        """The row of one kernel; that it refuses is a fault only if it was asked for."""
        try:
            parity = self._parity(rival.name, row.shape, partial(rival_parity, rival, row.shape))
            row = replace(row, parity=parity.worst)
            if self._is_fault(rival.name, parity):
                return replace(row, note=f"{rival.name}: {parity.fault}")
            rival.tune()
            return self._attempt(row, partial(rival.timed, data.inputs))
        except Refusal as refusal:
            if rival.name in self._plan.backends:
                self.faults.append(str(refusal))
            return replace(row, note=str(refusal))

    def _parity(self, name: str, shape: Shape, check: Callable[[], Parity]) -> Parity:
        """Checked once for each head layout and dtype."""
        key = (name, shape.config, shape.dtype)
        if key not in self._parities:
            self._parities[key] = check()
        return self._parities[key]

    def _is_fault(self, name: str, parity: Parity) -> bool:
        if parity.fault is not None:
            self.faults.append(f"{name}: {parity.fault}")
        return parity.fault is not None

    def _attempt(self, row: Row, make: Callable[[], Timed]) -> Row:
        """The row with its numbers, or with what went wrong."""
        plan = self._plan
        try:
            measured = measure_passes(
                make(),
                self._clock,
                plan.device,
                seconds=plan.seconds,
                runs=plan.runs,
                passes=plan.passes,
            )
        except Refusal:
            raise
        except failures() as error:
            note = one_line(error)
        else:
            return replace(row, measured=measured, work=_work(row))
        _free_memory()
        if note != OUT_OF_MEMORY:
            note = f"{row.backend}, {row.branch}: {note}"
            self.faults.append(f"T = {row.shape.length}: {note}")
        return replace(row, note=note)


def _row(
    shape: Shape,
    backend: str,
    branch: str,
    *,
    runs_on: str | None = None,
    parity: float | None = None,
    note: str = "",
) -> Row:
    return Row(
        shape=shape,
        backend=backend,
        branch=branch,
        runs_on=backend if runs_on is None else runs_on,
        parity=parity,
        note=note,
    )


def _work(row: Row) -> tuple[Work, Work]:
    shape = row.shape
    given = (row.branch, shape.config, shape.lengths, shape.dtype.itemsize)
    return forward_work(*given), backward_work(*given)


def _free_memory() -> None:
    """Gives back what a failure or the last problem leaves to the allocator."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
