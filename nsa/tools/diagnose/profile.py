"""Which kernels ran: ``diagnose --profile``.

A backend's name says what was meant to run; the profiler says what did.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch.profiler import ProfilerActivity, profile

from nsa.backends import load
from nsa.backends.protocol import Backend, Gated
from nsa.errors import UsageError
from nsa.testing.inputs import Inputs
from nsa.tools.common.failures import failures, one_line
from nsa.tools.common.problems import Trial
from nsa.tools.diagnose.choices import BranchChoice, Choice

GATED = "gated sum"
"""Not a step: where one backend runs every branch it may have a way to run them at once
(:class:`nsa.backends.protocol.Gated`), and then a call runs this after its first two steps."""
_FORWARD, _BACKWARD = "flash_fwd", "flash_bwd"
"""What FlashAttention-2's kernels are called by, whoever built them; FA-3's are not."""


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
    """What ran in one forward and backward of a branch."""

    kind: str
    branch: str
    backend: str
    provider: str | None
    fa2_ran: str
    """"yes", "no", "forward only" or "backward only"."""
    kernels: tuple[Kernel, ...]
    """Those that took longest first."""


def check_profile_device(device: torch.device) -> None:
    """Raises :class:`UsageError` where there is nothing to profile."""
    if device.type != "cuda":
        here = "" if torch.cuda.is_available() else ", and torch sees none here"
        raise UsageError(f"--profile: expected a CUDA device, got {device.type}{here}")


def profile_choice(choice: Choice, trial: Trial) -> tuple[list[BranchProfile], list[str]]:
    """Runs every branch of a choice, and holds those that claim FA-2 to what ran."""
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
        ran = _fa2_ran(kernels)
        profiles.append(
            BranchProfile(
                kind=choice.kind,
                branch=branch.branch,
                backend=branch.backend,
                provider=branch.provider,
                fa2_ran=ran,
                kernels=kernels,
            )
        )
        problems += [f"{where} {fault}" for fault in _faults(branch, kernels, ran)]
    return profiles, problems


def _gated(choice: Choice) -> list[BranchChoice]:
    """The row of :data:`GATED`, if there is one."""
    attention = [branch for branch in choice.branches if branch.branch != "select"]
    names = {branch.backend for branch in attention}
    if len(names) > 1 or not hasattr(load(attention[0].backend), "gated_attention"):
        return []
    return [replace(attention[0], branch=GATED)]


def kernels_of(call: Callable[[], object], device: torch.device) -> list[tuple[str, float]]:
    """Name and microseconds of every kernel that a call launches, its second time."""
    call()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        call()
        torch.cuda.synchronize(device)
    return [
        (event.name, event.time_range.elapsed_us())
        for event in trace.events() or []
        if event.device_type.name == "CUDA" and not event.name.startswith(("Memset", "Memcpy"))
    ]


def summarise(events: Iterable[tuple[str, float]]) -> tuple[Kernel, ...]:
    """Kernels by their short names, those that took longest first."""
    calls: dict[str, int] = {}
    microseconds: dict[str, float] = {}
    for full, time in events:
        name = short_name(full)
        calls[name] = calls.get(name, 0) + 1
        microseconds[name] = microseconds.get(name, 0.0) + time
    return tuple(
        Kernel(
            name=name,
            calls=calls[name],
            microseconds=round(microseconds[name], 1),
            fa2=_FORWARD in name or _BACKWARD in name,
        )
        for name in sorted(microseconds, key=lambda name: -microseconds[name])
    )


def short_name(full: str) -> str:
    """A kernel's name without template arguments, parameters and return type."""
    name, before = full, ""
    while name != before:  # the innermost brackets first
        name, before = re.sub(r"<[^<>()]*>|\([^<>()]*\)", "", name), name
    parts = re.sub(r"(::)+", "::", name).split()
    return parts[-1] if parts else full


def _call(steps: Backend, branch: str, inputs: Inputs) -> Callable[[], object]:
    """Forward and backward of a branch; selection has no backward."""
    q, config, cu_seqlens, longest = inputs.q, inputs.config, inputs.cu_seqlens, inputs.max_seqlen
    assert inputs.block_idx is not None
    if branch == "select":

        def select() -> object:
            with torch.no_grad():
                k = inputs.compressed.k
                return steps.select_blocks(q, k, config, cu_seqlens, max_seqlen=longest)

        return select
    if branch == GATED:
        return _gated_call(cast(Gated, steps), steps, inputs)
    kv = getattr(inputs, branch)
    given = (q, *kv, inputs.block_idx) if branch == "selected" else (q, *kv)
    step = getattr(steps, f"{branch}_attention")

    def attend() -> object:
        out, _ = step(*given, config, cu_seqlens, max_seqlen=longest)
        return torch.autograd.grad(out, (q, *kv), inputs.dout)

    return attend


def _gated_call(gated: Gated, steps: Backend, inputs: Inputs) -> Callable[[], object]:
    """Forward and backward of the three branches at once; the compressed one's forward before."""
    q, config, cu_seqlens, block_idx = inputs.q, inputs.config, inputs.cu_seqlens, inputs.block_idx
    assert block_idx is not None
    with torch.no_grad():
        first = steps.compressed_attention(
            q, *inputs.compressed, config, cu_seqlens, max_seqlen=inputs.max_seqlen
        )

    def attend() -> object:
        out = gated.gated_attention(inputs.record, *first, block_idx, config)
        return torch.autograd.grad(out, inputs.leaves(), inputs.dout)

    return attend


def _fa2_ran(kernels: Iterable[Kernel]) -> str:
    names = [kernel.name for kernel in kernels]
    forward = any(_FORWARD in name for name in names)
    backward = any(_BACKWARD in name for name in names)
    if forward and backward:
        return "yes"
    if forward or backward:
        return "forward only" if forward else "backward only"
    return "no"


def _faults(branch: BranchChoice, kernels: tuple[Kernel, ...], ran: str) -> list[str]:
    if not kernels:
        return ["showed no kernel at all: the profiler cannot see them (is another one at work?)"]
    if branch.fa2 and ran != "yes":
        source = f"{branch.backend}, {branch.provider}"
        return [f"claims FlashAttention-2 ({source}), and its kernels ran: {ran}"]
    return []
