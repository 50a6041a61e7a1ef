"""Memory that a call takes: on a CPU by torch's profiler, which sees every allocation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile


class Taken(NamedTuple):
    """Bytes of tensors beside those that were there before."""

    peak: int
    left: int
    """In use when the call has returned."""


def taken_on_cpu(call: Callable[[], object]) -> Taken:
    """Count what a call takes; what it returns is held until it has been counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    changes = sorted((x.start_ns(), x.nbytes()) for x in events if x.name() == "[memory]")
    now = peak = 0
    for _, size in changes:
        now += size
        peak = max(peak, now)
    del result
    return Taken(peak, now)
