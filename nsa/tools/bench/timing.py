"""Clocks and what is measured with them: times, peak memory, and the machine's own ceilings.

Medians and percentiles of single calls, the first one apart, which compiles and tunes.
``triton.testing.do_bench`` clears the L2 cache and reports quantiles as this does; it needs triton
and runs a call at least eight times, however long one takes. ``blocked_autorange`` of
``torch.utils.benchmark.Timer`` times blocks of calls, which hides the spread of single ones, and
leaves the L2 cache warm. The medians of all three agree (tests).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from nsa.tools.bench.cases import Timed
from nsa.tools.common.problems import short

PASSES = ("forward", "backward", "both")
MAX_RUNS = 1000
_FLUSH_BYTES = 256 * 2**20
"""More than any GPU's L2 cache holds, so that each run starts with a cold one."""


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    low: float
    """The 10th percentile."""
    high: float
    """The 90th percentile."""
    runs: int

    @property
    def spread(self) -> float:
        """Half the distance between the percentiles, as a share of the median."""
        return (self.high - self.low) / 2 / self.median if self.median > 0 else 0.0


Clock = Callable[[Callable[[], object], int], "list[float]"]
"""Seconds of each of so many calls, on one device."""


def wall_clock(
    call: Callable[[], object], runs: int, now: Callable[[], float] = time.perf_counter
) -> list[float]:
    """The clock of a CPU, which is done when the call returns."""
    seconds = []
    for _ in range(runs):
        start = now()
        call()
        seconds.append(now() - start)
    return seconds


def cuda_clock(device: torch.device) -> Clock:
    """CUDA events around each call, on the current device and stream.

    The L2 cache is overwritten before every run, which also gives the CPU time to run ahead, so
    that short calls are not timed as launches. Nothing waits for the device until all runs are
    queued.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    event = partial(torch.cuda.Event, enable_timing=True)

    def times(call: Callable[[], object], runs: int) -> list[float]:
        events = [(event(), event()) for _ in range(runs)]
        torch.cuda.synchronize(device)
        for start, end in events:
            flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    return times


def make_clock(device: torch.device) -> Clock:
    """The clock of a device."""
    return cuda_clock(device) if device.type == "cuda" else wall_clock


def summarize(seconds: list[float]) -> Timing:
    """Median and percentiles, interpolated between runs."""
    shares = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    median, low, high = torch.tensor(seconds, dtype=torch.float64).quantile(shares).tolist()
    return Timing(median, low, high, len(seconds))


def measure(call: Callable[[], object], clock: Clock, *, seconds: float, runs: int) -> Timing:
    """Times a call: at least ``runs`` times, together about as many ``seconds`` as given."""
    clock(call, 1)  # compiles, tunes, allocates
    [once] = clock(call, 1)
    if once * runs >= seconds:  # too slow to throw a run away
        return summarize([once, *clock(call, runs - 1)])
    count = min(MAX_RUNS, max(runs, int(seconds / max(once, 1e-9))))
    clock(call, max(1, count // 10))  # the clock rate settles
    return summarize(clock(call, count))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One row's numbers."""

    forward: Timing | None = None
    """Without a graph, as in inference."""
    backward: Timing | None = None
    """Alone, on a graph that is kept."""
    both: Timing | None = None
    """Forward with a graph, then backward; the forward pass alone where nothing has a backward."""
    peak_bytes: int | None = None
    """By how much ``both`` raises the memory in use at most; None where torch does not count it."""


def measure_passes(
    timed: Timed,
    clock: Clock,
    device: torch.device,
    *,
    seconds: float,
    runs: int,
    passes: tuple[str, ...] = PASSES,
) -> Measurement:
    """Times the passes of one call and takes its peak memory."""

    def forward() -> object:
        with torch.no_grad():
            return timed.forward()

    def both() -> object:
        return torch.autograd.grad(timed.forward(), timed.leaves, timed.dout)

    take = partial(measure, clock=clock, seconds=seconds, runs=runs)
    if not timed.leaves:
        once = take(forward)
        both_passes = None if timed.forward_only else once
        return Measurement(forward=once, both=both_passes, peak_bytes=peak_memory(forward, device))
    found = {}
    if "forward" in passes:
        found["forward"] = take(forward)
    if "backward" in passes:
        out = timed.forward()
        grad = partial(torch.autograd.grad, out, timed.leaves, timed.dout, retain_graph=True)
        found["backward"] = take(grad)
        del out, grad  # the graph, which would count in what follows
    if "both" in passes:
        found["both"] = take(both)
    return Measurement(**found, peak_bytes=peak_memory(both, device))


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which a call raises the memory in use at most, its result included.

    None on a CPU: the peak of a process never falls, so that it says nothing about one call.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What this machine reaches on the simplest work there is."""

    flops_per_second: dict[str, float]
    """Of a product of two large square matrices, by the name of their dtype."""
    matmul_size: int
    """Rows of those matrices."""
    bytes_per_second: float
    """Of a large copy, bytes read and written."""


def measure_ceilings(
    device: torch.device, dtypes: tuple[torch.dtype, ...], clock: Clock
) -> Ceilings:
    """Measures the matrix units and the memory; fp32 products as torch is set up (IEEE or TF32)."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else 512
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        rates[short(dtype)] = 2 * size**3 / measure(product, clock, seconds=0.2, runs=3).median
    source = torch.zeros(2**30 if cuda else 2**27, dtype=torch.int8, device=device)
    copy = partial(torch.zeros_like(source).copy_, source)
    return Ceilings(
        flops_per_second=rates,
        matmul_size=size,
        bytes_per_second=2 * source.numel() / measure(copy, clock, seconds=0.2, runs=3).median,
    )
