"""Common mistakes, and what to do about each: ``diagnose``'s last table."""

from __future__ import annotations

import re

from nsa.tools._flash_attn import BROKEN, WRONG, Provider
from nsa.tools._machine import ALLOCATOR_VARIABLES, Machine

_OTHER_TORCH = re.compile(r"undefined symbol|cannot open shared object|DLL load failed", re.I)
_TORCH_INSTALL = "install a CUDA build of PyTorch (https://pytorch.org/get-started/locally)"


def advice(machine: Machine, flash_attn: Provider, settings_error: str | None) -> list[str]:
    """What to do, most pressing first; empty when nothing common is wrong."""
    found = []
    if settings_error is not None:
        found.append(
            f"The environment is wrong, and everything that reads it will raise: {settings_error}. "
            "Correct the variable or unset it."
        )
    found += _about_devices(machine)
    found += _about_flash_attn(flash_attn)
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


def _about_flash_attn(flash_attn: Provider) -> list[str]:
    if flash_attn.status == WRONG:
        return [
            f"flash-attn {flash_attn.version} computes wrong numbers on this machine: uninstall or "
            "rebuild it."
        ]
    if flash_attn.status != BROKEN:
        return []
    if _OTHER_TORCH.search(flash_attn.detail):
        return [
            "flash-attn was built for another torch or CUDA than is installed. Build it anew: "
            "pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir "
            "flash-attn; or uninstall it, since PyTorch has FlashAttention-2 kernels of its own."
        ]
    return [
        f"flash-attn is installed and does not work ({flash_attn.detail}): reinstall it, or "
        "uninstall it, since PyTorch has FlashAttention-2 kernels of its own."
    ]
