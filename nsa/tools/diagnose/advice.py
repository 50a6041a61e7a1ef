"""Common mistakes, and what to do about each: ``diagnose``'s last table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nsa.backends.fa2.providers import BROKEN, WRONG, Report
from nsa.settings import Settings
from nsa.tools.common.machine import (
    ALLOCATOR_VARIABLES,
    CACHE_SWITCHES,
    INTERPRETER,
    OFF_SWITCHES,
    Machine,
)

_TORCH_INSTALL = "install a CUDA build of PyTorch (https://pytorch.org/get-started/locally)"
_COMPILE_SWITCHES = {
    **dict.fromkeys(
        OFF_SWITCHES, "torch.compile compiles nothing and returns what it was given; unset it."
    ),
    **dict.fromkeys(CACHE_SWITCHES, "everything is compiled anew in every process; unset it."),
    INTERPRETER: "Triton kernels run in Python, on the CPU: for tests of kernels, and far too "
    "slow for anything else.",
}
"""What it means that one of these variables is 1."""


def advice(
    machine: Machine, providers: Iterable[Report], settings: Settings, settings_error: str | None
) -> Iterator[str]:
    """Say what to do, most pressing first; nothing when nothing common is wrong."""
    if settings_error is not None:
        yield (
            f"The environment is wrong, and everything that reads it will raise: {settings_error}. "
            "Correct the variable or unset it."
        )
    yield from _about_devices(machine)
    yield from _about_fa2(providers, settings)
    for name, meaning in _COMPILE_SWITCHES.items():
        if machine.variables.get(name) == "1":
            yield f"{name}=1: {meaning}"
    if machine.gpus and not any(name in machine.variables for name in ALLOCATOR_VARIABLES):
        yield (
            f"Sequences of many lengths fragment GPU memory; {ALLOCATOR_VARIABLES[1]}="
            "expandable_segments:True avoids that (set it before Python starts)."
        )


def _about_devices(machine: Machine) -> Iterator[str]:
    if machine.gpus_of_driver and not machine.gpus:
        hidden = machine.variables.get("CUDA_VISIBLE_DEVICES")
        if machine.cuda_runtime is None:
            why = f"torch {machine.torch} is a CPU-only build; {_TORCH_INSTALL}."
        elif hidden is not None:
            why = f"CUDA_VISIBLE_DEVICES={hidden} may hide it."
        else:
            why = (
                f"this torch wants CUDA {machine.cuda_runtime}; update the driver, or "
                "install a build for an older CUDA."
            )
        driver = f"The NVIDIA driver {machine.cuda_driver}"
        yield f"{driver} sees {machine.gpus_of_driver[0]}, torch does not: {why}"
    for message in machine.cuda_messages:
        yield f"torch, looking for CUDA devices: {message}"
    for gpu in machine.gpus:
        capability = f"{gpu.name} has compute capability {gpu.capability}"
        if not gpu.has_kernels:
            yield f"{capability}, for which this torch build has no code; {_TORCH_INSTALL}."
        elif float(gpu.capability) < 8:
            yield f"{capability}; FlashAttention-2 needs 8.0, so sdpa is what runs there."
    if machine.gpus and machine.triton is None:
        yield "triton is not installed; what torch.compile makes for a GPU needs it."


def _about_fa2(providers: Iterable[Report], settings: Settings) -> Iterator[str]:
    for report in providers:
        if report.status in (BROKEN, WRONG):
            other = (
                "; or uninstall it, since PyTorch has FlashAttention-2 kernels of its own"
                if report.name == "flash_attn"
                else ""
            )
            yield f"{report.refusal}{other}."
    if settings.fa2_provider == "math":
        yield (
            "NSA_FA2_PROVIDER=math computes in plain PyTorch, for tests: no kernel of "
            "FlashAttention-2 runs."
        )
