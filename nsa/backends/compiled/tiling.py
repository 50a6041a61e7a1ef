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
