"""A layer over the Triton kernels saves no two views of one memory: see the helper."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from nsa import NSAttention
from tests.support.layers import CONFIG, DIM
from tests.support.saved_tensors import saved_in_one_memory
from tests.triton_interpreter import triton_fixes

triton_fixes.apply()


@pytest.mark.parametrize("packed", [False, True], ids=["regular", "packed"])
def test_saved_tensors_have_memory_of_their_own(packed: bool) -> None:
    layer = NSAttention(DIM, replace(CONFIG, independent_kv=packed), backend="compiled")
    x = torch.randn(1, 20, DIM, requires_grad=True)
    cu_seqlens = torch.tensor([0, 12, 20], dtype=torch.int32) if packed else None
    assert saved_in_one_memory(layer, x, cu_seqlens=cu_seqlens) == []
