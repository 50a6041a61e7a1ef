"""Edges that are legal: one token, fewer than a block, empty sequences, strided tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nsa import KV, use_settings
from nsa.testing import make_inputs
from tests.support.entries import CONFIG, REGULAR, attention, selection


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize(
    "lengths", [1, 3, 4, 6, 7, (1,), (3, 3), (0, 5, 0), (0, 1), (0,), (0, 0, 0)], ids=str
)
def test_edges_run_forward_and_backward(lengths: int | tuple[int, ...], backend: str) -> None:
    if isinstance(lengths, int):
        inputs = make_inputs(CONFIG, length=lengths, batch=2)
    else:
        inputs = make_inputs(CONFIG, lengths=lengths)
    with use_settings(check=True):
        out = attention(inputs, backend)
        assert selection(inputs, backend).shape == (*inputs.q.shape[:2], 2, 4)
    assert out.shape == (*inputs.q.shape[:3], CONFIG.dv)
    assert out.isfinite().all()
    for leaf, grad in zip(
        inputs.leaves(), torch.autograd.grad(out.sum(), inputs.leaves()), strict=True
    ):
        assert grad.shape == leaf.shape
        assert grad.isfinite().all()


@pytest.mark.parametrize("lengths", [(0,), (0, 0)])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_surplus_rows_of_empty_sequences(lengths: tuple[int, ...], backend: str) -> None:
    inputs = make_inputs(CONFIG, lengths=lengths)
    rows = KV(torch.ones(1, 3, 2, 8).requires_grad_(), torch.ones(1, 3, 2, 6).requires_grad_())
    inputs = replace(inputs, compressed=rows)
    out = attention(inputs, backend)
    assert out.shape == (1, 0, 4, 6)
    assert selection(inputs, backend).shape == (1, 0, 2, 4)
    for grad in torch.autograd.grad(out.sum(), rows):
        assert not grad.any()


def test_plain_pairs_are_as_good_as_kv() -> None:
    kv = {name: tuple(getattr(REGULAR, name)) for name in ("compressed", "selected", "window")}
    assert not any(isinstance(pair, KV) for pair in kv.values())
    assert torch.equal(attention(replace(REGULAR, **kv)), attention(REGULAR))


def test_inputs_need_not_be_contiguous() -> None:
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in REGULAR.leaves()]
    assert not any(x.is_contiguous() for x in strided)
    torch.testing.assert_close(attention(REGULAR.with_leaves(tuple(strided))), attention(REGULAR))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_autocast_lowers_nothing_here(backend: str) -> None:
    """Types are those of the arguments; only the projections of a layer follow autocast."""
    inputs = make_inputs(CONFIG, length=90)  # 15 blocks, of which 2 are for the scores to choose
    want = attention(inputs, backend), selection(inputs, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attention(inputs, backend), selection(inputs, backend)
    assert got[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize(("batch", "length"), [(0, 50), (2, 0), (0, 0)])
def test_empty_batches(batch: int, length: int, backend: str) -> None:
    inputs = make_inputs(CONFIG, batch=batch, length=length)
    out = attention(inputs, backend)
    assert out.shape == (batch, length, CONFIG.num_heads, CONFIG.dv)
    grads = torch.autograd.grad(out.sum(), inputs.leaves())
    assert not any(grad.any() for grad in grads)
