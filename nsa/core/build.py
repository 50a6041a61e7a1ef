"""Kernels of a call are built side by side before the first of them is launched.

Triton builds a kernel when it is first launched, one after the other: some 20 s for a layer's
forward and backward. Here the call is *rehearsed* once, on meta tensors: its launches are built in
threads and not run (:mod:`nsa.core.kernel`), so that all of them take little longer than the
slowest. What is built stays in Triton's own caches, in memory and on the disk. A launch that no
rehearsal foresaw is built when it comes, as ever.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Hashable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextvars import Context
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from nsa.core.operators import BUILDING
from nsa.core.toolchain import TRITON_DIR, triton_cache
from nsa.errors import BackendUnavailable

_BUILT: set[Hashable] = set()
_COMPILED_AUTOGRAD = "torch._dynamo.compiled_autograd"


def launches_soon(x: Tensor) -> bool:
    """Whether a call on x launches kernels now: not in a trace, on fake tensors, in a capture.

    Nor under compiled autograd, which would trace a rehearsal's backward too.
    """
    return (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode(include_infra_modes=True)
        and not torch.cuda.is_current_stream_capturing()
        and not getattr(sys.modules.get(_COMPILED_AUTOGRAD), "compiled_autograd_enabled", False)
    )


def on_meta(x: Tensor | None, *, grad: bool = False) -> Any:
    """What stands for x in a rehearsal: as it is laid out, without memory."""
    if x is None:
        return None
    return torch.empty_strided(
        x.shape, x.stride(), dtype=x.dtype, device="meta", requires_grad=grad
    )


def backward(x: Tensor) -> None:
    """The backward from a meta tensor x, as from a sum of it.

    ``x.backward(grad)`` and sums of meta tensors import torch's compiler, which takes a second.
    """
    _Sum.apply(x).backward()


class _Sum(torch.autograd.Function):
    """Of a number on the CPU, so that the first gradient is one, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.like = on_meta(x)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.like


def kind(x: Tensor | None) -> Hashable:
    """What two tensors have alike that are likely to be launched on the same kernels."""
    return None if x is None else (x.dtype, *(size.bit_length() for size in x.shape))


def build_once(key: Hashable, device: torch.device, rehearse: Callable[[], object]) -> None:
    """Build what ``rehearse`` launches for a device, unless that has been done for this key.

    Raises:
        BackendUnavailable: the cache folder or the C compiler fails.
    """
    if key in _BUILT:
        return
    try:
        # A thread and a context of its own: no mode or hook of the caller sees the rehearsal, such
        # as a checkpoint's, which counts what is saved; and nothing stays set, whatever is raised.
        with ThreadPoolExecutor(1) as apart:
            apart.submit(Context().run, _build, device, rehearse).result()
    except (OSError, subprocess.CalledProcessError) as error:
        raise BackendUnavailable(
            f"compiled could not build its kernels: {error}; expected a C compiler and a folder "
            f"that can be written to, got {triton_cache()}: name another in the variable "
            f"{TRITON_DIR}, or use another backend"
        ) from error
    _BUILT.add(key)


def _build(device: torch.device, rehearse: Callable[[], object]) -> None:
    import triton

    with (
        torch.cuda.device(device),
        ThreadPoolExecutor(os.cpu_count()) as pool,
        triton.AsyncCompileMode(_Loading(pool, device)),
    ):
        BUILDING.set(True)
        rehearse()


class _Loading(Executor):
    """Threads that also build a kernel's launcher and load its code: waits, most of it."""

    def __init__(self, pool: ThreadPoolExecutor, device: torch.device) -> None:
        self._pool, self._device = pool, device

    def submit(self, make: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def load() -> Any:
            made = make(*args, **kwargs)
            with torch.cuda.device(self._device):
                assert made.run is not None  # made at its first use
            return made

        return self._pool.submit(load)
