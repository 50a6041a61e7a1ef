"""Selections worked by hand, for the NumPy oracle and for `nsa.reference` alike."""

import math

import numpy as np
import pytest

from tests.support.hand_cases import BOTH, PAPER, config, ones

pytestmark = BOTH


def keys_with_probability(count, probability):
    """Keys [1, count, 1, 1] that a query of 1 gives these probabilities, and the others none."""
    k = np.full((1, count, 1, 1), -1e4)
    for i, p in probability.items():
        k[0, i] = math.log(p)
    return k


@pytest.mark.parametrize(
    ("i", "probability", "best"),
    [
        (3, 0.65, [3]),  # 0.65 for blocks 0 and 1, 2 * 0.35 for block 3
        (3, 0.7, [0]),  # 0.7 for blocks 0 and 1, 2 * 0.3 for block 3
        (4, 0.45, [3]),  # 2 * 0.45 for block 1, 2 * 0.55 for block 3
        (4, 0.55, [1]),
        (5, 0.45, [3]),
        (5, 0.55, [1]),
        (6, 0.45, [3]),
        (6, 0.55, [1]),
        (7, 0.65, [3]),
        (7, 0.7, [1]),
        (8, 0.55, [2]),
    ],
)
def test_overlap_weights_decide_the_selection(run, i, probability, best):
    """Compressed block `i` against block 13, which lies in selection block 3."""
    k = keys_with_probability(19, {i: probability, 13: 1 - probability})
    block_idx = run("select_blocks", ones(1, 320, 1, 1), k, config(**PAPER, num_selected=1))
    assert block_idx[0, -1, 0].tolist() == best


def test_a_block_on_the_border_counts_for_both_sides(run):
    k = keys_with_probability(19, {7: 0.7, 13: 0.3})
    block_idx = run("select_blocks", ones(1, 320, 1, 1), k, config(**PAPER))
    assert block_idx[0, -1, 0].tolist() == [1, 2]


def test_scores_use_the_visible_blocks_only(run):
    """At t = 11 the best block, which ends at token 12, is still hidden."""
    cfg = config(compress_stride=1, num_selected=1)
    k = keys_with_probability(13, {1: 0.2, 4: 0.25, 9: 0.55})
    block_idx = run("select_blocks", ones(1, 16, 1, 1), k, cfg)
    assert block_idx[0, [11, 12], 0].tolist() == [[1], [2]]


def test_the_block_in_progress_is_a_candidate(run):
    """No compressed block reaches token 8 before t = 9, so block 2 scores 0 at t = 8."""
    block_idx = run("select_blocks", ones(1, 10, 1, 1), ones(1, 4, 1, 1), config(num_selected=4))
    expected = [[0, -1, -1, -1]] * 4 + [[0, 1, -1, -1]] * 4 + [[0, 1, 2, -1]] * 2
    assert block_idx[0, :, 0].tolist() == expected


def test_heads_of_a_group_select_together(run):
    """Probabilities of blocks 0 and 1: .9/.1 and .3/.7 in the first group, .9/.1 and 0/1 next."""
    cfg = config(num_heads=4, num_kv_heads=2, head_dim=2, compress_stride=4, num_selected=1)
    q = np.zeros((1, 8, 4, 2))
    for head, p in enumerate([0.9, 0.3, 0.9, 1e-9]):
        q[0, :, head] = math.log(p), math.log(1 - p)
    k = np.broadcast_to(np.eye(2)[None, :, None], (1, 2, 2, 2)).copy()
    assert run("select_blocks", q, k, cfg)[0, -1].tolist() == [[0], [1]]


@pytest.mark.parametrize("t", range(256, 320, 5))
def test_equal_scores_go_to_the_lower_index(run, t):
    """Equal keys: block 0 has 7 shares of 16 tokens, 1 to 3 have 8; the last has less."""
    q = ones(1, t + 1, 1, 1)
    cfg = config(**PAPER, num_selected=2)
    k = np.full((1, cfg.num_compressed(t + 1), 1, 1), 0.3)
    assert run("select_blocks", q, k, cfg)[0, -1, 0].tolist() == [1, 2]


@pytest.mark.parametrize("regions", [None, (1, 4)])
def test_many_equal_scores_go_to_the_lower_index(run, regions):
    """Two dozen blocks, or regions, that are all the same: more than a sort keeps in order if it
    need not."""
    cfg = config(compress_stride=4, num_selected=4, select_regions=regions)
    block_idx = run("select_blocks", ones(1, 96, 1, 1), ones(1, 24, 1, 1), cfg)
    assert block_idx[0, -1, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("probability", "mass", "blocks"),
    [
        ({5: 1.0}, 1.0, [0, 1, 2, 5]),  # limits nothing: those that score 0 are listed too
        ({5: 1.0}, 0.99, [5, -1, -1, -1]),
        ({3: 0.5, 5: 0.5}, 0.5, [3, -1, -1, -1]),  # is reached, no more is needed
        ({3: 0.5, 5: 0.5}, 0.51, [3, 5, -1, -1]),
    ],
)
def test_a_list_ends_at_its_share_of_the_scores(run, probability, mass, blocks):
    cfg = config(compress_stride=4, num_selected=4, select_mass=mass)
    k = keys_with_probability(8, probability)
    assert run("select_blocks", ones(1, 32, 1, 1), k, cfg)[0, -1, 0].tolist() == blocks


def test_keys_of_zeros_have_no_scale_in_fp8(run):
    """A row of zeros scores 0, as it does unrounded."""
    cfg = config(compress_stride=4, num_selected=1, score_dtype="fp8")
    k = np.zeros((1, 6, 1, 1))
    k[0, 3] = 1.0
    for q, best in ((1.0, 3), (0.0, 0)):
        assert run("select_blocks", q * ones(1, 24, 1, 1), k, cfg)[0, -1, 0].tolist() == [best]


def test_zero_scores_go_to_the_lower_index(run):
    k = keys_with_probability(8, {5: 1.0})
    cfg = config(compress_stride=4, num_selected=4)
    block_idx = run("select_blocks", ones(1, 32, 1, 1), k, cfg)
    assert block_idx[0, -1, 0].tolist() == [0, 1, 2, 5]


FORCED = {"compress_stride": 4, "num_selected": 6, "num_initial": 2, "num_local": 3}


@pytest.mark.parametrize(
    ("changes", "t", "expected"),
    [
        # equal keys, every block as long as a selection block: all complete blocks score the same
        (FORCED, 3, [0, -1, -1, -1, -1, -1]),
        (FORCED, 7, [0, 1, -1, -1, -1, -1]),
        (FORCED, 11, [0, 1, 2, -1, -1, -1]),  # {0, 1} and {0, 1, 2}
        (FORCED, 15, [0, 1, 2, 3, -1, -1]),  # {0, 1} and {1, 2, 3}
        (FORCED, 19, [0, 1, 2, 3, 4, -1]),
        (FORCED, 23, [0, 1, 2, 3, 4, 5]),
        (FORCED, 36, [0, 1, 2, 7, 8, 9]),  # {0, 1}, {7, 8, 9}, and 2, the first of the rest
        (FORCED | {"num_selected": 5}, 36, [0, 1, 7, 8, 9]),
        (FORCED | {"num_initial": 0}, 36, [0, 1, 2, 7, 8, 9]),
        (FORCED | {"num_initial": 0, "num_selected": 3}, 36, [7, 8, 9]),
        (FORCED | {"num_local": 0, "num_selected": 3}, 36, [0, 1, 2]),  # without its own block
    ],
)
def test_forced_blocks(run, changes, t, expected):
    cfg = config(**changes)
    k = ones(1, (t + 1) // 4, 1, 1)
    assert run("select_blocks", ones(1, t + 1, 1, 1), k, cfg)[0, -1, 0].tolist() == expected


def test_forced_blocks_beat_the_scores(run):
    """All of the probability lies on blocks 3 and 4; two places of three are forced."""
    k = keys_with_probability(8, {3: 0.4, 4: 0.6})
    cfg = config(compress_stride=4, num_selected=3, num_initial=1, num_local=1)
    block_idx = run("select_blocks", ones(1, 32, 1, 1), k, cfg)
    assert block_idx[0, -1, 0].tolist() == [0, 4, 7]
