"""Common mistakes, and what to do about each: ``diagnose``'s last table."""

from __future__ import annotations

from collections.abc import Iterable

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


def advice(
    machine: Machine,
    providers: Iterable[Report],
    settings: Settings,
    settings_error: str | None,
) -> list[str]:
    """What to do, most pressing first; empty when nothing common is wrong."""
    found = []
    if settings_error is not None:
        found.append(
            f"The environment is wrong, and everything that reads it will raise: {settings_error}. "
            "Correct the variable or unset it."
        )
    found += _about_devices(machine)
    found += _about_fa2(providers, settings)
    found += _about_compiling(machine)
    if machine.gpus and not any(name in machine.variables for name in ALLOCATOR_VARIABLES):
        found.append(
            f"Sequences of many lengths fragment GPU memory; {ALLOCATOR_VARIABLES[1]}="
            "expandable_segments:True avoids that (set it before Python starts)."
        )
    return found


def _about_devices(machine: Machine) -> list[str]:
    found = []
    if machine.gpus_of_driver and not machine.gpus:
        seen = (
            f"The NVIDIA driver {machine.cuda_driver} sees {machine.gpus_of_driver[0]}, torch not"
        )
        hidden = machine.variables.get("CUDA_VISIBLE_DEVICES")
        if machine.cuda_runtime is None:
            found.append(f"{seen}: torch {machine.torch} is a CPU-only build; {_TORCH_INSTALL}.")
        elif hidden is not None:
            found.append(f"{seen}: CUDA_VISIBLE_DEVICES={hidden} may hide it.")
        else:
            found.append(
                f"{seen}: this torch wants CUDA {machine.cuda_runtime}; update the driver, or "
                "install a build for an older CUDA."
            )
    found += [f"torch, looking for CUDA devices: {message}" for message in machine.cuda_messages]
    for gpu in machine.gpus:
        if not gpu.has_kernels:
            found.append(
                f"{gpu.name} has compute capability {gpu.capability}, for which this torch build "
                f"has no code; {_TORCH_INSTALL}."
            )
        elif float(gpu.capability) < 8:
            found.append(
                f"{gpu.name} has compute capability {gpu.capability}; FlashAttention-2 needs 8.0, "
                "so sdpa is what runs there."
            )
    if machine.gpus and machine.triton is None:
        found.append("triton is not installed; what torch.compile makes for a GPU needs it.")
    return found


def _about_fa2(providers: Iterable[Report], settings: Settings) -> list[str]:
    found = []
    for report in providers:
        if report.status in (BROKEN, WRONG):
            found.append(f"{report.refusal}.")
            if report.name == "flash_attn":
                found[-1] = (
                    f"{report.refusal}; or uninstall it, since PyTorch has FlashAttention-2 "
                    "kernels of its own."
                )
    if settings.fa2_provider == "math":
        found.append(
            "NSA_FA2_PROVIDER=math computes in plain PyTorch, for tests: no kernel of "
            "FlashAttention-2 runs."
        )
    return found


def _about_compiling(machine: Machine) -> list[str]:
    def set_of(names: Iterable[str]) -> list[str]:
        return [f"{name}=1" for name in names if machine.variables.get(name) == "1"]

    found = [
        f"{switch}: torch.compile compiles nothing and returns what it was given; unset it."
        for switch in set_of(OFF_SWITCHES)
    ]
    found += [
        f"{switch}: everything is compiled anew in every process; unset it."
        for switch in set_of(CACHE_SWITCHES)
    ]
    found += [
        f"{switch}: Triton kernels run in Python, on the CPU: for tests of kernels, and far too "
        "slow for anything else."
        for switch in set_of((INTERPRETER,))
    ]
    return found
