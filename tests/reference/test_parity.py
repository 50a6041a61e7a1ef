"""`nsa.reference` agrees with the NumPy oracle in float64, on regular and on packed batches."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa import reference
from nsa.config import KV, NSAConfig
from tests.support import numpy_oracle as oracle
from tests.support.reference_cases import Case, cases

EXAMPLES = settings(max_examples=max(60, settings.default.max_examples))
OVERLAPPING = NSAConfig(compress_block=4, compress_stride=2, select_block=6)


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


def assert_agree(actual, expected):
    """Equal up to float64 rounding of values around 1, infinities included."""
    assert actual.dtype == torch.float64
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12, atol=1e-12, equal_nan=False)


@EXAMPLES
@given(case=cases())
def test_compressed_attention(case: Case):
    inputs = (case.query(), *case.block_kv())
    out, lse = reference.compressed_attention(*tensors(*inputs), case.config, case.cu_seqlens)
    expected = oracle.compressed_attention(*inputs, case.config, case.cu_seqlens)
    assert_agree(out, expected[0])
    assert_agree(lse, expected[1])


@EXAMPLES
@given(case=cases())
def test_select_blocks(case: Case):
    inputs = (case.query(), case.block_kv()[0])
    block_idx = reference.select_blocks(*tensors(*inputs), case.config, case.cu_seqlens)
    assert block_idx.dtype == torch.int32
    expected = oracle.select_blocks(*inputs, case.config, case.cu_seqlens)
    np.testing.assert_array_equal(block_idx.numpy(), expected)


@EXAMPLES
@given(case=cases())
def test_selected_attention(case: Case):
    inputs = (case.query(), *case.token_kv(), case.block_idx())
    out, lse = reference.selected_attention(*tensors(*inputs), case.config, case.cu_seqlens)
    expected = oracle.selected_attention(*inputs, case.config, case.cu_seqlens)
    assert_agree(out, expected[0])
    assert_agree(lse, expected[1])


@EXAMPLES
@given(case=cases())
def test_window_attention(case: Case):
    inputs = (case.query(), *case.token_kv())
    out, lse = reference.window_attention(*tensors(*inputs), case.config, case.cu_seqlens)
    expected = oracle.window_attention(*inputs, case.config, case.cu_seqlens)
    assert_agree(out, expected[0])
    assert_agree(lse, expected[1])


@pytest.mark.parametrize("lists", ["selected", "given"])
@EXAMPLES
@given(case=cases())
def test_nsa_attention(case: Case, lists):
    q, gates = case.query(), case.gates()
    branches = case.block_kv(), case.token_kv(), case.token_kv()
    block_idx = case.block_idx() if lists == "given" else None
    out = reference.nsa_attention(
        torch.from_numpy(q),
        *(KV(*tensors(*branch)) for branch in branches),
        torch.from_numpy(gates),
        case.config,
        cu_seqlens=case.cu_seqlens,
        max_seqlen=max(case.lengths) if case.packed else None,
        block_idx=None if block_idx is None else torch.from_numpy(block_idx),
    )
    expected = oracle.nsa_attention(q, *branches, gates, case.config, case.cu_seqlens, block_idx)
    assert_agree(out, expected)


@EXAMPLES
@given(case=cases())
def test_compress(case: Case):
    k, _ = case.token_kv()
    weights = case.weights(case.config.head_dim)
    named = {name: torch.from_numpy(array) for name, array in weights.items()}
    actual = reference.compress(torch.from_numpy(k), named, case.config, case.cu_seqlens)
    rows = case.tokens // case.config.compress_stride if case.packed else case.blocks
    assert actual.shape == (case.batch, rows, *k.shape[2:])
    expected = oracle.compress(k, weights, case.config, case.cu_seqlens)
    assert_agree(actual[:, : case.blocks], expected)


@EXAMPLES
@given(case=cases(), pairs=st.integers(1, 3), theta=st.sampled_from([2.0, 1e4, 5e5]))
def test_apply_rope(case: Case, pairs: int, theta: float):
    x = case.normal(case.tokens, 2, 2 * pairs)
    actual = reference.apply_rope(torch.from_numpy(x), theta, case.cu_seqlens)
    assert_agree(actual, oracle.apply_rope(x, theta, case.cu_seqlens))


@EXAMPLES
@given(case=cases(kinds=("regular",)), data=st.data())
def test_queries_that_start_later(case: Case, data: st.DataObject):
    """Rows a to b with `q_start=a` are those rows of the full run, keys past them included."""
    start = data.draw(st.integers(0, case.tokens - 1), label="start")
    rows = slice(start, data.draw(st.integers(start + 1, case.tokens), label="stop"))
    config = case.config
    q, k, v, block_idx = tensors(case.query(), *case.token_kv(), case.block_idx())
    k_cmp, v_cmp = tensors(*case.block_kv())
    for step, keys, per_query in [
        (reference.compressed_attention, (k_cmp, v_cmp), ()),
        (reference.selected_attention, (k, v), (block_idx,)),
        (reference.window_attention, (k, v), ()),
    ]:
        full = step(q, *keys, *per_query, config)
        part = step(q[:, rows], *keys, *(x[:, rows] for x in per_query), config, q_start=start)
        assert_agree(part[0], full[0][:, rows].numpy())
        assert_agree(part[1], full[1][:, rows].numpy())
    start -= start % config.select_share
    rows = slice(start, rows.stop)
    full = reference.select_blocks(q, k_cmp, config)
    part = reference.select_blocks(q[:, rows], k_cmp, config, q_start=start)
    assert torch.equal(part, full[:, rows])
    (gates,) = tensors(case.gates())
    branches = KV(k_cmp, v_cmp), KV(k, v), KV(k, v)
    whole = reference.nsa_attention(q, *branches, gates, config)
    later = reference.nsa_attention(q[:, rows], *branches, gates[:, rows], config, q_start=start)
    assert_agree(later, whole[:, rows].numpy())


@pytest.mark.parametrize("num_initial", [0, 1])
def test_equal_scores(num_initial: int):
    """q = 0: every visible block weighs the same, and all inner selection blocks tie."""
    config = NSAConfig(
        num_heads=2,
        num_kv_heads=2,
        head_dim=2,
        compress_block=4,
        compress_stride=2,
        select_block=8,
        num_selected=4,
        num_initial=num_initial,
        num_local=1,
    )
    q, k = np.zeros((1, 120, 2, 2)), np.ones((1, config.num_compressed(120), 2, 2))
    expected = oracle.select_blocks(q, k, config, None)
    np.testing.assert_array_equal(reference.select_blocks(*tensors(q, k), config).numpy(), expected)


@pytest.mark.parametrize("length", [0, 3, 4, 40])
def test_overlaps(length):
    expected = oracle.overlaps(length, OVERLAPPING)
    actual = reference.overlap_matrix(*expected.shape, OVERLAPPING)
    assert actual.dtype == torch.int64
    np.testing.assert_array_equal(actual.numpy(), expected)
