"""Compiled autograd over an eager forward: the same gradients, from every backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa import nsa_attention
from nsa.core.block_tokens.op import block_means
from nsa.testing import Inputs, make_inputs, random_blocks
from tests.compile.test_configurations import CONFIG
from tests.support.backends import fa2_by_math, refuses_packed

# torch reads it itself
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def gradients(x: Inputs, backend: str, window: int, *, compiled: bool) -> tuple[Tensor, ...]:
    config = replace(CONFIG, window=window)
    for leaf in x.leaves():
        leaf.grad = None
    out = nsa_attention(
        x.q,
        x.compressed,
        x.selected,
        x.window,
        x.gates,
        config,
        cu_seqlens=x.cu_seqlens,
        max_seqlen=x.max_seqlen,
        block_idx=x.block_idx,
        backend=backend,
    )
    with under_compiled_autograd() if compiled else nullcontext():
        out.backward(x.dout)
    return tuple(leaf.grad.clone() for leaf in x.leaves() if leaf.grad is not None)


def under_compiled_autograd() -> AbstractContextManager[None]:
    compiler = torch.compile(backend="eager", fullgraph=True, dynamic=False)
    return torch._dynamo.compiled_autograd._enable(compiler)


def test_an_operator() -> None:
    """Of two configurations in turn: a graph made for one does not serve the other."""
    x = torch.randn(1, 12, 1, 3, requires_grad=True)
    for block in (4, 6, 4):
        config = replace(CONFIG, compress_block=block, select_block=6)
        with under_compiled_autograd():
            block_means(x, config).square().sum().backward()
        got, x.grad = x.grad, None
        block_means(x, config).square().sum().backward()
        assert got is not None
        assert torch.equal(got, x.grad)
        x.grad = None
    assert torch._dynamo.utils.counters["compiled_autograd"]["captures"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("packed", [False, True], ids=["regular", "packed"])
@pytest.mark.parametrize("backend", ["sdpa", "fa2-dense", "fa2-varlen", "compiled"])
def test_gradients(backend: str, packed: bool) -> None:
    if packed and refuses_packed(backend):
        return
    shape = {"lengths": (11, 0, 9)} if packed else {"length": 20, "batch": 2}
    x = make_inputs(CONFIG, dtype=torch.float32, **shape)
    x = replace(x, block_idx=random_blocks(x, 2))
    with fa2_by_math("cpu"):
        for window in (3, 7):
            got = gradients(x, backend, window, compiled=True)
            want = gradients(x, backend, window, compiled=False)
            assert len(got) == len(want) == len(x.leaves())
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["compiled_autograd"]["captures"] > 0
