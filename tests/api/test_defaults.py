"""The process' default device and dtype decide nothing: everything stands where its input does."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from nsa import nsa_attention, reference, select_blocks
from nsa.testing.inputs import make_inputs, random_blocks
from tests.support.layers import CONFIG, VARIANTS, make_layer, problem

LENGTHS = (13, 0, 3, 60)
"""Among the blocks of the last there is a choice."""


@contextmanager
def other_defaults() -> Iterator[None]:
    """Whatever does not name its device or dtype gets one without data, or a wider one.

    Fresh memory is NaN: that of a tensor which was never written might hold the right numbers.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(before)


@pytest.mark.parametrize("lengths", [None, LENGTHS, (0, 0)], ids=["regular", "packed", "empty"])
@pytest.mark.parametrize("lists", [True, False], ids=["lists given", "selected"])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "compiled"])
def test_attention(backend, lists, lengths):
    inputs = make_inputs(CONFIG, length=None if lengths else 37, lengths=lengths)
    if lists:
        inputs = replace(inputs, block_idx=random_blocks(inputs, 5))

    def run():
        out = inputs.attend(nsa_attention, backend=backend)
        blocks = select_blocks(
            inputs.q, inputs.compressed.k, CONFIG, cu_seqlens=inputs.cu_seqlens, backend=backend
        )
        return out.detach(), blocks, *torch.autograd.grad(out, inputs.leaves(), inputs.dout)

    expected = run()
    with other_defaults():
        actual = run()
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["regular", "packed"])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "compiled"])
def test_options_of_selection(backend, lengths):
    config = replace(
        CONFIG,
        num_selected=4,
        select_regions=(2, 1),
        select_schedule=((20, 3),),
        select_mass=0.9,
        select_share=2,
        score_dtype="fp8",
    )
    inputs = make_inputs(config, length=None if lengths else 60, lengths=lengths)

    def run():
        given = (inputs.q, inputs.compressed.k, config)
        return select_blocks(*given, cu_seqlens=inputs.cu_seqlens, backend=backend)

    expected = run()
    with other_defaults():
        actual = run()
    assert actual.dtype == torch.int32
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["regular", "packed"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_the_layer(backend, variant, lengths):
    x, dout, cu_seqlens = problem(lengths, torch.float32)
    layer = make_layer(VARIANTS[variant], dtype=torch.float32, backend=backend)

    def run():
        out = layer(x, cu_seqlens=cu_seqlens)
        return out.detach(), *torch.autograd.grad(out, (x, *layer.parameters()), dout)

    expected = run()
    with other_defaults():
        actual = run()
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["regular", "packed"])
def test_compression_of_the_oracle(lengths):
    x, _, cu_seqlens = problem(lengths, torch.float32)
    x = x[..., None, :]
    config = replace(CONFIG, compression="mean")

    def run():
        rotated = reference.apply_rope(x, 100.0, cu_seqlens)
        return rotated, reference.compress(rotated, {}, config, cu_seqlens)

    expected = run()
    with other_defaults():
        actual = run()
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
