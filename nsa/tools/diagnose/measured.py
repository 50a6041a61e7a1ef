"""Gains that were measured, by what brings them and at which length: rows of docs/measurements.md.

A new measurement is a row here beside its section there. What has no row was not measured.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Gain(NamedTuple):
    """What one setting brought at one length."""

    subject: str
    """``VARIABLE=value``, ``preset NAME``, ``field=value`` of a configuration, or a flag."""
    length: int
    """Tokens of a sequence."""
    gain: str
    """Times over what was compared, and what that was."""
    device: str
    date: str


_H100 = "H100 80GB"
_STEP = "tokens/s of dense attention, small model compiled whole"
_DENSE = "the speed of dense cuDNN forward / with backward, one call of 64/4:128"
_LAYER = "the speed of the default's n 16, w 512, forward and backward of a layer"
_CALL = "the default's speed forward / with backward, one call of 64/4:128"
_ALLOCATOR = (
    "4% of the memory reserved and unused in place of 7%; with either, nothing more over 200 steps "
    "of 256 to 16,384 tokens. Not beside max_split_size_mb, which makes it 70%"
)
_COMPILE = "tokens/s of the same model with nothing compiled"

GAINS = (
    Gain("NSA_BACKEND=compiled", 2048, f"0.74× the {_STEP}", _H100, "2026-11-26"),
    Gain("NSA_BACKEND=compiled", 8192, f"1.02× the {_STEP}", _H100, "2026-11-26"),
    Gain("NSA_BACKEND=compiled", 32768, f"2.02× the {_STEP}", _H100, "2026-11-26"),
    Gain("NSA_BACKEND=compiled", 65536, f"2.8× / 3.7× {_DENSE}", _H100, "2026-11-26"),
    Gain("--compile model", 8192, f"1.17× the {_COMPILE}", _H100, "2026-11-25"),
    Gain("preset short", 2048, f"0.91× the {_STEP} (default: 0.74×)", _H100, "2026-11-27"),
    *(
        Gain("select_share=4", length, f"{times} {_CALL}", _H100, "2026-11-26")
        for length, times in (
            (8192, "1.6× / 1.3×"),
            (65536, "1.8× / 1.5×"),
            (262144, "1.7× / 1.2×"),
        )
    ),
    Gain("preset long", 65536, f"1.7× / 1.5× {_CALL}", _H100, "2026-11-26"),
    Gain("preset long", 262144, "selection 15× as fast as the default's", _H100, "2026-11-27"),
    Gain(
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True", 16384, _ALLOCATOR, "H200", "2026-11-27"
    ),
    Gain("preset cpu", 2048, f"1.4× {_LAYER}", "two cores of a Xeon, busy", "2026-11-26"),
    Gain("preset cpu", 4096, f"1.5× {_LAYER}", "two cores of a Xeon, busy", "2026-11-26"),
    *(
        Gain("NSA_BACKEND=sdpa", length, f"{times}× the speed of dense SDPA, forward", cpu, date)
        for length, times in ((4096, 0.39), (8192, 0.64), (16384, 1.24), (32768, 1.67))
        for cpu, date in [("two cores of an EPYC", "2026-11-23")]
    ),
)


def gain_of(subject: str, length: int) -> str:
    """What is known of a setting at a length; the nearest length where that one is missing."""
    rows = [row for row in GAINS if row.subject == subject]
    if not rows:
        return "not measured"
    near = min(rows, key=lambda row: abs(math.log(row.length / length)))
    text = f"{near.gain} ({near.device}, {near.date})"
    if near.length == length:
        return text
    return f"not measured at {length}; at {near.length}: {text}"
