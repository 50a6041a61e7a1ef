"""The run itself: every problem, every backend, every branch, one row each."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from nsa.backends import TABLE, unavailable
from nsa.settings import Settings
from nsa.tools.bench.baselines import Baseline, Unsupported, dense_baselines, unsupported
from nsa.tools.bench.cases import WHOLE, Data, Timed, make_data, timed_branch
from nsa.tools.bench.flags import Plan
from nsa.tools.bench.parity import Parity, backend_parity, baseline_parity
from nsa.tools.bench.peers import PEERS, find_peer, how_to_install, installed
from nsa.tools.bench.rows import ANY, Row
from nsa.tools.bench.timing import PASSES, Clock, Measurement, measure_passes
from nsa.tools.bench.work import work
from nsa.tools.common.failures import OUT_OF_MEMORY, failures, one_line
from nsa.tools.common.problems import Trial
from nsa.training.memory import memory_bytes

_Result = TypeVar("_Result")


class Runner:
    """Measures a plan, under the settings in force and with the clock of its device."""

    def __init__(self, plan: Plan, settings: Settings, clock: Clock) -> None:
        self._plan, self._settings, self._clock = plan, settings, clock
        self._parities: dict[tuple[object, ...], Parity] = {}
        self.faults: list[str] = []
        """Why the exit code is 1."""
        self.skipped: dict[str, str] = {}
        """Backends that were not requested and cannot run, and why."""
        self._baselines = self._find_baselines()
        self._backends = {trial: self._find_backends(trial) for trial in plan.trials}
        self.steps = sum(len(names) + len(self._baselines) for names in self._backends.values())
        """Pairs of a problem and a backend or baseline."""
        self.done = 0
        """How many of them are measured."""

    def rows(self, doing: Callable[[str], None]) -> Iterator[Row]:
        """Measures everything; ``doing`` is told what is measured next."""
        for trial, names in self._backends.items():

            def say(text: str, T: int = trial.length) -> None:
                doing(f"T = {T}: {text}")

            say("inputs")
            data = self._try(trial, "inputs", partial(_data_that_fits, trial))
            measured: dict[tuple[str, str], Measurement] = {}
            for name in names:
                if isinstance(data, str):
                    yield Row(trial=trial, backend=name, branch=ANY, runs_on=name, note=data)
                else:
                    yield from self._backend_rows(name, trial, data, measured, say)
                self.done += 1
            for baseline in self._baselines:
                say(baseline.name)
                name = baseline.name
                row = Row(trial=trial, backend=name, branch=baseline.branch, runs_on=name)
                if isinstance(data, str):
                    yield replace(row, note=data)
                else:
                    yield self._baseline_row(baseline, row, data)
                self.done += 1
            if trial.device.type == "cuda":
                del data
                _free_memory()

    def _find_backends(self, trial: Trial) -> list[str]:
        if self._plan.backends:
            return [name for name in self._plan.backends if name in TABLE]
        names = []
        for name in TABLE:
            if name == "reference":  # for those who request it: it is quadratic
                continue
            why_not = unavailable(name, trial.problem, self._settings)
            if why_not is None and TABLE[name].compiles_glue and trial.device.type == "cpu":
                why_not = "compiles for minutes on a CPU; ask for it with --backends"
            if why_not is None:
                names.append(name)
            else:
                self.skipped.setdefault(name, why_not)
        return names

    def _find_baselines(self) -> list[Baseline]:
        plan = self._plan
        found: list[Baseline] = []
        for name, peer in PEERS.items():
            branches = [branch for branch in peer.branches if branch in plan.branches]
            requested = name in plan.backends
            wanted = requested or (not plan.backends and plan.device.type == "cuda")
            if not wanted or not branches:
                continue
            if not requested and installed(name) is None:
                self.skipped[name] = f"not installed: {how_to_install(name)}"
                continue
            try:
                kernels = find_peer(name, plan.device)
                found += [kernels[branch] for branch in branches]
            except Unsupported as reason:
                found += [unsupported(name, branch, str(reason)) for branch in branches]
        if not plan.find_min_len:
            found += dense_baselines(plan.device, plan.trials[0].packed, self._settings)
        return found

    def _backend_rows(
        self,
        name: str,
        trial: Trial,
        data: Data,
        measured: dict[tuple[str, str], Measurement],
        say: Callable[[str], None],
    ) -> Iterator[Row]:
        """The rows of one backend; ``measured`` has what runs on a backend that had its turn."""
        say(f"{name}, parity")
        refused = Row(trial=trial, backend=name, branch=ANY, runs_on=name)
        why_not = unavailable(name, trial.problem, self._settings)
        if why_not is not None:
            note = f"{name} was asked for and cannot run this: {why_not}"
            self.faults.append(note)
            yield replace(refused, note=note)
            return
        resolution = trial.resolve(name, self._settings)
        parities = {}
        for other in dict.fromkeys((name, *resolution.per_branch.values())):
            parity = self._parity(other, trial, partial(backend_parity, other, trial))
            if parity.fault is not None:
                yield replace(refused, note=self._fault(other, parity), parity=parity.worst)
                return
            parities[other] = parity.worst
        for branch in self._plan.branches:
            say(f"{name}, {branch}")
            runs_on = name if branch in WHOLE else resolution.per_branch[branch]
            worst = max(parities.values()) if branch in WHOLE else parities[runs_on]
            row = Row(trial=trial, backend=name, branch=branch, runs_on=runs_on, parity=worst)
            if (branch, runs_on) in measured:
                row = replace(row, measured=measured[branch, runs_on])
            else:
                make = partial(timed_branch, branch, data, resolution, self._settings)
                row = self._measured(row, make)
                if not row.note:
                    measured[branch, runs_on] = row.measured
            yield row

    def _baseline_row(self, baseline: Baseline, row: Row, data: Data) -> Row:
        """The row of one kernel; that it refuses is a fault only if it was requested."""
        name = baseline.name
        try:
            check = partial(baseline_parity, baseline, row.trial)
            parity = self._parity(f"{name}, {row.branch}", row.trial, check)
            row = replace(row, parity=parity.worst)
            if parity.fault is not None:
                return replace(row, note=self._fault(name, parity))
            baseline.tune()
            return self._measured(row, partial(baseline.timed, data.inputs))
        except Unsupported as reason:
            if name in self._plan.backends:
                self.faults.append(str(reason))
            return replace(row, note=str(reason))

    def _parity(self, name: str, trial: Trial, check: Callable[[], Parity]) -> Parity:
        """Checked once for each head layout and dtype."""
        key = (name, trial.config, trial.dtype)
        if key not in self._parities:
            self._parities[key] = check()
        return self._parities[key]

    def _fault(self, name: str, parity: Parity) -> str:
        self.faults.append(f"{name}: {parity.fault}")
        return self.faults[-1]

    def _measured(self, row: Row, make: Callable[[], Timed]) -> Row:
        """The row with its numbers, or with what went wrong."""
        plan = self._plan

        def measure() -> Measurement:
            return measure_passes(
                make(),
                self._clock,
                plan.device,
                seconds=plan.seconds,
                runs=plan.runs,
                passes=("both",) if plan.find_min_len else PASSES,
            )

        found = self._try(row.trial, f"{row.backend}, {row.branch}", measure)
        return replace(row, note=found) if isinstance(found, str) else replace(row, measured=found)

    def _try(self, trial: Trial, what: str, call: Callable[[], _Result]) -> _Result | str:
        """What the call returns, or why it fails; a lack of memory is no fault."""
        try:
            return call()
        except Unsupported:
            raise
        except failures() as error:
            note = one_line(error)
        _free_memory()  # not before the traceback is gone, which holds on to tensors
        if note != OUT_OF_MEMORY:
            note = f"{what}: {note}"
            self.faults.append(f"T = {trial.length}: {note}")
        return note


def _data_that_fits(trial: Trial) -> Data:
    """The data of a problem; a CPU would end the process in place of saying that it is full."""
    if trial.device.type == "cpu" and work("all", trial)[0].bytes > memory_bytes():
        raise MemoryError
    return make_data(trial)


def _free_memory() -> None:
    """Gives back what a failure or the last problem leaves to the allocator."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
