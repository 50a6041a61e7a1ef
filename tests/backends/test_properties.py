"""What every backend owes besides accuracy: causality, no leak, finite outputs, positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nsa import KV, NSAConfig, nsa_attention, reference
from nsa.backends.fa2.providers import provider
from nsa.testing import Inputs, attention_parity, make_inputs, random_blocks, selection_faults
from nsa.testing.parity import planned
from nsa.testing.strategies import Case, cases
from tests.support.backends import fa2_by_math, refuses_packed, targets
from tests.support.layouts import LAYOUTS, laid_out

BITWISE = ("reference", "sdpa")
"""Elsewhere causality is bitwise where the block lists are given."""
EXTREMES = (0.0, -1.0, 1e4, 1e30, -3e38)

CONFIG = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    value_dim=6,
    compress_block=4,
    compress_stride=2,
    select_block=6,
    num_selected=4,
    num_local=1,
    window=7,
)


@pytest.fixture(autouse=True)
def _settings(request: pytest.FixtureRequest) -> Iterator[None]:
    with fa2_by_math(request.node.callspec.params["device"]):
        yield


def forward(backend: str, inputs: Inputs) -> Tensor:
    blocks = None if backend in BITWISE else inputs.block_idx
    with torch.no_grad():
        return nsa_attention(
            inputs.q,
            inputs.compressed,
            inputs.selected,
            inputs.window,
            inputs.gates,
            inputs.config,
            cu_seqlens=inputs.cu_seqlens,
            max_seqlen=inputs.max_seqlen,
            block_idx=blocks,
            backend=backend,
        )


def changed_from(inputs: Inputs, first: int, value: float) -> Inputs:
    """Token ``first`` and every block that holds it, set to ``value`` in all inputs of a step.

    φ is outside these functions, so the compressed blocks that would change are changed by hand.
    """
    config = inputs.config
    leaves = [x.detach().clone() for x in inputs.leaves()]
    block, stride = config.compress_block, config.compress_stride
    for x in (leaves[0], *leaves[3:7]):
        x[:, first] = value
    for x in leaves[1:3]:
        for i in range(x.shape[1]):
            if i * stride <= first < i * stride + block:
                x[:, i] = value
    leaves[7][:, first] = 0.5
    return inputs.with_leaves(tuple(leaves))


@pytest.mark.parametrize(("backend", "device", "dtype"), targets())
@given(case=cases(max_length=60, packed=False), data=st.data())
def test_causality_is_bitwise(
    backend: str, device: str, dtype: torch.dtype, case: Case, data: st.DataObject
) -> None:
    inputs = case.inputs(dtype, device)
    T = inputs.q.shape[1]
    first = data.draw(st.integers(0, T - 1), label="changed token")
    limit = torch.finfo(dtype).max
    value = max(-limit, min(limit, data.draw(st.sampled_from(EXTREMES))))
    before = forward(backend, inputs)[:, :first]
    after = forward(backend, changed_from(inputs, first, value))[:, :first]
    assert torch.equal(before, after)


@pytest.mark.parametrize(("backend", "device", "dtype"), targets())
@given(case=cases(max_length=90, packed=True), data=st.data())
def test_packed_sequences_do_not_leak(
    backend: str, device: str, dtype: torch.dtype, case: Case, data: st.DataObject
) -> None:
    if refuses_packed(backend):
        return
    inputs = case.inputs(dtype, device)
    assert case.lengths is not None
    config = inputs.config
    chosen = data.draw(st.integers(0, len(case.lengths) - 1), label="changed sequence")
    limit = torch.finfo(dtype).max
    value = max(-limit, min(limit, data.draw(st.sampled_from(EXTREMES))))
    start = sum(case.lengths[:chosen])
    end = start + case.lengths[chosen]
    first_block = sum(config.num_compressed(n) for n in case.lengths[:chosen])
    last_block = first_block + config.num_compressed(case.lengths[chosen])
    leaves = [x.detach().clone() for x in inputs.leaves()]
    for index, x in enumerate(leaves):
        x[:, (slice(first_block, last_block) if index in (1, 2) else slice(start, end))] = value
    before, after = (forward(backend, x) for x in (inputs, inputs.with_leaves(tuple(leaves))))
    assert torch.equal(before[:, :start], after[:, :start])
    assert torch.equal(before[:, end:], after[:, end:])


@pytest.mark.parametrize(("backend", "device", "dtype"), targets())
@given(case=cases(max_length=60, packed=True))
def test_packed_equals_alone(backend: str, device: str, dtype: torch.dtype, case: Case) -> None:
    """Each sequence cut out and run alone obeys the same bounds as the packed run."""
    inputs = case.inputs(dtype, device)
    assert case.lengths is not None
    assert inputs.block_idx is not None
    config, token, block = inputs.config, 0, 0
    for length in case.lengths:
        rows = config.num_compressed(length)
        tokens, blocks = slice(token, token + length), slice(block, block + rows)
        token, block = token + length, block + rows
        if length == 0:
            continue
        alone = replace(
            inputs,
            q=inputs.q[:, tokens],
            compressed=KV(*(x[:, blocks] for x in inputs.compressed)),
            selected=KV(*(x[:, tokens] for x in inputs.selected)),
            window=KV(*(x[:, tokens] for x in inputs.window)),
            gates=inputs.gates[:, tokens],
            dout=inputs.dout[:, tokens],
            cu_seqlens=None,
            max_seqlen=None,
            block_idx=inputs.block_idx[:, tokens],
        )
        faults = [row for row in attention_parity(backend, alone) if not row.ok]
        assert not faults, (length, faults)
        select = planned(backend, alone).step("select").select_blocks
        lists = select(alone.q, alone.compressed.k, config)
        together = select(inputs.q, inputs.compressed.k, config, inputs.cu_seqlens)
        assert torch.equal(lists, together[:, tokens])


def fused_rounding(device: str, dtype: torch.dtype) -> bool:
    """Whether FA-2 comes from the package, and in fp16.

    It gives infinities at scores near 1e9; PyTorch's build of the same kernels does not. The most
    likely reason is that ``exp(s·scale − max·scale)`` is one fused multiply-add there, whose two
    halves round differently: the exponent is off by up to 64 and passes fp16's 65504. PyTorch
    compiles FA-2 with that fusion off.
    """
    if device != "cuda" or dtype != torch.float16:
        return False
    return provider("auto", torch.device(device)).name == "flash_attn"


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize(("backend", "device", "dtype"), targets())
def test_finite_on_extreme_inputs(
    backend: str, device: str, dtype: torch.dtype, scale: float
) -> None:
    if scale > 1 and backend.startswith("fa2") and fused_rounding(device, dtype):
        pytest.skip("flash_attn's own fp16 kernels give infinities here; see fused_rounding")
    inputs = make_inputs(CONFIG, length=50, dtype=torch.float32, device=device)
    leaves = tuple((x.detach() * scale).to(dtype).requires_grad_() for x in inputs.leaves()[:7])
    inputs = inputs.with_leaves((*leaves, inputs.gates.detach().to(dtype).requires_grad_()))
    out = nsa_attention(
        inputs.q,
        inputs.compressed,
        inputs.selected,
        inputs.window,
        inputs.gates,
        inputs.config,
        backend=backend,
    )
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(("backend", "device", "dtype"), targets((torch.float64,)))
@given(case=cases(max_length=60, packed=False), data=st.data())
def test_steps_take_the_position_of_the_first_row(
    backend: str, device: str, dtype: torch.dtype, case: Case, data: st.DataObject
) -> None:
    inputs = case.inputs(dtype, device)
    config, chosen, T = inputs.config, planned(backend, inputs), inputs.q.shape[1]
    assert inputs.block_idx is not None
    start = data.draw(st.integers(0, T - 1), label="q_start")
    start -= start % config.select_share
    end = data.draw(st.integers(start + 1, T), label="end")
    q, lists = inputs.q[:, start:end], inputs.block_idx[:, start:end]
    calls = {
        "compressed_attention": ((inputs.q, *inputs.compressed), (q, *inputs.compressed)),
        "window_attention": ((inputs.q, *inputs.window), (q, *inputs.window)),
        "selected_attention": (
            (inputs.q, *inputs.selected, inputs.block_idx),
            (q, *inputs.selected, lists),
        ),
    }
    for name, (whole, part) in calls.items():
        want = [x[:, start:end] for x in getattr(reference, name)(*whole, config)]
        step = chosen.step(name.removesuffix("_attention"))
        got = getattr(step, name)(*part, config, q_start=start)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    select, k = chosen.step("select").select_blocks, inputs.compressed.k
    want_blocks = reference.select_blocks(inputs.q, k, config)[:, start:end]
    assert torch.equal(select(q, k, config, q_start=start), want_blocks)


@pytest.mark.parametrize(("backend", "device", "dtype"), targets())
def test_a_shared_list_begins_with_its_first_query(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    config = replace(CONFIG, select_share=3)
    inputs = make_inputs(config, length=12, dtype=dtype, device=device)
    select = planned(backend, inputs).step("select").select_blocks
    with pytest.raises(ValueError, match="q_start: expected a multiple of .*3, got 4"):
        select(inputs.q[:, 4:], inputs.compressed.k, config, q_start=4)


@pytest.mark.parametrize(("backend", "device", "dtype"), targets())
def test_double_backward_raises(backend: str, device: str, dtype: torch.dtype) -> None:
    if backend == "reference":
        return  # plain operations: the oracle has every derivative
    inputs = make_inputs(CONFIG, length=30, dtype=dtype, device=device)
    out = nsa_attention(
        inputs.q,
        inputs.compressed,
        inputs.selected,
        inputs.window,
        inputs.gates,
        inputs.config,
        backend=backend,
    )
    (dq,) = torch.autograd.grad(out.sum(), inputs.q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice|not implemented|double backward"):
        dq.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("backend", "device", "dtype"), targets((torch.float32, torch.float16, torch.bfloat16))
)
def test_inputs_need_not_be_contiguous(
    backend: str, device: str, dtype: torch.dtype, layout: str
) -> None:
    shapes = [{"length": 37, "batch": 2}, {"lengths": (23, 0, 14)}]
    for shape in shapes[: 1 if refuses_packed(backend) else 2]:
        inputs = make_inputs(CONFIG, dtype=dtype, device=device, **shape)
        inputs = laid_out(replace(inputs, block_idx=random_blocks(inputs, 5)), layout)
        faults = [row for row in attention_parity(backend, inputs) if not row.ok]
        assert not faults + selection_faults(backend, inputs)


@pytest.mark.parametrize(("backend", "device", "dtype"), targets())
def test_steps_leave_their_inputs_alone(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(CONFIG, length=37, dtype=dtype, device=device)
    inputs = replace(inputs, block_idx=random_blocks(inputs, 5))
    copies = [x.detach().clone() for x in inputs.leaves()]
    lists = inputs.block_idx.clone()
    attention_parity(backend, inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs.leaves(), copies, strict=True))
    assert torch.equal(inputs.block_idx, lists)


@pytest.mark.parametrize(("backend", "device", "dtype"), targets(only=BITWISE))
def test_ties_go_to_the_lower_index(backend: str, device: str, dtype: torch.dtype) -> None:
    """With q = 0 every visible block weighs the same, and scores tie but at the edges."""
    inputs = make_inputs(CONFIG, length=90, dtype=dtype, device=device)
    zero = torch.zeros_like(inputs.q)
    select = planned(backend, inputs).step("select").select_blocks
    lists = select(zero, inputs.compressed.k, CONFIG)
    assert torch.equal(lists, reference.select_blocks(zero, inputs.compressed.k, CONFIG))
    assert lists[0, -1, 0].tolist() == [0, 1, 2, 14]
