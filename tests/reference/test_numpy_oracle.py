"""The NumPy oracle's own parts, which `nsa.reference` has no counterpart to."""

import numpy as np
import pytest
import torch

from tests.support import numpy_oracle as oracle
from tests.support.hand_cases import PAPER, config


def test_compressed_blocks_are_whole():
    assert oracle.compressed_spans(3, config()) == []
    assert oracle.compressed_spans(4, config()) == [range(4)]
    assert oracle.compressed_spans(7, config()) == [range(4), range(2, 6)]


def test_the_last_selection_block_may_be_short():
    assert oracle.selection_spans(6, config()) == [range(4), range(4, 6)]


def test_overlap_weights_of_the_paper():
    """1, 2, 2, 2, 1 on i = 4j-1 to 4j+3, nothing elsewhere."""
    weights = oracle.overlaps(64 * 5, config(**PAPER)) / 16
    for j in range(5):
        expected = {4 * j - 1: 1, 4 * j: 2, 4 * j + 1: 2, 4 * j + 2: 2, 4 * j + 3: 1}
        assert weights[:, j].tolist() == [expected.get(i, 0) for i in range(len(weights))]


def test_scores_add_up_over_the_blocks_and_heads():
    """A compressed block gives each selection block the share of tokens they have in common."""
    cfg = config(num_heads=4, num_kv_heads=2)
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(12, 4, 1)), rng.normal(size=(5, 2, 1))
    scores = oracle.selection_scores_alone(q, k, cfg)
    block_in_strides, heads_in_group = 2, 2
    np.testing.assert_allclose(scores[3:].sum(-1), block_in_strides * heads_in_group)
    assert not scores[:3].any()


def test_gelu_is_exact():
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    expected = torch.nn.functional.gelu(x, approximate="none").numpy()
    assert oracle.gelu(x.numpy()) == pytest.approx(expected, abs=1e-15)
