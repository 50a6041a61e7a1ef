"""What this machine is: hardware, drivers, versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

import nsa
from nsa.settings import foreign_variable

GIB = 2**30
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where PyTorch reads the allocator's options from; the first name is the newer one."""
OFF_SWITCHES = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
"""Where 1 means that ``torch.compile`` returns what it was given."""
CACHE_SWITCHES = ("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "TORCH_COMPILE_FORCE_DISABLE_CACHES")
"""Where 1 means that nothing compiled is kept."""
INTERPRETER = "TRITON_INTERPRET"
COMPILE_SWITCHES = (*OFF_SWITCHES, *CACHE_SWITCHES, INTERPRETER)
"""What changes how everything here runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One device that torch sees."""

    name: str
    capability: str
    """Compute capability, as in "9.0"."""
    memory_gib: float
    has_kernels: bool
    """Whether this torch build has code for the device's architecture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What ``diagnose`` prints first; ``bench`` writes it beside its numbers."""

    os: str
    cpu: str
    cores: int
    """Cores that this process may use."""
    memory_gib: float | None
    python: str
    nsa: str
    torch: str
    torch_threads: int
    cuda_runtime: str | None
    """The CUDA version torch was built with; None in a CPU-only build."""
    cuda_driver: str | None
    """Version of the NVIDIA driver."""
    cuda_messages: tuple[str, ...] = ()
    """What torch warned of, or failed with, when it looked for devices."""
    gpus: tuple[Gpu, ...] = ()
    """The devices torch sees."""
    gpus_of_driver: tuple[str, ...] = ()
    """The devices the NVIDIA driver sees."""
    triton: str | None = None
    numpy: str | None = None
    variables: dict[str, str] = field(default_factory=dict)
    """Variables of other libraries that matter here, where set."""


def collect_machine() -> Machine:
    """Reads all of it, in milliseconds; ``torch.utils.collect_env`` takes most of a second."""
    driver, gpus_of_driver = _collect_driver()
    gpus, messages = _collect_gpus()
    names = (*ALLOCATOR_VARIABLES, "CUDA_VISIBLE_DEVICES", *COMPILE_SWITCHES)
    variables = {name: foreign_variable(name) for name in names}
    return Machine(
        os=platform.platform(),
        cpu=_cpu_name(),
        cores=_cores(),
        memory_gib=_memory_gib(),
        python=f"{platform.python_version()}, {sys.executable}",
        nsa=nsa.__version__,
        torch=torch.__version__,
        torch_threads=torch.get_num_threads(),
        cuda_runtime=torch.version.cuda,
        cuda_driver=driver,
        cuda_messages=messages,
        gpus=gpus,
        gpus_of_driver=gpus_of_driver,
        triton=version_of("triton") or version_of("pytorch-triton"),
        numpy=version_of("numpy"),
        variables={name: text for name, text in variables.items() if text is not None},
    )


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution, without importing it; None if there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def output_of(*command: str) -> str:
    """What a program prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _collect_gpus() -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """The devices torch sees, and its complaints (an old driver is one)."""
    messages = []
    gpus: tuple[Gpu, ...] = ()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            gpus = tuple(_gpu(index) for index in range(torch.cuda.device_count()))
        except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
            messages.append(str(error))
    messages += [str(warning.message) for warning in caught]
    return gpus, tuple(" ".join(message.split()) for message in messages)


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    major, minor = properties.major, properties.minor
    built_for = torch.cuda.get_arch_list()
    # Code for sm_80 runs on every 8.x, for sm_90a on 9.0 alone, for compute_90 (PTX) from 9.0 on.
    names = {f"sm_{major}{low}" for low in range(minor + 1)} | {f"sm_{major}{minor}a"}
    ptx = [re.fullmatch(r"compute_(\d+)\w*", name) for name in built_for]
    later = any(found and int(found[1]) <= 10 * major + minor for found in ptx)
    return Gpu(
        name=properties.name,
        capability=f"{major}.{minor}",
        memory_gib=round(properties.total_memory / GIB, 1),
        has_kernels=bool(names & set(built_for) or later),
    )


def _collect_driver() -> tuple[str | None, tuple[str, ...]]:
    """Version and device names from nvidia-smi; (None, ()) without a working one."""
    told = output_of("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader")
    rows = [line.split(",", 1) for line in told.splitlines() if "," in line]
    return (rows[0][0].strip() if rows else None), tuple(row[1].strip() for row in rows)


def _cpu_name() -> str:
    text = ""
    with contextlib.suppress(OSError):  # not Linux
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"^model name\s*:\s*(.*\S)", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)
    except (AttributeError, ValueError, OSError):  # not a Unix, or one without these names
        return None
