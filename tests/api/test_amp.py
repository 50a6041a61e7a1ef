"""Automatic mixed precision: the layer under ``torch.autocast``, and ``GradScaler`` over it.

Autocast lowers the projections, and attention computes in what they give: the layer is the one that
has been cast, and its fp32 parameters get the gradients of that one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa import NSAttention
from tests.support.backends import fa2_by_math
from tests.support.layers import (
    CONFIG,
    LENGTHS,
    Problem,
    agree,
    by_part,
    gradients,
    make_layer,
    problem,
)

EVERY_BLOCK = replace(CONFIG, num_selected=8)
"""Rounding must not decide which blocks are read."""
LAYOUTS = pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["regular", "packed"])
TARGETS = pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param(name, device, marks=[pytest.mark.gpu] if device == "cuda" else [])
        for device in ("cpu", "cuda")
        for name in ("sdpa", "fa2-dense", "compiled")
    ],
)


def layer_and_problem(
    backend: str, device: str, lengths: tuple[int, ...] | None = None
) -> tuple[NSAttention, Problem]:
    """An fp32 layer, and an input that is exact in fp16 and bf16."""
    if backend == "fa2-dense" and lengths is not None:
        pytest.skip("fa2-dense takes regular batches only")
    with fa2_by_math(device):  # the layer binds it
        layer = make_layer(EVERY_BLOCK, dtype=torch.float32, backend=backend).to(device)
    case = problem(lengths, torch.float32, device)
    x = (case.x.detach() * 8).round() / 8
    return layer, case._replace(x=x.requires_grad_())


def run(layer: NSAttention, case: Problem) -> dict[str, Tensor]:
    out = layer(case.x, cu_seqlens=case.cu_seqlens)
    return {"out": out, **gradients(layer, out, case)}


def cast(layer: NSAttention, case: Problem, dtype: torch.dtype) -> tuple[NSAttention, Problem]:
    """The same layer in another dtype, made in the same way, and its input."""
    with fa2_by_math(case.x.device.type):
        low = make_layer(EVERY_BLOCK, dtype=torch.float32, backend=layer.backend)
    low.load_state_dict(layer.state_dict())
    x = case.x.detach().to(dtype).requires_grad_()
    return low.to(case.x.device, dtype), case._replace(x=x, dout=case.dout.to(dtype))


@LAYOUTS
@TARGETS
def test_autocast_is_the_cast_layer(
    backend: str, device: str, lengths: tuple[int, ...] | None
) -> None:
    layer, case = layer_and_problem(backend, device, lengths)
    with torch.autocast(device, torch.bfloat16):
        out = layer(case.x, cu_seqlens=case.cu_seqlens)
    assert out.dtype == torch.bfloat16
    assert layer.resolution is not None
    assert layer.resolution.backend == backend
    got = {"out": out, **gradients(layer, out, case)}  # a backward pass stands outside autocast
    want = run(*cast(layer, case, torch.bfloat16))
    assert {x.dtype for name, x in got.items() if name != "out"} == {torch.float32}
    if device == "cpu":
        assert [
            name for name, x in want.items() if not torch.equal(got[name], x.to(got[name]))
        ] == []
    agree(by_part(got), by_part(want), torch.finfo(torch.bfloat16).eps)


def test_autocast_in_a_graph() -> None:
    """The forward pass is traced under autocast, and the backward pass with it."""
    torch._dynamo.reset()
    layer, case = layer_and_problem("compiled", "cpu")
    traced = torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out = traced(case.x)
    assert out.dtype == torch.bfloat16
    got = {"out": out, **gradients(layer, out, case)}
    want = run(*cast(layer, case, torch.bfloat16))
    agree(by_part(got), by_part(want), torch.finfo(torch.bfloat16).eps)
    torch._dynamo.reset()


@TARGETS
def test_grad_scaler(backend: str, device: str) -> None:
    """fp16 with a scaled loss: unscaled gradients are those of the cast layer, a step is taken."""
    layer, case = layer_and_problem(backend, device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**7)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = {name: x.detach().clone() for name, x in layer.named_parameters()}
    with torch.autocast(device, torch.float16):
        loss = (layer(case.x) * case.dout).sum()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    low, low_case = cast(layer, case, torch.float16)
    want = run(low, low_case._replace(dout=low_case.dout * 2.0**7))
    got = {name: x.grad * 2.0**7 for name, x in layer.named_parameters() if x.grad is not None}
    del want["out"], want["x"]
    agree(by_part(got), by_part(want), 4 * torch.finfo(torch.float16).eps)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**7  # no gradient was infinite
    after = dict(layer.named_parameters())
    assert not any(torch.equal(after[name], x) for name, x in before.items() if got[name].any())


@TARGETS
def test_grad_scaler_skips_a_step_that_overflows(backend: str, device: str) -> None:
    layer, case = layer_and_problem(backend, device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**30)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = {name: x.detach().clone() for name, x in layer.named_parameters()}
    with torch.autocast(device, torch.float16):
        loss = (layer(case.x) * case.dout).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**29
    assert all(torch.equal(x, before[name]) for name, x in layer.named_parameters())
