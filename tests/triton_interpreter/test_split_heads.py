"""The product of all projections to rotated heads in Triton's interpreter, against PyTorch's."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from nsa import NSAConfig, NSAttention
from nsa.core import angles
from nsa.core.linear import ROW_ALIGNMENT
from nsa.core.rope import Angles, _table, apply_rope, rope_angles, rope_table
from nsa.core.split_heads.op import split_heads, widths
from tests.support.layers import CONFIG, DIM
from tests.triton_interpreter import triton_fixes

triton_fixes.apply()

CONFIGS = {
    "independent": CONFIG,
    "shared": replace(CONFIG, independent_kv=False, num_heads=6, head_dim=10),
    "no rope": replace(CONFIG, rope_theta=None, value_dim=None),
    "wide": replace(CONFIG, head_dim=80, num_heads=10, value_dim=64),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def in_torch(
    product: Tensor, bias: Tensor | None, positions: Tensor | None, config: NSAConfig
) -> list[Tensor]:
    sizes = widths(config)
    q, *heads, gates = product.split([*sizes, product.shape[-1] - sum(sizes)], -1)[:-1]
    keys = heads[: len(heads) // 2]

    def rotated(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (-1, config.head_dim))
        return x if config.rope_theta is None else apply_rope(x, config.rope_theta, positions)

    if bias is not None:
        gates = gates + bias.to(gates.dtype)
    values = [v.unflatten(-1, (-1, config.dv)) for v in heads[len(keys) :]]
    return [rotated(q), *map(rotated, keys), *values, gates.unflatten(-1, (-1, 3))]


@pytest.mark.parametrize("packed", [False, True], ids=["regular", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_both_ways(name: str, dtype: torch.dtype, packed: bool) -> None:
    """To the bit, from a product with and without gaps between its rows, biases of two dtypes."""
    config, generator = CONFIGS[name], torch.Generator().manual_seed(0)
    B, T = (1, 9) if packed else (2, 5)
    P = sum(widths(config))
    P += -P % ROW_ALIGNMENT + (ROW_ALIGNMENT if packed else 0)
    product = torch.randn(B, T, P, generator=generator).to(dtype)
    if packed:  # not contiguous
        product = torch.randn(B, P, T, generator=generator).to(dtype).mT
    product.requires_grad_()
    bias_dtype = torch.float32 if packed else dtype
    bias = torch.randn(3 * config.num_heads, generator=generator).to(bias_dtype).requires_grad_()
    positions = torch.tensor([0, 1, 2, 0, 1, 70_000, 70_001, 5, 0]) if packed else torch.arange(T)
    turned = None
    if config.rope_theta is not None:
        tables = rope_table(positions, config.head_dim, config.rope_theta, torch.float32)
        turned = Angles(*tables)
    q, keys, values, gates = split_heads(product, bias, turned, config)
    got, want = [q, *keys, *values, gates], in_torch(product, bias, positions, config)
    for a, b in zip(got, want, strict=True):
        assert a.is_contiguous()
        assert torch.equal(a, b)
    used = slice(1, None, 2) if packed else slice(None)  # the others get no gradient
    douts = [torch.randn(x.shape, generator=generator).to(dtype) for x in want]
    # the gates' bias sums in another order
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    grads = torch.autograd.grad(got[used], (product, bias), douts[used])
    wants = torch.autograd.grad(want[used], (product, bias), douts[used])
    assert torch.equal(grads[0], wants[0])
    torch.testing.assert_close(grads[1], wants[1], **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_table_of_angles(dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 2, 1000, 999_999], dtype=torch.int32)
    got = angles.table(positions, 10, 500_000.0, dtype)
    for a, b in zip(got, _table(positions, 10, 500_000.0, dtype), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9 if dtype == torch.float64 else 2e-7, atol=1e-9)


class Scaled(nn.Linear):
    """More than a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class InFloat(nn.Linear):
    """A gate that stays fp32 under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


@pytest.mark.parametrize(
    ("kernel", "autocast", "change"),
    [
        (True, False, None),
        (True, True, None),
        (True, False, Scaled),
        (True, False, nn.Linear),  # with a bias
        (False, True, InFloat),
    ],
)
def test_a_layer_projects_alike(
    kernel: bool, autocast: bool, change: type[nn.Linear] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever makes its parts: one kernel while they have one dtype."""
    torch.manual_seed(0)
    layer = NSAttention(DIM, CONFIG, backend="compiled")
    if change is InFloat:
        layer.gate_proj = change(DIM, layer.gate_proj.out_features)
    elif change is not None:
        layer.q_proj = change(DIM, layer.q_proj.out_features, bias=True)
    from nsa import module

    calls = []
    monkeypatch.setattr(module, "split_heads", lambda *x: calls.append(x) or split_heads(*x))
    x = torch.randn(2, 7, DIM, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, want = layer._project_by_kernel(x, None), layer._project(x, None)
    assert bool(calls) == kernel
    got, want = ([y.q, *y.tokens, *y.selected, *y.window, y.gates] for y in (got, want))
    leaves = [x, layer.q_proj.weight, layer.gate_proj.weight, layer.gate_proj.bias]
    douts = [torch.randn_like(y) for y in want]
    grads = [torch.autograd.grad(y, leaves, douts) for y in (got, want)]
    tolerance = {"rtol": 1e-1, "atol": 1e-1} if autocast else {"rtol": 1e-4, "atol": 1e-5}
    for a, b in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tolerance)


def test_a_layer_rotates_by_given_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the kernel where all rows share them, in PyTorch otherwise; packed as well."""
    from nsa import module

    torch.manual_seed(0)
    layer = NSAttention(DIM, replace(CONFIG, rope_theta=None), backend="compiled")
    own = NSAttention(DIM, replace(CONFIG, rope_theta=500.0), backend="compiled")
    own.load_state_dict(layer.state_dict())
    calls = []
    monkeypatch.setattr(module, "split_heads", lambda *x: calls.append(x) or split_heads(*x))
    x, cu_seqlens = torch.randn(2, 7, DIM), torch.tensor([0, 3, 7], dtype=torch.int32)
    given = rope_angles(torch.arange(7), CONFIG.head_dim, 500.0, torch.float32)
    rows = Angles(*(a.expand(2, *a.shape) for a in given))
    packed = Angles(*(torch.cat([a[:3], a[:4]]) for a in given))
    torch.testing.assert_close(layer(x, angles=given), own(x))
    assert len(calls) == 2
    torch.testing.assert_close(layer(x, angles=rows), own(x))
    assert len(calls) == 3
    torch.testing.assert_close(
        layer(x[:1], cu_seqlens=cu_seqlens, angles=packed), own(x[:1], cu_seqlens=cu_seqlens)
    )
    assert len(calls) == 5


def test_wrong_widths_are_refused_as_before() -> None:
    layer = NSAttention(DIM, CONFIG, backend="compiled")
    layer.q_proj = nn.Linear(DIM, 31, bias=False)
    with pytest.raises(RuntimeError, match="31"):
        layer(torch.randn(1, 6, DIM))


@pytest.mark.parametrize(
    "packed",
    [pytest.param(False, marks=pytest.mark.slow, id="regular"), pytest.param(True, id="packed")],
)
def test_in_a_trace(packed: bool) -> None:
    """In one graph for all lengths, and with the numbers of an eager call."""
    layer, graphs = NSAttention(DIM, CONFIG, backend="compiled"), []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph.print_readable(print_output=False))
        return aot_eager(graph, inputs)

    compiled = torch.compile(layer, backend=keep, fullgraph=True)
    for length in (24, 37):  # the second may make it dynamic
        ends = torch.tensor([0, 9, length], dtype=torch.int32) if packed else None
        x = torch.randn(1, length, DIM, requires_grad=True)
        found = []
        for call in (layer, compiled):
            out = call(x, cu_seqlens=ends)
            found.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) <= 2
    assert all("split_heads" in graph for graph in graphs)
