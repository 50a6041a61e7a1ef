"""``torch.use_deterministic_algorithms`` on a GPU: the same bits in every run and every batch.

On a CPU: tests/triton_interpreter/test_deterministic.py and tests/backends/test_deterministic.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa import NSAConfig
from nsa.testing import Inputs, attention_parity, make_inputs, random_blocks
from tests.support.backends import available
from tests.support.deterministic import deterministic, results, row, row_of, unequal

pytestmark = pytest.mark.gpu

SMALL = NSAConfig(num_heads=12, num_kv_heads=2, head_dim=64)
"""Heads that sum dq beside dk and dv, at these lengths."""
WIDE = NSAConfig(num_heads=16, num_kv_heads=1, head_dim=128)
SHARED = replace(WIDE, select_share=4)
CONFIGS = {"small": SMALL, "wide": WIDE, "shared": SHARED}
SHAPES: dict[str, dict[str, Any]] = {
    "regular": {"length": 2500, "batch": 2},
    "packed": {"lengths": (2300, 0, 170, 1, 640)},
}
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def _cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses its matrix products under the mode without."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def problem(config: NSAConfig, shape: dict[str, Any]) -> Inputs:
    return make_inputs(config, dtype=torch.bfloat16, device="cuda", **shape)


@EVERY_SHAPE
@EVERY_CONFIG
def test_every_run_is_the_same(config: NSAConfig, shape: dict[str, Any]) -> None:
    x = problem(config, shape)
    with deterministic():
        assert unequal(*(results(x, "compiled") for _ in range(3))) == []


@EVERY_SHAPE
@EVERY_CONFIG
def test_parity(config: NSAConfig, shape: dict[str, Any]) -> None:
    x = problem(config, shape)
    x = replace(x, block_idx=random_blocks(x, 16))
    with deterministic():
        rows = attention_parity("compiled", x)
    assert [row for row in rows if not row.ok] == []


@EVERY_CONFIG
def test_a_row_alone_and_in_a_batch(config: NSAConfig) -> None:
    x = problem(config, SHAPES["regular"])
    with deterministic():
        assert unequal(row_of(results(x, "compiled"), 1), results(row(x, 1), "compiled")) == []


@pytest.mark.parametrize("backend", ["sdpa", "fa2-dense", "fa2-varlen"])
def test_other_backends(backend: str) -> None:
    x = problem(SMALL, {"length": 700})
    if backend not in available("cuda", torch.bfloat16):
        pytest.skip(f"{backend} cannot run here")
    with deterministic():
        assert unequal(*(results(x, backend) for _ in range(3))) == []
