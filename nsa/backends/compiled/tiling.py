"""Arithmetic of tile sizes, for every launch; needs torch alone, so that operators may ask too."""

from __future__ import annotations

SHARED_BYTES = 220 * 1024
"""Shared memory that a program may plan with (227 KiB on sm_90, less what reductions need)."""

UNTUNED = "untuned"
"""What a row of a table of tiles says of itself if nobody has timed it."""


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is at least ``size``; 1 for 0."""
    return 1 << max(0, size - 1).bit_length()


def padded(size: int) -> int:
    """The power of two, at least 16, that a matrix product pads ``size`` to."""
    return max(16, next_power_of_2(size))


def launch_options(num_warps: int, num_stages: int, maxnreg: int | None = None) -> dict[str, int]:
    """Triton's options of a launch; without ``maxnreg`` the compiler chooses the registers.

    Products are fused with sums, as Triton does by default up to 3.9 only.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return options if maxnreg is None else {**options, "maxnreg": maxnreg}
