"""Triton builds for an H100 that is not there: its driver's answers, without a driver."""

from __future__ import annotations

import contextlib
import sys
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from nsa.core import build

CODE = """
import pytest, torch
from tests.support.absent_gpu import build_two, pretend
with pytest.MonkeyPatch.context() as patch:
    pretend(patch)
    print(build_two())
"""
"""For a process of its own."""


def pretend(patch: pytest.MonkeyPatch) -> None:
    """Whatever is built is built for sm_90, and not loaded."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    patch.setattr(triton.runtime.driver, "_active", Driver())
    patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    patch.setattr(build, "_BUILT", set())
    patch.setattr(build._Loading, "submit", lambda self, make: self._pool.submit(make))


def build_two(key: object = "two") -> list[str]:
    """Build two small kernels; those that are ready to be launched."""
    from nsa.core.block_tokens import kernels

    def rehearsal() -> None:
        x = torch.empty(2, 64, 4, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
        (x * x).sum().backward()  # modes and hooks are the caller's
        kernels.scatter(kernels.gather(x, 8, 4, 15), 64, 4)

    build.build_once(key, torch.device("cuda", 0), rehearsal)
    made = (kernels.nsa_block_tokens_gather, kernels.nsa_block_tokens_scatter)
    return [x.__name__ for x in made if x.device_caches[0][0]]


def rehearse_layer() -> set[str]:
    """Names of all modules after a layer has rehearsed its first call, of which nothing is made."""
    from nsa import NSAConfig, NSAttention, module
    from nsa.backends.compiled import steps

    def submit(self: object, make: object) -> Future[object]:
        made = Future[object]()
        made.set_result(object())
        return made

    with pytest.MonkeyPatch.context() as patch:
        pretend(patch)
        patch.setattr(build._Loading, "submit", submit)
        patch.setattr(steps, "INTERPRETED", True)  # for tensors that are on no GPU
        patch.setattr(steps, "cpu_refusal", lambda: None)
        patch.setattr(module, "launches_itself", lambda chosen, x: True)
        patch.setattr(module, "launches_soon", lambda x: True)
        config = NSAConfig(num_heads=4, num_kv_heads=2, head_dim=32)
        layer = NSAttention(64, config, backend="compiled", dtype=torch.bfloat16)
        layer.build_kernels(torch.empty(1, 300, 64, dtype=torch.bfloat16))
        assert build._BUILT
    return {*sys.modules}
