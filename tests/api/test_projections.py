"""The layer's projections as one product, and when they are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nsa import NSAttention
from tests.support.layers import CONFIG, DIM


def _biased(layer: NSAttention) -> None:
    layer.q_proj = nn.Linear(DIM, layer.q_proj.out_features, bias=True)


def _patched(layer: NSAttention) -> None:
    forward = layer.q_proj.forward
    layer.q_proj.forward = lambda x: forward(x) + 5  # type: ignore[method-assign]


def _hooked(layer: NSAttention) -> None:
    layer.q_proj.register_forward_hook(lambda module, args, out: out + 5)


def _adapted(layer: NSAttention) -> None:
    """An adapter that shows the weight of what it wraps."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 5

    layer.compress_k.up = Adapter(layer.compress_k.up)  # type: ignore[assignment]


def _without_gate_bias(layer: NSAttention) -> None:
    layer.gate_proj = nn.Linear(DIM, layer.gate_proj.out_features, bias=False)


@pytest.mark.parametrize("change", [_biased, _patched, _hooked, _adapted, _without_gate_bias])
def test_a_projection_that_is_more_than_a_product_is_called(
    change: Callable[[NSAttention], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its effect where projections are joined, and the same as where they never are."""
    torch.manual_seed(0)
    layer = NSAttention(DIM, CONFIG, backend="sdpa")
    x = torch.randn(2, 200, DIM)
    before = layer(x)
    change(layer)
    after = layer(x)
    assert not torch.allclose(before, after)
    monkeypatch.setattr("nsa.core.linear.is_unmodified", lambda linear: False)
    monkeypatch.setattr("nsa.compression.is_unmodified", lambda linear: False)
    torch.testing.assert_close(after, layer(x))


def test_joined_projections_are_the_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also their gradients."""
    layer = NSAttention(DIM, CONFIG, backend="sdpa")
    x = torch.randn(2, 200, DIM, requires_grad=True)
    leaves = (x, *layer.parameters())
    joined = torch.autograd.grad(layer(x).sum(), leaves)
    monkeypatch.setattr("nsa.core.linear.is_unmodified", lambda linear: False)
    monkeypatch.setattr("nsa.compression.is_unmodified", lambda linear: False)
    for a, b in zip(joined, torch.autograd.grad(layer(x).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
