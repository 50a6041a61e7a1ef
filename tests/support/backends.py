"""Which backends the tests run, on which devices and in which dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from nsa import NSAConfig, use_settings
from nsa.backends import TABLE, unavailable
from nsa.backends.protocol import Problem
from nsa.settings import current_settings

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda")


def available(device: str, dtype: torch.dtype) -> list[str]:
    """Backends that can run a small problem there; FA-2 on a CPU through its math provider."""
    problem = Problem(
        config=NSAConfig.preset("tiny"),
        device=torch.device(device),
        dtype=dtype,
        length=64,
        packed=False,
        needs_grad=True,
    )
    if device == "cuda" and not torch.cuda.is_available():
        return ["reference", "sdpa"]
    with fa2_by_math(device):
        settings = current_settings()
        return [name for name in TABLE if unavailable(name, problem, settings) is None]


@contextmanager
def fa2_by_math(device: str) -> Iterator[None]:
    """On a CPU, FA-2's packing is tested through the provider that needs no GPU."""
    if device == "cuda":
        yield
        return
    with use_settings(fa2_provider="math"):
        yield


def targets(
    dtypes: tuple[torch.dtype, ...] = DTYPES, only: tuple[str, ...] | None = None
) -> list[object]:
    """Parameters ``(backend, device, dtype)``, the CUDA ones marked ``gpu``.

    ``compiled`` on CUDA is not among them: its kernels take seconds to make for every new geometry,
    so tests/backends/compiled/test_gpu.py runs chosen ones.
    """
    return [
        pytest.param(
            name,
            device,
            dtype,
            marks=[pytest.mark.gpu] if device == "cuda" else [],
            id=f"{name}-{device}-{str(dtype).removeprefix('torch.')}",
        )
        for device in DEVICES
        for dtype in dtypes
        for name in available(device, dtype)
        if (only is None or name in only) and (name, device) != ("compiled", "cuda")
    ]


def refuses_packed(backend: str) -> bool:
    """Whether the backend takes regular batches only; then it must say so."""
    return backend == "fa2-dense"
