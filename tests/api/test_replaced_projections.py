"""A module that stands in the place of a projection is called, and asked for nothing more."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from nsa import NSAttention
from tests.support.entries import refused
from tests.support.layers import CONFIG, DIM, make_layer, problem

BRANCHES = ("compressed", "selected", "window")
PLACES = (
    "q_proj",
    *(f"{part}_proj.{branch}" for part in "kv" for branch in BRANCHES),
    "o_proj",
    "gate_proj",
    "compress_k",
    "compress_v",
    "compress_k.up",
    "compress_v.down",
)
PACKED = (13, 0, 3, 21)


class Wrapper(nn.Module):
    """What adapters are: the module they wrap, and something beside it; no weight of its own."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, *args: Tensor) -> Tensor:
        out = self.base(*args)
        return out + self.shift.to(out.dtype)


class Quantised(nn.Module):
    """Whole numbers and a step; it takes any float dtype and gives it back."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        step = linear.weight.detach().abs().amax() / 127
        self.register_buffer("numbers", (linear.weight.detach() / step).round().to(torch.int8))
        self.register_buffer("step", step)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.numbers * self.step).to(x.dtype)
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def replaced(layer: NSAttention, place: str, make: Callable[[nn.Module], nn.Module]) -> None:
    parent, _, name = place.rpartition(".")
    owner = layer.get_submodule(parent)
    setattr(owner, name, make(getattr(owner, name)))


def everywhere(layer: NSAttention, make: Callable[[nn.Module], nn.Module]) -> None:
    for place in PLACES[:9]:
        replaced(layer, place, make)


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("lengths", [None, PACKED], ids=["regular", "packed"])
@pytest.mark.parametrize("place", PLACES)
def test_each_may_be_wrapped(place: str, lengths: tuple[int, ...] | None) -> None:
    """The same output and gradients, the wrapper's own included."""
    layer, case = make_layer(backend="sdpa"), problem(lengths)
    want = layer(case.x, cu_seqlens=case.cu_seqlens)
    (dx,) = torch.autograd.grad(want, case.x, case.dout)
    replaced(layer, place, Wrapper)
    out = layer(case.x, cu_seqlens=case.cu_seqlens)
    torch.testing.assert_close(out, want)
    shift = layer.get_parameter(f"{place}.shift")
    got, of_shift = torch.autograd.grad(out, (case.x, shift), case.dout)
    torch.testing.assert_close(got, dx)
    assert of_shift.isfinite()


@pytest.mark.parametrize(
    "make", [Wrapper, pytest.param(nn.Sequential, marks=pytest.mark.slow), Quantised]
)
def test_all_may_be_replaced(make: Callable[[nn.Module], nn.Module]) -> None:
    """No projection has a weight: the layer takes x as it is, under autocast too, and compiled."""
    layer, case = make_layer(dtype=torch.float32, backend="sdpa"), problem(None, torch.float32)
    want = layer(case.x)
    everywhere(layer, make)
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=False)
    for attend in (layer, compiled):
        loose = {"rtol": 0.1, "atol": 0.1} if make is Quantised else {}
        out = attend(case.x)
        torch.testing.assert_close(out, want, **loose)
        out.sum().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = attend(case.x)
        torch.testing.assert_close(out.float(), want, rtol=0.1, atol=0.1)
        out.sum().backward()


def test_quantised_projections_take_other_dtypes() -> None:
    layer = make_layer(dtype=torch.float32, backend="sdpa")
    everywhere(layer, Quantised)
    layer.compress_k.to(torch.bfloat16)
    layer.compress_v.to(torch.bfloat16)
    assert layer(torch.randn(1, 20, DIM, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("place", [*PLACES[1:7], "gate_proj"])
def test_the_dtype_of_q_is_that_of_all(place: str) -> None:
    """A projection may answer in another, a gate kept in fp32 for example."""

    class Single(Wrapper):
        def forward(self, x: Tensor) -> Tensor:
            return self.base(x).float()

    layer, case = make_layer(backend="sdpa"), problem(None)
    want = layer(case.x)
    replaced(layer, place, Single)
    out = layer(case.x)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_x_is_held_to_the_projections_that_have_a_weight() -> None:
    layer = NSAttention(DIM, CONFIG)
    layer.q_proj = nn.Sequential(layer.q_proj)
    with refused("x: expected the layer's dtype torch.float32, got torch.float64"):
        layer(torch.zeros(1, 5, DIM).double())
    with refused("x: expected the layer's device cpu, got meta"):
        layer(torch.zeros(1, 5, DIM, device="meta"))


def test_wrapped_layers_can_be_reset() -> None:
    """Every gate half open again, the rest drawn as it was."""
    layer = NSAttention(DIM, CONFIG)
    for place in reversed(PLACES):
        replaced(layer, place, nn.Sequential if place.startswith("gate") else Wrapper)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7.0)
    layer.reset_parameters()
    assert not layer.gate_proj[0].bias.any()
    assert not any((parameter == 7.0).all() for parameter in layer.parameters() if parameter.dim())
