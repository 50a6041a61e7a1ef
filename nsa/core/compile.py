"""Compiles what stands between the steps, for whoever compiles nothing themselves.

The ``compiled`` backend is made of kernels and of plain PyTorch around them. Inside a model that is
compiled as a whole Inductor sees both; called eagerly on a CPU, the layer and the functions compile
themselves here, into one graph for each kind of input. On a GPU they run as they are written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from functools import lru_cache, wraps
from types import FunctionType
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

COMPILER: str | None = "inductor"
"""The ``torch.compile`` backend; None runs everything as it is written (for tests)."""
RECOMPILE_LIMIT = 64
"""Graphs that are kept of one function and configuration: regular and packed, short and long, with
and without gradients, layouts. At the next one torch warns, and the collection begins anew."""
CONFIGURATIONS = 256
"""Functions and configurations whose graphs are kept; the least recently used makes room."""

P = ParamSpec("P")
R = TypeVar("R")


def compile_glue(function: Callable[P, R], configuration: Callable[P, Hashable]) -> Callable[P, R]:
    """Wrap ``function``: compiled when it is called outside a trace, inlined within one.

    ``configuration`` says, from the same arguments, whose graphs a call may share: torch looks
    through all that one function has, and gives up at a number of them.

    Under a dispatch mode, such as that of ``FlopCounterMode``, it runs as it is written, for the
    mode to see its operators: torch compiles nothing there.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if COMPILER is None or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if is_in_torch_dispatch_mode(include_infra_modes=False):
            return function(*args, **kwargs)
        compiled = _compiled(function, configuration(*args, **kwargs), COMPILER)
        return compiled(*args, **kwargs)

    return call


def static_floats() -> AbstractContextManager[None]:
    """With ``dynamic=True`` the first graph is made once, not twice.

    Else every float that a model holds becomes a symbol, the eps of a norm or RoPE's theta; when
    the graph has been made, torch finds that it depends on none, and makes it anew (2.11 and 2.13).
    To be put around calls of what ``torch.compile`` returned, since the first one compiles.
    """
    return torch._dynamo.config.patch(specialize_float=True)


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap ``function``: a trace that calls it breaks its graph there, and it runs as written.

    What ``torch.compiler.disable`` does, without its import of the compiler, unless that has been
    imported: before, nothing can be traced.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" in sys.modules:
            return _disabled(function)(*args, **kwargs)
        return function(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call


@lru_cache
def _disabled(function: Callable[P, R]) -> Callable[P, R]:
    disabled: Callable[P, R] = torch.compiler.disable(function)
    return disabled


class _Compiled(Generic[P, R]):
    """A function and the graphs that torch made of it."""

    def __init__(self, function: Callable[P, R], compiler: str) -> None:
        self._function, self._compiler = function, compiler
        self._begin()

    def _begin(self) -> None:
        """Start without graphs: torch keeps them by the code object, hence a copy of that."""
        own = _copy_of(self._function)
        self._run = torch.compile(own, fullgraph=True, dynamic=True, backend=self._compiler)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        from torch._dynamo.exc import FailOnRecompileLimitHit

        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT), static_floats():
            try:
                return _keep_buffers(self._run, *args, **kwargs)
            except FailOnRecompileLimitHit:  # nothing has run yet
                self._begin()
                return _keep_buffers(self._run, *args, **kwargs)


@lru_cache(maxsize=CONFIGURATIONS)
def _compiled(function: Callable[P, R], key: Hashable, compiler: str) -> _Compiled[P, R]:
    return _Compiled(function, compiler)


def _copy_of(function: Callable[..., Any]) -> FunctionType:
    """The same function with a code object of its own."""
    assert isinstance(function, FunctionType)
    copy = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


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
