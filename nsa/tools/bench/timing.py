"""Clocks and what is measured with them: times, peak memory, and the machine's own ceilings."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from nsa.tools.bench.cases import Timed

MAX_RUNS = 1000
_FLUSH_BYTES = 256 * 2**20
"""More than any GPU's L2 cache holds, so that each run starts with a cold one."""
PASSES = ("forward", "backward", "both")


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


class Clock(Protocol):
    """Times calls on one device."""

    def times(self, call: Callable[[], object], runs: int) -> list[float]:
        """Seconds of each of ``runs`` calls."""
        ...


class WallClock:
    """For a CPU, which is done when the call returns."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def times(self, call: Callable[[], object], runs: int) -> list[float]:
        """See :class:`Clock`."""
        seconds = []
        for _ in range(runs):
            start = self._now()
            call()
            seconds.append(self._now() - start)
        return seconds


class CudaClock:
    """CUDA events around each call, on the current device and stream.

    The L2 cache is overwritten before every run, as ``triton.testing.do_bench`` does; that also
    gives the CPU time to run ahead, so that short calls are not timed as launches. Nothing waits
    for the device until all runs are queued.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def times(self, call: Callable[[], object], runs: int) -> list[float]:
        """See :class:`Clock`."""
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(runs)
        ]
        torch.cuda.synchronize(self._device)
        for start, end in events:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) / 1e3 for start, end in events]


def make_clock(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else WallClock()


def summarize(seconds: list[float]) -> Timing:
    """Median and percentiles, interpolated between runs."""
    ordered = sorted(seconds)

    def percentile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return low + (high - low) * (place - math.floor(place))

    return Timing(statistics.median(ordered), percentile(0.1), percentile(0.9), len(ordered))


def measure(call: Callable[[], object], clock: Clock, *, seconds: float, runs: int) -> Timing:
    """Times a call.

    Args:
        call: what to time; its result is dropped.
        clock: of the device that it runs on.
        seconds: about how long the timed runs may take together.
        runs: the fewest of them, even if they take longer.
    """
    clock.times(call, 1)  # compiles, tunes, allocates
    [once] = clock.times(call, 1)
    if once * runs >= seconds:  # too slow to throw a run away
        return summarize([once, *clock.times(call, runs - 1)])
    count = min(MAX_RUNS, max(runs, int(seconds / max(once, 1e-9))))
    clock.times(call, max(1, count // 10))  # the clock rate settles
    return summarize(clock.times(call, count))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One row's numbers."""

    forward: Timing | None = None
    """Without a graph, as in inference."""
    backward: Timing | None = None
    """Alone, on a graph that is kept."""
    both: Timing | None = None
    """Forward with a graph, then backward; the forward pass alone if there is no backward."""
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
    found: dict[str, Timing] = {}

    def forward() -> object:
        with torch.no_grad():
            return timed.forward()

    def both() -> object:
        return torch.autograd.grad(timed.forward(), timed.leaves, timed.dout)

    def take(name: str, call: Callable[[], object]) -> None:
        if name in passes:
            found[name] = measure(call, clock, seconds=seconds, runs=runs)

    if not timed.leaves:
        found["both"] = found["forward"] = measure(forward, clock, seconds=seconds, runs=runs)
        return Measurement(**found, peak_bytes=peak_memory(forward, device))
    take("forward", forward)
    if "backward" in passes:
        out = timed.forward()
        take(
            "backward",
            lambda: torch.autograd.grad(out, timed.leaves, timed.dout, retain_graph=True),
        )
        del out  # the graph, which would count in what follows
    take("both", both)
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

    flops_per_second: dict[torch.dtype, float]
    """Of a product of two large square matrices, for each dtype."""
    matmul_size: int
    """Rows of those matrices."""
    bytes_per_second: float
    """Of a large copy, bytes read and written."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rates = {str(k).removeprefix("torch."): v for k, v in self.flops_per_second.items()}
        return {
            "flops_per_second": rates,
            "matmul_size": self.matmul_size,
            "bytes_per_second": self.bytes_per_second,
        }


def measure_ceilings(
    device: torch.device, dtypes: tuple[torch.dtype, ...], clock: Clock
) -> Ceilings:
    """Measures the matrix units and the memory; fp32 products as torch is set up (IEEE or TF32)."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else 512
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
        product = torch.empty_like(a)
        timing = measure(_matmul(a, b, product), clock, seconds=0.2, runs=3)
        rates[dtype] = 2 * size**3 / timing.median
    source = torch.zeros(2**30 if cuda else 2**27, dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    timing = measure(lambda: target.copy_(source), clock, seconds=0.2, runs=3)
    return Ceilings(
        flops_per_second=rates,
        matmul_size=size,
        bytes_per_second=2 * source.numel() / timing.median,
    )


def _matmul(a: torch.Tensor, b: torch.Tensor, product: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.mm(a, b, out=product)
