"""What of several processes runs here, and whether they reach each other."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from nsa.distributed.ranks import LaunchedRanks, Ranks
from nsa.errors import UsageError

_MIB = 2**20
_SIZES_MIB = {"cpu": (1, 16), "cuda": (1, 256)}
_RUNS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedReport:
    """What ``torch.distributed`` has on this machine."""

    available: bool
    gloo: bool
    """For CPUs."""
    nccl: str | None
    """Its version, for GPUs; None where it is absent."""
    gpus: int
    peers: str
    """Which GPUs reach each other's memory."""


def collect_distributed() -> DistributedReport:
    """Look, without starting anything."""
    available = dist.is_available()
    nccl = None
    if available and dist.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    gpus = torch.cuda.device_count()
    gloo = available and dist.is_gloo_available()
    return DistributedReport(
        available=available, gloo=gloo, nccl=nccl, gpus=gpus, peers=_peers(gpus)
    )


def _peers(gpus: int) -> str:
    if gpus < 2:
        return "needs two GPUs"
    pairs = [(i, j) for i in range(gpus) for j in range(gpus) if i != j]
    lacking = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if not lacking:
        return "every GPU reaches every other"
    some = ", ".join(f"{i} not {j}" for i, j in lacking[:8])
    return f"{len(pairs) - len(lacking)} of {len(pairs)} pairs ({some})"


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduce:
    """A sum over all processes."""

    backend: str
    processes: int
    mib: int
    milliseconds: float
    """Median."""
    gigabytes_per_second: float
    """That each process sends, ``2 (n - 1) / n`` of the tensor: what a link has to carry."""
    right: bool
    """Whether every process got the sum."""

    def __str__(self) -> str:
        verdict = "right" if self.right else "WRONG"
        return (
            f"all-reduce over {self.backend}, {self.processes} processes, {self.mib} MiB: "
            f"{self.milliseconds:.2f} ms, {self.gigabytes_per_second:.1f} GB/s, sums {verdict}"
        )


def all_reduce(ranks: Ranks, device_name: str) -> list[AllReduce]:
    """Sum tensors of two sizes over the processes of ``torchrun``; each calls it.

    Raises:
        UsageError: there is one process.
        ConfigError: more processes than GPUs, or a device that cannot be each process's.
    """
    if not isinstance(ranks, LaunchedRanks):
        raise UsageError(
            "--all-reduce: expected several processes, got one; start it with torchrun "
            "--nproc-per-node 2 -m nsa.tools.diagnose --all-reduce"
        )
    chosen = "cuda" if torch.cuda.is_available() else "cpu"
    device = ranks.device(chosen if device_name == "auto" else device_name)
    return [_sum(ranks, device, mib) for mib in _SIZES_MIB[device.type]]


def _sum(ranks: Ranks, device: torch.device, mib: int) -> AllReduce:
    seconds, right = [], True
    for _ in range(_RUNS + 1):
        x = torch.full((mib * _MIB // 4,), float(ranks.rank + 1), device=device)
        _wait(device)
        begun = time.perf_counter()
        dist.all_reduce(x)
        _wait(device)
        seconds.append(time.perf_counter() - begun)
        right &= bool((x == ranks.size * (ranks.size + 1) / 2).all())
    took = median(seconds[1:])  # the first connects
    share = 2 * (ranks.size - 1) / ranks.size
    return AllReduce(
        backend="nccl" if device.type == "cuda" else "gloo",
        processes=ranks.size,
        mib=mib,
        milliseconds=round(1e3 * took, 3),
        gigabytes_per_second=round(share * mib * _MIB / took / 1e9, 2),
        right=not ranks.any(not right),
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
