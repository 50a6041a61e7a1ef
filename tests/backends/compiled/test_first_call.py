"""On a GPU a first call builds all that it launches before it launches anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsa import NSAConfig, NSAttention
from nsa.core import build

pytestmark = pytest.mark.gpu
CONFIG = NSAConfig(num_heads=8, num_kv_heads=2, head_dim=48)
"""Heads of a size that no other test has: nothing of it has been built in this process."""
DIM, LENGTH = 256, 4096

WITHOUT_INDUCTOR = """
import sys, torch, nsa
layer = nsa.NSAttention(64, nsa.NSAConfig.preset("tiny"), backend="compiled", device="cuda")
layer(torch.randn(1, 300, 64, device="cuda", requires_grad=True)).sum().backward()
print(layer.resolution.backend, "torch._inductor.compile_fx" in sys.modules)
"""


@pytest.mark.parametrize("packed", [False, True], ids=["regular", "packed"])
def test_nothing_is_built_after_the_rehearsal(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor for lengths of as many bits, nor without gradients."""
    from triton import knobs

    built: list[str] = []

    def listen(*, src: object, **others: object) -> None:
        built.append(src.fn.__name__)  # type: ignore[attr-defined]

    monkeypatch.setattr(knobs.compilation, "listener", listen)
    monkeypatch.setattr(build, "_BUILT", set())
    where = {"device": "cuda", "dtype": torch.bfloat16}
    layer = NSAttention(DIM, CONFIG, backend="compiled", **where)

    def given(length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = torch.randn(1, length, DIM, **where, requires_grad=True)
        ends = torch.tensor([0, length // 3, length], dtype=torch.int32, device="cuda")
        return x, ends if packed else None

    x, cu_seqlens = given(LENGTH)
    layer.build_kernels(x, cu_seqlens)
    assert built
    built.clear()
    for length in (LENGTH, LENGTH + 1003, 2 * LENGTH - 1):
        x, cu_seqlens = given(length)
        layer(x, cu_seqlens=cu_seqlens).sum().backward()
        with torch.no_grad():
            layer(x, cu_seqlens=cu_seqlens)
    assert built == []


def test_inductor_is_not_even_imported(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_INDUCTOR],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["compiled", "False"]
