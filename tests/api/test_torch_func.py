"""``torch.func`` over the functions and the layer: what works, and what says that it does not.

Operators are differentiable once, in reverse mode: ``grad``, ``vjp`` and ``vmap`` of them work, as
``functional_call`` does. Forward mode and second derivatives raise on every backend but the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap

from nsa import NSAttention, nsa_attention, use_settings
from nsa.core import compile as core_compile
from nsa.testing import Inputs, make_inputs
from tests.support.layers import CONFIG, LENGTHS, agree, by_part, gradients, make_layer, problem

BACKENDS = pytest.mark.parametrize("backend", ["sdpa", "fa2-dense", "fa2-varlen", "compiled"])
LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["regular", "packed"])
# of torch.jit, by jvp; torch 2.14 gives them another class
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def fa2_by_math() -> Iterator[None]:
    with use_settings(fa2_provider="math"):
        yield


@pytest.fixture(autouse=True)
def quiet_loops() -> Iterator[None]:
    """vmap of an operator is a loop, of which torch warns; beside an exception it cannot."""
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_warning_enabled(True)


def case(packed: bool = False) -> Inputs:
    shape: dict[str, object] = {"lengths": LENGTHS} if packed else {"length": 30, "batch": 2}
    return make_inputs(CONFIG, dtype=torch.float64, **shape)  # type: ignore[arg-type]


def attention(x: Inputs, backend: str) -> Callable[..., Tensor]:
    """:func:`nsa_attention` of nothing but the leaves."""

    def attend(*leaves: Tensor) -> Tensor:
        y = x.with_leaves(leaves)
        return nsa_attention(
            y.q,
            y.compressed,
            y.selected,
            y.window,
            y.gates,
            CONFIG,
            cu_seqlens=x.cu_seqlens,
            max_seqlen=x.max_seqlen,
            backend=backend,
        )

    return attend


def detached(x: Inputs) -> tuple[Tensor, ...]:
    return tuple(y.detach() for y in x.leaves())


def skip_dense(backend: str, packed: bool) -> None:
    if backend == "fa2-dense" and packed:
        pytest.skip("fa2-dense takes regular batches only")


# Functions


@LAYOUTS
@BACKENDS
def test_vjp_is_autograd(backend: str, packed: bool) -> None:
    skip_dense(backend, packed)
    x = case(packed)
    attend = attention(x, backend)
    out, pull = vjp(attend, *detached(x))
    want = attend(*x.leaves())
    torch.testing.assert_close(out, want)
    for got, expected in zip(
        pull(x.dout), torch.autograd.grad(want, x.leaves(), x.dout), strict=True
    ):
        torch.testing.assert_close(got, expected)


@BACKENDS
def test_vmap_of_grad_is_a_loop(backend: str) -> None:
    """Gradients of each sample."""
    samples = [make_inputs(CONFIG, length=30, dtype=torch.float64, seed=seed) for seed in range(3)]
    dout = samples[0].dout
    attend = attention(samples[0], backend)

    def loss(*leaves: Tensor) -> Tensor:
        return (attend(*leaves) * dout).sum()

    every = tuple(range(8))
    stacked = [torch.stack(x) for x in zip(*map(detached, samples), strict=True)]
    got = vmap(grad(loss, argnums=every))(*stacked)
    for i, x in enumerate(samples):
        want = torch.autograd.grad(loss(*x.leaves()), x.leaves())
        for mine, expected in zip(got, want, strict=True):
            torch.testing.assert_close(mine[i], expected)


def test_gradients_of_a_batch_by_vmap_reach_autograd() -> None:
    """vmap inside, ``Tensor.backward`` outside."""
    x = make_inputs(CONFIG, length=30, dtype=torch.float64)
    attend = attention(x, "sdpa")
    twice = [torch.stack([y, y]).requires_grad_() for y in detached(x)]
    grads = torch.autograd.grad((vmap(attend)(*twice) * x.dout).sum(), twice)
    want = torch.autograd.grad(attend(*x.leaves()), x.leaves(), x.dout)
    for got, expected in zip(grads, want, strict=True):
        torch.testing.assert_close(got, torch.stack([expected, expected]))


@BACKENDS
def test_second_derivatives_raise(backend: str) -> None:
    """Where a transform stands around another, and where autograd stands around one: no zeros."""
    x = case()
    attend = attention(x, backend)

    def first(*leaves: Tensor) -> Tensor:
        return grad(lambda *y: attend(*y).sum())(*leaves).sum()

    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        grad(first)(*detached(x))
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        first(*x.leaves()).backward()


FORWARD_MODE = (
    r"nsa::\w+: forward mode \(torch.func.jvp, jacfwd, hessian\) is not implemented; use reverse "
    r"mode \(torch.func.grad, vjp, jacrev\) or backend='reference'"
)


@BACKENDS
def test_forward_mode_raises(backend: str) -> None:
    """It would otherwise drop the tangents of what an operator computes."""
    x = case()
    attend, leaves = attention(x, backend), detached(x)
    for i in (0, 3, 4):  # q, and keys and values of the selected branch
        alone = [*leaves]
        with forward_ad.dual_level():
            alone[i] = forward_ad.make_dual(leaves[i], torch.ones_like(leaves[i]))
            with pytest.raises(NotImplementedError, match=FORWARD_MODE):
                attend(*alone)
    with pytest.raises(NotImplementedError, match=FORWARD_MODE):
        jvp(attend, leaves, leaves)
    with pytest.raises(NotImplementedError, match=FORWARD_MODE):
        hessian(lambda q: attend(q, *leaves[1:]).sum())(leaves[0])
    each = vmap(grad(lambda q: attend(q, *leaves[1:]).sum()))
    with pytest.raises(NotImplementedError, match=FORWARD_MODE):
        jvp(each, (leaves[0][None],), (leaves[0][None],))


def test_forward_mode_of_gates_needs_no_operator() -> None:
    """They weigh what the operators gave: no tangent enters one."""
    x = case()
    attend, leaves = attention(x, "sdpa"), detached(x)
    tangent = torch.randn_like(leaves[-1])
    out, push = jvp(lambda gates: attend(*leaves[:-1], gates), leaves[-1:], (tangent,))
    torch.testing.assert_close(push, attend(*leaves[:-1], tangent))


def test_the_oracle_has_forward_mode() -> None:
    """What the message sends people to: ``<u, J t>`` is ``<J^T u, t>`` with sdpa's gradients."""
    x = case()
    leaves = detached(x)
    tangents = tuple(torch.randn_like(y) for y in leaves)
    _, push = jvp(attention(x, "reference"), leaves, tangents)
    _, pull = vjp(attention(x, "sdpa"), *leaves)
    back = sum((g * t).sum() for g, t in zip(pull(x.dout), tangents, strict=True))
    torch.testing.assert_close((push * x.dout).sum(), back)


# In a graph


def test_grad_in_one_graph() -> None:
    torch._dynamo.reset()
    x = case()
    attend, leaves = attention(x, "compiled"), detached(x)
    gradient = grad(lambda *y: (attend(*y) * x.dout).sum(), argnums=(0, 3))
    traced = torch.compile(gradient, fullgraph=True, dynamic=False, backend="aot_eager")
    for got, want in zip(traced(*leaves), gradient(*leaves), strict=True):
        torch.testing.assert_close(got, want)
    torch._dynamo.reset()


def test_compiled_says_that_it_compiles_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own rule, and its own words: a transform belongs inside ``torch.compile``."""
    monkeypatch.setattr(core_compile, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    x = case()
    attend = attention(x, "compiled")
    with pytest.raises(
        torch._dynamo.exc.Unsupported,
        match=r"torch.func.grad is also wrapped within a torch.compile",
    ):
        grad(lambda *y: attend(*y).sum())(*detached(x))
    torch._dynamo.reset()


# The layer


def layer(backend: str) -> NSAttention:
    return make_layer(backend=backend)


@pytest.mark.parametrize("value_dim", [6, None], ids=["apart", "alike"])
@BACKENDS
def test_functional_call(backend: str, value_dim: int | None) -> None:
    """Other parameters than the layer's own, and gradients for them."""
    config = replace(CONFIG, value_dim=value_dim)
    mine, x = make_layer(config, backend=backend), problem(None)
    weights = {name: y.detach() * 1.5 for name, y in mine.named_parameters()}
    other = make_layer(config, backend=backend)
    other.load_state_dict(weights)
    want = other(x.x)
    torch.testing.assert_close(functional_call(mine, weights, (x.x,)), want)

    def loss(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return (functional_call(mine, weights, (tokens,)) * x.dout).sum()

    got, dx = grad(loss, argnums=(0, 1))(weights, x.x.detach())
    agree(by_part({"x": dx, **got}), by_part(gradients(other, want, x)))
    assert all(y.grad is None for y in mine.parameters())


def test_gradients_of_each_sample_of_a_layer() -> None:
    mine, x = layer("sdpa"), problem(None)
    weights = {name: y.detach() for name, y in mine.named_parameters()}

    def loss(weights: dict[str, Tensor], tokens: Tensor, dout: Tensor) -> Tensor:
        return (functional_call(mine, weights, (tokens[None],)) * dout).sum()

    got = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x.x.detach(), x.dout)
    for i in range(2):
        alone = x._replace(x=x.x.detach()[i : i + 1].requires_grad_(), dout=x.dout[i : i + 1])
        want = gradients(mine, mine(alone.x), alone)
        del want["x"]
        agree(by_part({name: y[i] for name, y in got.items()}), by_part(want))
