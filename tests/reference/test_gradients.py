"""Gradients of `nsa.reference`: against finite differences, and zero where they must be."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck

from nsa import reference
from nsa.config import KV, NSAConfig
from tests.support.reference_cases import phi_shapes

CONFIG = NSAConfig(
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    value_dim=3,
    compress_block=4,
    compress_stride=2,
    select_block=4,
    num_selected=2,
    num_initial=0,
    num_local=1,
    window=3,
    rope_theta=None,
)

LENGTHS = pytest.mark.parametrize(
    ("length", "cu_seqlens"),
    [(9, None), (3, None), (12, torch.tensor([0, 3, 3, 12], dtype=torch.int32))],
    ids=["regular", "no compressed block", "packed"],
)


def random(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, *shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]


def blocks(length, cu_seqlens):
    """Compressed rows: all that are needed, and when packed two that are surplus."""
    if cu_seqlens is None:
        return CONFIG.num_compressed(length)
    return sum(CONFIG.num_compressed(n) for n in cu_seqlens.diff().tolist()) + 2


def compressed_kv(length, cu_seqlens):
    rows = blocks(length, cu_seqlens)
    return random(1, (rows, 1, 2), (rows, 1, 3))


def token_kv(seed, length):
    return random(seed, (length, 1, 2), (length, 1, 3))


def query(length):
    return random(0, (length, 2, 2))[0]


def lists(length):
    """In turn: block 0, nothing, blocks 1 and 2, blocks 0 and 1."""
    rows = torch.tensor([[0, -1], [-1, -1], [1, 2], [0, 1]], dtype=torch.int32)
    return rows[torch.arange(length) % 4].reshape(1, length, 1, 2)


@LENGTHS
def test_compressed_attention(length, cu_seqlens):
    def out(q, k, v):
        return reference.compressed_attention(q, k, v, CONFIG, cu_seqlens)[0]

    assert gradcheck(out, (query(length), *compressed_kv(length, cu_seqlens)))


@LENGTHS
def test_selected_attention(length, cu_seqlens):
    def out(q, k, v):
        return reference.selected_attention(q, k, v, lists(length), CONFIG, cu_seqlens)[0]

    assert gradcheck(out, (query(length), *token_kv(2, length)))


@LENGTHS
def test_window_attention(length, cu_seqlens):
    def out(q, k, v):
        return reference.window_attention(q, k, v, CONFIG, cu_seqlens)[0]

    assert gradcheck(out, (query(length), *token_kv(3, length)))


@LENGTHS
@pytest.mark.parametrize("given", [True, False], ids=["lists given", "selected"])
def test_nsa_attention(length, cu_seqlens, given):
    def out(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates):
        return reference.nsa_attention(
            q,
            KV(k_cmp, v_cmp),
            KV(k_slc, v_slc),
            KV(k_win, v_win),
            gates,
            CONFIG,
            cu_seqlens=cu_seqlens,
            block_idx=lists(length) if given else None,
        )

    branches = compressed_kv(length, cu_seqlens), token_kv(2, length), token_kv(3, length)
    gates = random(4, (length, 2, 3))
    assert gradcheck(out, (query(length), *branches[0], *branches[1], *branches[2], *gates))


def phi_weights(config, size):
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for name, shape in phi_shapes(config, size).items()
    }


@LENGTHS
@pytest.mark.parametrize("compression", ["mlp", "linear", "mean"])
def test_compress(length, cu_seqlens, compression):
    config = replace(CONFIG, compression=compression)
    named = phi_weights(config, 2)

    def out(x, *weights):
        weights = dict(zip(named, weights, strict=True))
        compressed = reference.compress(x, weights, config, cu_seqlens)
        needed = blocks(length, cu_seqlens) - (0 if cu_seqlens is None else 2)
        return compressed[:, :needed]

    assert gradcheck(out, (*random(6, (length, 2, 2)), *named.values()))


@pytest.mark.parametrize("compression", ["mlp", "linear"])
def test_without_blocks_the_weights_of_compress_get_zero_gradients(compression):
    """Through the whole of NSA, for a sequence shorter than one block; not None."""
    length, config = 3, replace(CONFIG, compression=compression)
    weights_k, weights_v = phi_weights(config, 2), phi_weights(config, 3)
    k, v = token_kv(1, length)
    compressed = KV(
        reference.compress(k, weights_k, config), reference.compress(v, weights_v, config)
    )
    tokens = KV(*token_kv(2, length))
    gates = random(4, (length, 2, 3))[0]
    out = reference.nsa_attention(query(length), compressed, tokens, tokens, gates, config)
    for grad in torch.autograd.grad(out.sum(), [*weights_k.values(), *weights_v.values()]):
        assert not grad.any()


def test_queries_that_see_nothing_get_zero_gradients():
    """No compressed block before token 3, and no listed token at tokens 1, 2 and 5."""
    q, (k, v) = query(9), compressed_kv(9, None)
    out, _ = reference.compressed_attention(q, k, v, CONFIG)
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert not grad[:, :3].any()
    assert grad[:, 5:].all()

    k, v = token_kv(2, 9)
    unseen = torch.tensor([1, 2, 5])
    out, _ = reference.selected_attention(q, k, v, lists(9), CONFIG)
    grads = torch.autograd.grad(out[:, unseen].sum(), (q, k, v))
    assert not any(grad.any() for grad in grads)


def test_surplus_rows_get_zero_gradients():
    """And what they hold goes nowhere, were it NaN."""
    cu_seqlens = torch.tensor([0, 3, 3, 12], dtype=torch.int32)
    k, v = (x.detach() for x in compressed_kv(12, cu_seqlens))
    k[:, -2:] = v[:, -2:] = torch.nan
    q, tokens, gates = query(12), KV(*token_kv(2, 12)), random(4, (12, 2, 3))[0]
    inputs = (q, k.requires_grad_(), v.requires_grad_(), *tokens, gates)
    out = reference.nsa_attention(q, KV(k, v), tokens, tokens, gates, CONFIG, cu_seqlens=cu_seqlens)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[1][:, :-2].any()
    assert grads[2][:, :-2].any()
    assert not grads[1][:, -2:].any()
    assert not grads[2][:, -2:].any()


def test_selection_carries_no_gradient():
    """With only the selected branch open, choosing the lists adds nothing to using them."""
    q, (k, v), tokens = query(9), compressed_kv(9, None), KV(*token_kv(2, 9))
    gates = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand(1, 9, 2, 3)
    block_idx = reference.select_blocks(q, k, CONFIG)
    assert not block_idx.requires_grad
    grads = {}
    for name, given in [("chosen", None), ("given", block_idx)]:
        out = reference.nsa_attention(q, KV(k, v), tokens, tokens, gates, CONFIG, block_idx=given)
        grads[name] = torch.autograd.grad(out.sum(), (q, k, v, *tokens))
    for chosen, given in zip(grads["chosen"], grads["given"], strict=True):
        assert torch.equal(chosen, given)
    assert grads["chosen"][0].any()
    assert not grads["chosen"][1].any()
    assert not grads["chosen"][2].any()


def test_no_gradient_flows_to_later_tokens_or_other_sequences():
    """From the outputs of tokens 5 to 9; the second sequence has tokens 4 to 11."""
    cu_seqlens = torch.tensor([0, 4, 12], dtype=torch.int32)
    q, gates = query(12), random(4, (12, 2, 3))[0]
    raw, tokens, window = KV(*token_kv(1, 12)), KV(*token_kv(2, 12)), KV(*token_kv(3, 12))
    config = replace(CONFIG, compression="mean")
    compressed = KV(*(reference.compress(x, {}, config, cu_seqlens) for x in raw))
    out = reference.nsa_attention(
        q, compressed, tokens, window, gates, config, cu_seqlens=cu_seqlens
    )
    grads = torch.autograd.grad(out[:, 5:10].sum(), (q, gates, *raw, *tokens, *window))
    for grad in grads:
        assert grad[:, 4:10].any()
        assert not grad[:, :4].any()
        assert not grad[:, 10:].any()
