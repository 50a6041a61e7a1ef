"""Which kernels ran: ``diagnose --profile``.

A backend's name says what was meant to run; the profiler says what did.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile

from nsa.backends import load
from nsa.backends.protocol import Backend, Gated
from nsa.errors import UsageError
from nsa.testing.inputs import Inputs
from nsa.tools.common.failures import failures, one_line
from nsa.tools.common.problems import Trial, run_branch
from nsa.tools.diagnose.choices import BranchChoice, Choice

GATED = "gated sum"
"""Not a step: where one backend runs every branch it may have a way to run them at once
(:class:`nsa.backends.protocol.Gated`), and then a call runs this after its first two steps."""
FA2_KERNELS = {"forward": "flash_fwd", "backward": "flash_bwd"}
"""What the names of FlashAttention-2's kernels hold, whoever built them; FA-3's do not."""
_NO_KERNEL = ("Memset", "Memcpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One kernel of a branch, every instance of its template together."""

    name: str
    calls: int
    microseconds: float
    """Of all calls."""
    fa2: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchProfile:
    """The kernels of one forward and backward of a branch."""

    kind: str
    branch: str
    backend: str
    provider: str | None
    fa2_ran: str
    """"yes", "no", "forward only" or "backward only"."""
    kernels: tuple[Kernel, ...]
    """Those that took longest first."""


def check_profile_device(device: torch.device) -> None:
    """Raise :class:`UsageError` where there is nothing to profile."""
    if device.type != "cuda":
        here = "" if torch.cuda.is_available() else ", and torch sees none here"
        raise UsageError(f"--profile: expected a CUDA device, got {device.type}{here}")


def profile_choice(choice: Choice, trial: Trial) -> tuple[list[BranchProfile], list[str]]:
    """Run every branch of a choice, and hold those that claim FA-2 to what ran."""
    inputs = trial.inputs()
    profiles, problems = [], []
    for branch in (*choice.branches, *_gated(choice)):
        call = _call(load(branch.backend), branch.branch, inputs)
        where = f"profile, {choice.kind}: {branch.branch}"
        try:
            kernels = summarise(kernels_of(call, trial.device))
        except failures() as failure:
            problems.append(f"{where} failed: {one_line(failure)}")
            continue
        found = BranchProfile(
            kind=choice.kind,
            branch=branch.branch,
            backend=branch.backend,
            provider=branch.provider,
            fa2_ran=_fa2_ran(kernels),
            kernels=kernels,
        )
        profiles.append(found)
        if not kernels:
            problems.append(
                f"{where} showed no kernel at all: the profiler cannot see them (is another one at "
                "work?)"
            )
        elif branch.fa2 and found.fa2_ran != "yes":
            problems.append(
                f"{where} claims FlashAttention-2 ({branch.backend}, {branch.provider}), and its "
                f"kernels ran: {found.fa2_ran}"
            )
    return profiles, problems


def _gated(choice: Choice) -> Iterator[BranchChoice]:
    """The row of :data:`GATED`, if there is one."""
    attention = [branch for branch in choice.branches if branch.branch != "select"]
    one_backend = len({branch.backend for branch in attention}) == 1
    if one_backend and hasattr(load(attention[0].backend), "gated_attention"):
        yield replace(attention[0], branch=GATED)


def kernels_of(call: Callable[[], object], device: torch.device) -> EventList:
    """Profile the second run of a call."""
    call()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        call()
        torch.cuda.synchronize(device)
    return trace.events() or EventList()


def summarise(events: EventList) -> tuple[Kernel, ...]:
    """Kernels by their short names, those that took longest first."""
    for event in events:
        if not event.name.startswith(_NO_KERNEL):
            event.name = short_name(event.name)  # what key_averages groups by
    kernels = [
        Kernel(
            name=event.key,
            calls=event.count,
            microseconds=round(event.device_time_total, 1),
            fa2=any(part in event.key for part in FA2_KERNELS.values()),
        )
        for event in events.key_averages()
        if event.device_type.name == "CUDA" and not event.key.startswith(_NO_KERNEL)
    ]
    return tuple(sorted(kernels, key=lambda kernel: -kernel.microseconds))


def short_name(full: str) -> str:
    """A kernel's name without template arguments, parameters and return type."""
    name, before = full, ""
    while name != before:  # the innermost brackets first
        name, before = re.sub(r"<[^<>()]*>|\([^<>()]*\)", "", name), name
    parts = re.sub(r"(::)+", "::", name).split()
    return parts[-1] if parts else full


def _call(steps: Backend, branch: str, inputs: Inputs) -> Callable[[], object]:
    """Forward and backward of a branch; selection has no backward."""
    if branch == "select":
        return torch.no_grad()(partial(run_branch, steps, branch, inputs))
    if branch == GATED:  # the compressed branch's forward comes before it
        with torch.no_grad():
            before = run_branch(steps, "compressed", inputs)
        given = (inputs.record, *before, inputs.block_idx, inputs.config)
        gated, leaves = cast(Gated, steps).gated_attention, inputs.leaves()
        return lambda: torch.autograd.grad(gated(*given), leaves, inputs.dout)

    def attend() -> object:
        out, _ = run_branch(steps, branch, inputs)
        return torch.autograd.grad(out, (inputs.q, *getattr(inputs, branch)), inputs.dout)

    return attend


def _fa2_ran(kernels: tuple[Kernel, ...]) -> str:
    ran = [
        direction
        for direction, part in FA2_KERNELS.items()
        if any(part in kernel.name for kernel in kernels)
    ]
    if len(ran) == len(FA2_KERNELS):
        return "yes"
    return f"{ran[0]} only" if ran else "no"
