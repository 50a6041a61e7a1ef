"""What a compiled layer over the Triton kernels, in one graph, keeps for backward, beside the
formulas."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from nsa import NSAttention, compression
from nsa.memory import layer_memory
from tests.support.layers import CONFIG, DIM
from tests.support.saved_tensors import saved_bytes
from tests.triton_interpreter import triton_fixes

triton_fixes.apply()

CASES: dict[str, dict[str, Any]] = {
    "mlp": {"value_dim": None},
    "mean, shared, no RoPE": {"compression": "mean", "independent_kv": False, "rope_theta": None},
    "linear, Dk is not Dv": {"compression": "linear"},
}


@pytest.mark.parametrize(
    ("case", "recompute"),
    [
        ("mlp", False),
        ("mlp", True),
        *(
            pytest.param(case, recompute, marks=pytest.mark.slow)
            for case in list(CASES)[1:]
            for recompute in (False, True)
        ),
    ],
)
def test_a_compiled_layer_keeps_what_the_formula_says(monkeypatch, case, recompute) -> None:
    monkeypatch.setattr(compression, "batching_pays", lambda x: True)  # as on a GPU
    config = replace(CONFIG, **CASES[case])
    layer = NSAttention(DIM, config, backend="compiled", dtype=torch.bfloat16, recompute=recompute)
    T = 20
    x = torch.randn(1, T, DIM, dtype=torch.bfloat16, requires_grad=True)
    memory = layer_memory(
        config, DIM, batch=1, length=T, dtype=x.dtype, backend="compiled", recompute=recompute
    )
    kept = (tensor.bytes for tensor in memory.kept if not (recompute and tensor.name == "sum"))
    assert sum(kept) == saved_bytes(layer, x)  # a graph computes the sum again, too


@pytest.mark.slow
def test_under_autocast(monkeypatch) -> None:
    monkeypatch.setattr(compression, "batching_pays", lambda x: True)
    config = replace(CONFIG, value_dim=None)
    layer = NSAttention(DIM, config, backend="compiled")
    x = torch.randn(1, 20, DIM, requires_grad=True)
    memory = layer_memory(
        config,
        DIM,
        batch=1,
        length=20,
        dtype=torch.bfloat16,
        backend="compiled",
        autocast=True,
    )
    assert memory.parameters == sum(p.nbytes for p in layer.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert memory.saved == saved_bytes(layer, x)
