"""Which backends the tests run, on which devices and in which dtypes."""

from __future__ import annotations

import pytest
import torch

from nsa import NSAConfig
from nsa.backends import TABLE, unavailable
from nsa.backends.contract import Problem

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda")


def available(device: str) -> list[str]:
    """Backends of the table that can run a small problem on this device."""
    problem = Problem(
        config=NSAConfig.preset("tiny"),
        device=torch.device(device),
        dtype=torch.float32 if device == "cpu" else torch.bfloat16,
        length=64,
        packed=False,
        needs_grad=True,
    )
    return [name for name in TABLE if unavailable(name, problem) is None]


def targets(only: tuple[str, ...] | None = None) -> list[object]:
    """Parameters ``(backend, device)``, the CUDA ones marked ``gpu``."""
    return [
        pytest.param(name, device, marks=[pytest.mark.gpu] if device == "cuda" else [])
        for device in DEVICES
        for name in available(device)
        if only is None or name in only
    ]
