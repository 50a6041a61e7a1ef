"""Compiles what stands between the kernels, for whoever compiles nothing themselves.

The ``compiled`` backend is made of kernels and of plain PyTorch around them. Inside a model that is
compiled as a whole Inductor sees both; called eagerly, the layer and the functions compile
themselves here, into one graph for each kind of input.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

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
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT), static_floats():
            return _keep_buffers(_compiled(function, COMPILER), *args, **kwargs)

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


def _keep_buffers(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a compiled function whose backward may run more than once, as that of eager code may.

    By default a compiled backward overwrites buffers that its forward saved, and refuses
    ``retain_graph=True``. Whoever compiles a model has chosen that; whoever calls this library has
    not. The option decides when a graph is made; later torch asks whether its list of such buffers
    is empty, and takes one that was never made for a full one (2.11 and 2.13).
    """
    import torch._functorch.config as functorch

    with functorch.patch(donated_buffer=False):
        output = function(*args, **kwargs)
    made = getattr(getattr(output.grad_fn, "_forward_cls", None), "metadata", None)
    if made is not None and made.bw_donated_idxs is None:
        made.bw_donated_idxs = []
    return output
