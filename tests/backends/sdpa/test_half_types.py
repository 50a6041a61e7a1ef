"""Gradients of half types on a CPU are those of the same numbers in fp32, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa import NSAConfig
from nsa.backends.sdpa import selected, window
from nsa.testing import make_inputs
from nsa.testing.inputs import random_blocks

CONFIG = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    value_dim=16,
    compress_block=4,
    compress_stride=2,
    select_block=8,
    num_selected=3,
    window=7,
)
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def check(module: Any, tensors: tuple[Tensor, ...], dout: Tensor, *rest: object) -> None:
    out, lse = module._forward(*tensors, *rest)
    half, wide = dout.dtype, [x.float() for x in (dout, *tensors, out)]
    backward: Callable[..., tuple[Tensor, ...]] = module._backward
    wanted = backward(*wide, lse, *rest)
    for got, want in zip(backward(dout, *tensors, out, lse, *rest), wanted, strict=True):
        assert (got.dtype, want.dtype) == (half, torch.float32)
        assert torch.equal(got, want.to(half))


@HALF
def test_selected(dtype: torch.dtype) -> None:
    x = make_inputs(CONFIG, length=45, batch=2, dtype=dtype)
    tensors = tuple(t.detach() for t in (x.q, *x.selected))
    check(selected, tensors, x.dout, random_blocks(x, 4), None, CONFIG.key, 0)


@HALF
def test_window(dtype: torch.dtype) -> None:
    x = make_inputs(CONFIG, length=45, batch=2, dtype=dtype)
    q, *kv = (t.detach() for t in (x.q, *x.window))
    check(window, (q.unflatten(2, (2, 2)), *kv), x.dout.unflatten(2, (2, 2)), None, 7, 0, 0.25)
