"""No two tensors that are saved for a compiled backward share memory: see the helper.

``tests/mutations.py`` has the line that keeps it so. The Triton kernels' layer: triton_interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa import NSAttention, use_settings
from tests.support.layers import CONFIG, DIM
from tests.support.saved_tensors import saved_in_one_memory

CASES = {
    "mlp": {},
    "one head size, softmax": {"value_dim": None, "gate": "softmax"},
    "shared keys, no RoPE": {"independent_kv": False, "rope_theta": None},
    "linear": {"compression": "linear"},
    "mean": {"compression": "mean"},
}


def runs() -> Iterator[Any]:
    """Backend, case, packed; of ``fa2-varlen``, whose layer is the same, most take patience."""
    for backend in ("sdpa", "fa2-varlen"):
        for case in CASES:
            for packed in (False, True):
                name = f"{backend}-{case}-{'packed' if packed else 'regular'}"
                quick = backend == "sdpa" or (case, packed) == ("mlp", True)
                marks = () if quick else pytest.mark.slow
                yield pytest.param(backend, case, packed, id=name, marks=marks)


@pytest.mark.parametrize(("backend", "case", "packed"), [*runs()])
def test_saved_tensors_have_memory_of_their_own(backend: str, case: str, packed: bool) -> None:
    with use_settings(fa2_provider="math"):
        layer = NSAttention(DIM, replace(CONFIG, **CASES[case]), backend=backend)  # type: ignore[arg-type]
    x = torch.randn(1 if packed else 2, 50, DIM, requires_grad=True)
    cu_seqlens = torch.tensor([0, 20, 50], dtype=torch.int32) if packed else None
    assert saved_in_one_memory(layer, x, cu_seqlens=cu_seqlens) == []
