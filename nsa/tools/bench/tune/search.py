"""The search for one table's tiles: build, compare with today's result, time, choose.

A *launch* is what has tiles of its own: one kernel, or one that serves several branches. Candidates
of several launches may have to agree in a *group*, such as the rows that a table says once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa.errors import BackendUnavailable
from nsa.tools.common.failures import failures, one_line

MARGIN = 0.02
"""A candidate has to be so much faster than today's tiles, as a share of their time."""
FINALISTS = 3
"""Candidates of a launch that are timed again, with today's tiles beside them."""
CAREFUL = 3
"""Times as many runs."""
LIMITS = {torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""By how much a row of a result may differ between two tilings, as a share of its norm and of the
mean norm: some times what rounding to so few bits comes to."""
FP32_LIMIT = 2e-3
"""The same of what is in fp32: sums of products of 16 bits, in another order."""
LISTS_LIMIT = 0.01
"""The share of block lists that may differ: those of near-ties, which rounding decides."""


class Candidate(NamedTuple):
    """Tiles to try, and what the table then says."""

    tiles: Any
    """Of the launch."""
    entry: dict[str, Any]
    """Fields of the table's row."""
    group: Hashable = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What has tiles of its own."""

    name: str
    call: Callable[[Any], tuple[Tensor, ...]]
    """Runs it with tiles; returns what it computes."""
    rehearse: Callable[[Any], object]
    """The same on meta tensors, for its kernels to be built."""
    candidates: tuple[Candidate, ...]
    """Today's first."""
    counts: bool = True
    """Whether a training step has it, so that its time counts when a group is chosen."""


@dataclass(slots=True)
class Trial:
    """What came of a candidate."""

    candidate: Candidate
    seconds: float = math.inf
    note: str = ""
    """Why it was not timed."""


@dataclass(slots=True)
class Found:
    """What came of a launch, as far as it went."""

    launch: Launch
    trials: list[Trial] = field(default_factory=list)
    """Today's first."""
    complete: bool = False

    @property
    def today(self) -> Trial:
        return self.trials[0]

    def best(self, group: Hashable) -> Trial | None:
        """The fastest of a group; today's tiles unless it beats them by the margin."""
        timed = [x for x in self.trials if x.candidate.group == group and x.seconds < math.inf]
        if not timed:
            return None
        fastest = min(timed, key=lambda trial: trial.seconds)
        same = self.launch.candidates[0].group == group
        close = fastest.seconds > (1 - MARGIN) * self.today.seconds
        return self.today if same and close else fastest


class Bench(NamedTuple):
    """What a search needs of the machine."""

    build: Callable[[Sequence[tuple[Hashable, Callable[[], object]]]], Iterator[str]]
    """Builds the kernels of rehearsals, each with a key, side by side; yields for each why it
    failed, or an empty string."""
    seconds: Callable[[Callable[[], object], int], float]
    """Of a call, alone; so many times as carefully as usual."""


def search(found: list[Found], bench: Bench, step: Callable[[str], None]) -> None:
    """Fills ``found``, those of one table; what is there when it is interrupted can be used.

    ``step`` is told what was done: twice for each candidate, when it is built and when it is timed.
    """
    for one in found:
        _search_launch(one, bench, step)
    group = choose_group(found)
    for one in found:
        again = [one.today]
        timed = sorted(one.trials[1:], key=lambda trial: trial.seconds)
        again += [x for x in timed if x.candidate.group == group and x.seconds < math.inf]
        for trial in again[: FINALISTS + 1] if len(again) > 1 else ():
            call = partial(one.launch.call, trial.candidate.tiles)
            trial.seconds = bench.seconds(call, CAREFUL)


def choose_group(found: Sequence[Found]) -> Hashable:
    """The group with the least time of all launches that count, by the margin; today's else."""
    today = found[0].launch.candidates[0].group
    if not all(one.complete for one in found):
        return today
    totals = {}
    for group in dict.fromkeys(trial.candidate.group for trial in found[0].trials):
        best = [one.best(group) for one in found]
        if None not in best:
            totals[group] = sum(
                trial.seconds
                for trial, one in zip(best, found, strict=True)
                if trial is not None and one.launch.counts
            )
    fastest = min(totals, key=lambda group: totals[group])
    return today if totals[fastest] > (1 - MARGIN) * totals[today] else fastest


def _search_launch(found: Found, bench: Bench, step: Callable[[str], None]) -> None:
    launch = found.launch
    today, *others = launch.candidates

    def rehearsal(candidate: Candidate) -> tuple[Hashable, Callable[[], object]]:
        return (launch.name, candidate.tiles), partial(launch.rehearse, candidate.tiles)

    def timed(candidate: Candidate) -> float:
        return bench.seconds(partial(launch.call, candidate.tiles), 1)

    # alone, so that what all candidates launch besides is built once
    notes = [*bench.build([rehearsal(today)])]
    if notes[0]:
        raise BackendUnavailable(
            f"--tune: expected today's tiles to build, got {notes[0]} "
            f"({launch.name}, {today.tiles})"
        )
    step(launch.name)
    for note in bench.build([rehearsal(other) for other in others]):
        notes.append(note)
        step(launch.name)
    want = launch.call(today.tiles)
    found.trials.append(Trial(today, timed(today)))
    step(launch.name)
    for candidate, note in zip(others, notes[1:], strict=True):
        trial = Trial(candidate, note=note)
        if not note:
            try:
                trial.note = fault(launch.call(candidate.tiles), want)
                if not trial.note:
                    trial.seconds = timed(candidate)
            except failures() as error:
                trial.note = one_line(error)
        found.trials.append(trial)
        step(launch.name)
    found.complete = True


def fault(results: Sequence[Tensor], want: Sequence[Tensor]) -> str:
    """What is wrong with a candidate's results beside today's; empty if nothing is.

    Rows are compared one by one: a few wrong ones among thousands would not be seen in a norm.
    """
    for i, (x, y) in enumerate(zip(results, want, strict=True)):
        if not x.is_floating_point():
            share = (x != y).any(-1).float().mean().item()
            if share > LISTS_LIMIT:
                return f"computes something else: {share:.1%} of the lists differ"
            continue
        a, b = x.float(), y.float()
        if not torch.equal(a.isfinite(), b.isfinite()):
            return f"computes something else: result {i} is not finite where today's is, or it is"
        a, b = (z.nan_to_num(0.0, 0.0, 0.0) for z in (a, b))
        norms = b.norm(dim=-1)
        allowed = norms + norms.square().mean().sqrt()
        error = ((a - b).norm(dim=-1) / allowed.clamp_min(1e-30)).max().item()
        limit = LIMITS.get(x.dtype, FP32_LIMIT)
        if not error <= limit:
            return f"computes something else: result {i} is off by {error:.1e}"
    return ""
