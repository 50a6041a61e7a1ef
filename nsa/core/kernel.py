"""Triton kernels whose launches can be built without being run.

A launch that is *built* has its code made, or taken from the disk, and loaded; nothing runs.
:mod:`.build` builds those of a call side by side, before the first of them is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton

from nsa.core.operators import BUILDING


def kernel(**options: Any) -> Callable[[Callable[..., None]], Any]:
    """``triton.jit`` of a kernel that the host launches, with the same options."""

    def decorate(function: Callable[..., None]) -> Any:
        made = triton.jit(**options)(function)
        launch = made.run

        def run(*args: Any, warmup: bool, **kwargs: Any) -> Any:
            return launch(*args, warmup=warmup or BUILDING.get(), **kwargs)

        made.run = run
        return made

    return decorate
