"""Compiles what stands between the kernels, for whoever compiles nothing themselves.

The ``compiled`` backend is made of kernels and of plain PyTorch around them. Inside a model that is
compiled as a whole Inductor sees both; called eagerly, the layer and the functions compile
themselves here, into one graph for each kind of input.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_LOG = logging.getLogger("nsa")

COMPILER: str | None = "inductor"
"""The ``torch.compile`` backend; None runs everything as it is written (for tests)."""
RECOMPILE_LIMIT = 64
"""Graphs of one function: regular and packed, short and long, with and without gradients, dtypes.
Past that ``fullgraph`` makes torch raise; nothing runs uncompiled in silence."""

P = ParamSpec("P")
R = TypeVar("R")


def compile_glue(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap ``function``: compiled when it is called outside a trace, inlined within one.

    Under a dispatch mode, such as that of ``FlopCounterMode``, it runs as it is written, for the
    mode to see its operators: torch compiles nothing there.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if COMPILER is None or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if is_in_torch_dispatch_mode(include_infra_modes=False):
            return function(*args, **kwargs)
        keep_saved_tensors()
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT), static_floats():
            return _compiled(function, COMPILER)(*args, **kwargs)

    return call


def static_floats() -> AbstractContextManager[None]:
    """With ``dynamic=True`` the first graph is made once, not twice.

    Else every float that a model holds becomes a symbol, the eps of a norm or RoPE's theta; when
    the graph has been made, torch finds that it depends on none, and makes it anew (2.11 and 2.13).
    To be put around calls of what ``torch.compile`` returned, since the first one compiles.
    """
    return torch._dynamo.config.patch(specialize_float=True)


@lru_cache(maxsize=64)
def _compiled(function: Callable[P, R], compiler: str) -> Callable[P, R]:
    return torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)


def keep_saved_tensors() -> None:
    """Turns AOTAutograd's buffer donation off, for this process.

    With it Inductor's backward overwrites a saved tensor after its last use, although another saved
    tensor may be a view of the same memory: gates and their slices, queries and their reshapes. The
    gradients are then wrong, in silence (torch 2.11 and 2.13). It stays off, since a backward that
    keeps its graph is refused while it is on, whatever was donated.
    """
    import torch._functorch.config as functorch

    if functorch.donated_buffer:
        functorch.donated_buffer = False
        _LOG.info("torch._functorch.config.donated_buffer is off: saved views would be overwritten")
