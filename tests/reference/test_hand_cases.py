"""Attention, φ and RoPE worked by hand, for the NumPy oracle and for `nsa.reference` alike."""

import math

import numpy as np
import pytest
import torch

from tests.support.hand_cases import BOTH, config, ones

pytestmark = BOTH


def random(*shape):
    return np.random.default_rng(0).normal(size=shape)


# -- compressed ---------------------------------------------------------------------------------


def test_the_last_token_of_a_block_is_the_first_that_sees_it(run):
    """With equal scores lse is the log of the number of visible blocks: i*2 + 3 <= t."""
    out, lse = run(
        "compressed_attention",
        np.zeros((1, 10, 1, 1)),
        ones(1, 4, 1, 1),
        ones(1, 4, 1, 1),
        config(),
    )
    visible = [0, 0, 0, 1, 1, 2, 2, 3, 3, 4]
    expected = [math.log(count) if count else -math.inf for count in visible]
    np.testing.assert_allclose(lse[0, :, 0], expected, atol=1e-15)
    assert out[0, :, 0, 0] == pytest.approx([0, 0, 0, 1, 1, 1, 1, 1, 1, 1])


def test_a_query_that_sees_one_block_returns_its_value(run):
    q, k, v = random(1, 5, 1, 1), random(1, 1, 1, 1), random(1, 1, 1, 1)
    out, lse = run("compressed_attention", q, k, v, config(scale=0.5))
    assert np.array_equal(out[0, :3], np.zeros((3, 1, 1)))
    assert out[0, 3:, 0, 0] == pytest.approx([v.item()] * 2)
    assert lse[0, 3:, 0] == pytest.approx(0.5 * k.item() * q[0, 3:, 0, 0])


@pytest.mark.parametrize("length", [1, 3])
def test_a_sequence_shorter_than_a_block_has_no_blocks(run, length):
    mean = config(compression="mean")
    none = run("compress", ones(1, length, 1, 1), {}, mean)
    assert none.shape == (1, 0, 1, 1)
    out, lse = run("compressed_attention", ones(1, length, 1, 1), none, none, mean)
    assert np.array_equal(out, np.zeros((1, length, 1, 1)))
    assert np.array_equal(lse, np.full((1, length, 1), -math.inf))
    block_idx = run("select_blocks", ones(1, length, 1, 1), none, mean)
    assert block_idx.tolist() == [[[[0, -1]]] * length]


def test_packed_blocks_stand_without_gaps(run):
    """Sequences of 5, 0, 3 and 6 tokens have 1, 0, 0 and 2 blocks; a fourth row is surplus."""
    cu_seqlens = torch.tensor([0, 5, 5, 8, 14], dtype=torch.int32)
    v = np.array([7.0, 8.0, 9.0, np.nan]).reshape(1, 4, 1, 1)
    k = np.array([0.0, 0.0, 0.0, np.nan]).reshape(1, 4, 1, 1)
    out, _ = run("compressed_attention", ones(1, 14, 1, 1), k, v, config(), cu_seqlens)
    expected = [0, 0, 0, 7, 7, 0, 0, 0, 0, 0, 0, 8, 8, 8.5]
    assert out[0, :, 0, 0] == pytest.approx(expected)


# -- selected -----------------------------------------------------------------------------------


def test_selected_attention_reads_the_listed_blocks_up_to_the_query(run):
    """With equal scores the output is the mean of the token numbers it read."""
    lists = {
        0: [0, -1],  # token 0
        2: [-1, -1],  # nothing
        3: [1, 2],  # nothing: both lie ahead
        4: [0, 1],  # tokens 0 to 4
        7: [0, -1],  # tokens 0 to 3, without its own block
        9: [0, 2],  # tokens 0 to 3, 8 and 9
    }
    block_idx = np.full((1, 10, 1, 2), -1, dtype=np.int32)
    for t, blocks in lists.items():
        block_idx[0, t, 0] = blocks
    v = np.arange(10.0).reshape(1, 10, 1, 1)
    q = np.zeros((1, 10, 1, 1))
    out, lse = run("selected_attention", q, ones(1, 10, 1, 1), v, block_idx, config())
    assert out[0, list(lists), 0, 0] == pytest.approx([0, 0, 0, 2, 1.5, 23 / 6])
    counts = [1, 0, 0, 5, 4, 6]
    expected = [math.log(count) if count else -math.inf for count in counts]
    assert lse[0, list(lists), 0] == pytest.approx(expected)


def test_block_numbers_count_from_the_start_of_the_sequence(run):
    cu_seqlens = torch.tensor([0, 5, 11], dtype=torch.int32)
    block_idx = np.zeros((1, 11, 1, 1), dtype=np.int32)
    block_idx[0, 10] = 1
    v = np.arange(11.0).reshape(1, 11, 1, 1)
    q = np.zeros((1, 11, 1, 1))
    out, _ = run("selected_attention", q, q, v, block_idx, config(), cu_seqlens)
    assert out[0, :, 0, 0] == pytest.approx([0, 0.5, 1, 1.5, 1.5, 5, 5.5, 6, 6.5, 6.5, 9.5])


# -- window -------------------------------------------------------------------------------------


def test_a_window_of_one_returns_the_value(run):
    q, k, v = random(1, 6, 1, 1), random(1, 6, 1, 1) + 1, random(1, 6, 1, 1)
    out, lse = run("window_attention", q, k, v, config(window=1, scale=2.0))
    np.testing.assert_allclose(out, v, rtol=1e-15)
    np.testing.assert_allclose(lse, 2.0 * (q * k)[..., 0], rtol=1e-15)


def test_a_window_holds_the_query_and_those_before_it(run):
    v = np.arange(6.0).reshape(1, 6, 1, 1)
    q = np.zeros((1, 6, 1, 1))
    out, lse = run("window_attention", q, q, v, config(window=3))
    assert out[0, :, 0, 0] == pytest.approx([0, 0.5, 1, 2, 3, 4])
    assert lse[0, :, 0] == pytest.approx(np.log([1, 2, 3, 3, 3, 3]))


# -- all branches -------------------------------------------------------------------------------


def test_query_heads_share_the_key_value_head_of_their_group(run):
    cfg = config(num_heads=6, num_kv_heads=2)
    q, k = random(1, 4, 6, 1), random(1, 4, 2, 1)
    v = np.broadcast_to(np.array([10.0, 20.0])[:, None], (1, 4, 2, 1)).copy()
    own = np.zeros((1, 4, 2, 1), dtype=np.int32)
    for step, args in [
        ("compressed_attention", (q, k[:, :1], v[:, :1])),
        ("selected_attention", (q, k, v, own)),
        ("window_attention", (q, k, v)),
    ]:
        out, _ = run(step, *args, cfg)
        assert out[0, -1, :, 0] == pytest.approx([10, 10, 10, 20, 20, 20])


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("step", ["selected_attention", "window_attention"])
def test_reading_everything_is_causal_attention(run, step, scale):
    """As PyTorch computes it."""
    cfg = config(num_heads=4, num_kv_heads=2, head_dim=3, window=11, scale=scale)
    q, k, v = random(2, 11, 4, 3), random(2, 11, 2, 3) + 1, random(2, 11, 2, 5)
    everything = np.broadcast_to(np.arange(3, dtype=np.int32), (2, 11, 2, 3)).copy()
    lists = (everything,) if step == "selected_attention" else ()
    out, _ = run(step, q, k, v, *lists, cfg)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x).transpose(1, 2) for x in (q, k, v)),
        is_causal=True,
        scale=scale,
        enable_gqa=True,
    )
    np.testing.assert_allclose(out, expected.transpose(1, 2).numpy(), atol=1e-14)


@pytest.mark.parametrize(("branch", "value"), [(0, 10), (1, 20), (2, 30)])
def test_gates_stand_in_the_order_of_the_branches(run, branch, value):
    """Compressed, selected, window; the query at t = 3 sees one compressed block."""
    q, k, v = ones(1, 4, 1, 1), ones(1, 4, 1, 1), ones(1, 4, 1, 1)
    gates = np.zeros((1, 4, 1, 3))
    gates[..., branch] = 0.5
    branches = (k[:, :1], 10 * v[:, :1]), (k, 20 * v), (k, 30 * v)
    out = run("nsa_attention", q, *branches, gates, config())
    assert out[0, 3].item() == pytest.approx(value / 2)


# -- φ and RoPE ---------------------------------------------------------------------------------


def test_compress_mean(run):
    x = np.arange(9.0).reshape(1, 9, 1, 1)
    out = run("compress", x, {}, config(compression="mean"))
    assert out[0, :, 0, 0].tolist() == [1.5, 3.5, 5.5]


def test_compress_linear_flattens_token_by_token(run):
    """Output 0 is channel 1 of the first token; output 1 is channel 0 of the third, plus 100."""
    weight = np.zeros((2, 8))
    weight[0, 1] = weight[1, 4] = 1
    weights = {"proj.weight": weight, "proj.bias": np.array([0.0, 100.0])}
    x = np.arange(12.0).reshape(1, 6, 1, 2)
    out = run("compress", x, weights, config(head_dim=2, compression="linear"))
    assert out[0, :, 0].tolist() == [[1, 104], [5, 108]]


def test_compress_mlp(run):
    """Two hidden units, GELU(1) and GELU(-2), from tokens 3 and 4 at positions -2 and -6."""
    weights = {
        "position": np.array([[-2.0], [-6.0]]),
        "up.weight": np.eye(2),
        "up.bias": np.array([0.0, 0.0]),
        "down.weight": np.array([[1.0, 10.0]]),
        "down.bias": np.array([100.0]),
    }
    x = np.array([3.0, 4.0]).reshape(1, 2, 1, 1)
    out = run("compress", x, weights, config(compression="mlp", compress_block=2))
    below_1, below_minus_2 = 0.8413447460685429, 0.022750131948179195
    assert out.item() == pytest.approx(100 + 1 * below_1 + 10 * -2 * below_minus_2, rel=1e-14)


def test_rope_turns_the_two_halves_against_each_other(run):
    """Of 4 channels, 0 and 2 turn by the position, 1 and 3 by a tenth of it (theta 100)."""
    x = np.broadcast_to(np.array([1.0, 0.0, 0.0, 1.0]), (1, 3, 1, 4)).copy()
    turned = [[math.cos(t), -math.sin(t / 10), math.sin(t), math.cos(t / 10)] for t in range(3)]
    np.testing.assert_allclose(run("apply_rope", x, 100.0)[0, :, 0], turned, atol=1e-15)
    cu_seqlens = torch.tensor([0, 1, 3], dtype=torch.int32)
    packed = run("apply_rope", x, 100.0, cu_seqlens)[0, :, 0]
    np.testing.assert_allclose(packed, [turned[0], turned[0], turned[1]], atol=1e-15)
