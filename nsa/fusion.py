"""Compiles what stands between the kernels, for whoever compiles nothing themselves.

The ``compiled`` backend is made of kernels and of plain PyTorch around them. Inside a model that is
compiled as a whole Inductor sees both; called eagerly, the layer and the functions compile
themselves here, into one graph for each kind of input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

COMPILER: str | None = "inductor"
"""The ``torch.compile`` backend; None runs everything as it is written (for tests)."""
RECOMPILE_LIMIT = 64
"""Graphs of one function: regular and packed, short and long, with and without gradients, dtypes.
Past that ``fullgraph`` makes torch raise; nothing runs uncompiled in silence."""

P = ParamSpec("P")
R = TypeVar("R")


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, compiled when it is called outside a trace."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if COMPILER is None or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        # donated buffers would make a second backward through the same graph an error
        with (
            torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT),
            torch._functorch.config.patch(donated_buffer=False),
        ):
            return _compiled(function, COMPILER)(*args, **kwargs)

    return call


@lru_cache(maxsize=64)
def _compiled(function: Callable[P, R], compiler: str) -> Callable[P, R]:
    return torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
