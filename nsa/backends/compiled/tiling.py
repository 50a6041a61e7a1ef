"""Arithmetic of tile sizes, for every launch; needs torch alone, so that operators may ask too."""

from __future__ import annotations

from functools import cache

import torch

Capability = tuple[int, int]
"""Of a GPU, as in ``(9, 0)`` for sm_90."""

SM_90: Capability = (9, 0)
"""An H100's, which rows of tiles are for unless they name another."""

_SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
_LEAST_SHARED_KIB = 99
"""Of all others from sm_80 on: sm_86, sm_89, sm_120."""
_REDUCTIONS_KIB = 7

UNTUNED = "untuned"
"""What a row of a table of tiles says of itself if nobody has timed it."""


def shared_bytes(capability: Capability) -> int:
    """Shared memory that a program may plan with: what it can have, less what reductions need."""
    return (_SHARED_KIB.get(capability, _LEAST_SHARED_KIB) - _REDUCTIONS_KIB) * 1024


def stage_buffers(num_stages: int, capability: Capability) -> int:
    """Tiles of one operand that stand in shared memory at once; before sm_90 a matrix product has
    read its own into registers."""
    return num_stages if capability >= SM_90 else max(1, num_stages - 1)


def capability_of(device: torch.device) -> Capability:
    """What a launch on tensors there is tiled for.

    On meta tensors, whose launches are built and not run, the current GPU's; an H100's where there
    is none, as in Triton's interpreter.
    """
    if device.type == "cuda" or (device.type == "meta" and torch.cuda.is_available()):
        index = torch.cuda.current_device() if device.index is None else device.index
        return _capability(index)
    return SM_90


@cache
def _capability(index: int) -> Capability:
    return torch.cuda.get_device_capability(index)


def sm(capability: Capability) -> str:
    """As in "sm_90"."""
    return f"sm_{capability[0]}{capability[1]}"


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is at least ``size``; 1 for 0."""
    return 1 << max(0, size - 1).bit_length()


def padded(size: int) -> int:
    """The power of two, at least 16, that a matrix product pads ``size`` to."""
    return max(16, next_power_of_2(size))


def head_columns(size: int, *, least: int = 16) -> int:
    """Columns that a head of ``size`` is padded to: a power of two, or the sum of two if that is
    less: 192 and 80 stay what they are, 72 becomes 80 and 112 becomes 128.

    A matrix product takes at least ``least`` of each. The kernels' side is :mod:`.columns`.
    """
    whole = max(least, padded(size))
    return min(whole, whole // 2 + max(least, padded(size - whole // 2)))


def launch_options(num_warps: int, num_stages: int, maxnreg: int | None = None) -> dict[str, int]:
    """Triton's options of a launch; without ``maxnreg`` the compiler chooses the registers.

    Products are fused with sums, as Triton does by default up to 3.9 only.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return options if maxnreg is None else {**options, "maxnreg": maxnreg}
