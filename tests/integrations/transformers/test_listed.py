"""``attn_implementation="nsa"`` on MiniMax-M3's layers, against transformers' eager ones."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from transformers import MiniMaxM3VLForCausalLM, MiniMaxM3VLTextConfig

from nsa import ConfigError, ShapeError, use_settings
from nsa.integrations.transformers import listed_attention
from tests.support.tiny_models import dense, tokens

T = 45


def m3(attention, dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 16,
        "dense_intermediate_size": 32,
        "shared_intermediate_size": 16,
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense"] * 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rotary_dim": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 8,
        "index_topk_blocks": 3,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        **options,
    }
    config = MiniMaxM3VLTextConfig(**options)
    config._attn_implementation = attention
    return MiniMaxM3VLForCausalLM(config).to(dtype).eval()


def run(model, ids, **options):
    model.zero_grad()
    out = model(ids, labels=ids, **options)
    out.loss.backward()
    return out.logits, {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def assert_alike(found, expected, atol, rtol):
    assert found[1].keys() == expected[1].keys()
    torch.testing.assert_close(found[0], expected[0], atol=atol, rtol=rtol)
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, atol=atol, rtol=rtol)


@pytest.fixture(scope="module")
def eager():
    return run(m3("eager"), tokens(2, T))


@pytest.mark.parametrize("backend", ["sdpa", "reference", "compiled"])
def test_outputs_and_gradients_are_the_eager_models(backend, eager):
    """Whose softmax is in fp32, whatever the model is in; that of sdpa is in fp64."""
    ids = tokens(2, T)
    with use_settings(backend=backend):
        found = run(m3("nsa"), ids)
    assert_alike(found, eager, atol=2e-5, rtol=1e-4)
    if backend == "sdpa":
        assert_alike(found, run(m3("sdpa"), ids), atol=1e-11, rtol=1e-9)


def test_lists_matter(eager):
    """Fewer blocks than there are: the dense model is another."""
    model = m3("nsa")
    for layer in model.model.layers[1:]:
        layer.self_attn.indexer.topk_blocks = 99
    logits, _ = run(model, tokens(2, T))
    assert (logits - eager[0]).abs().max() > 0.1


def test_checkpointing_and_half_types():
    ids = tokens(2, T)
    expected = run(m3("nsa"), ids)
    model = m3("nsa").train()
    model.activation_checkpointing_enable()
    assert_alike(run(model, ids), expected, atol=0, rtol=0)
    half, _ = run(m3("nsa", torch.bfloat16), ids)
    assert half.dtype == torch.bfloat16


def test_padding_to_the_right():
    ids = tokens(2, T)
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    expected, found = (m3(name)(ids, attention_mask=mask).logits for name in ("sdpa", "nsa"))
    torch.testing.assert_close(found[0, :30], expected[0, :30], atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(found[1], expected[1], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("option", [{}, {"cache_implementation": "static"}, {"num_beams": 3}])
def test_generation(option):
    ids = tokens(2, 21)
    options = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected, found = (m3(n).generate(ids, **options, **option) for n in ("sdpa", "nsa"))
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("options", "error", "problem"),
    [
        (
            {"attention_mask": torch.tensor([[0] * 5 + [1] * 16] * 2)},
            ShapeError,
            "expected no padding, or padding to the right, got another mask; tokenizer.padding",
        ),
        (
            {"position_ids": torch.arange(21).remainder(9)[None]},
            ShapeError,
            "and a row for each text",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 21])}, ShapeError, "cu_seq_lens_q: expected None with"),
        ({"sliding_window": 4}, ShapeError, "sliding_window: expected None with"),
    ],
)
def test_arguments_that_are_not_obeyed_are_refused(options, error, problem):
    model = m3("nsa")
    with pytest.raises(error) as raised:
        model(tokens(2, 21), use_cache=False, **options)
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


def call(**options):
    q, k = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    module = torch.nn.Module()
    module.indexer = torch.nn.Module()
    module.indexer.block_size = options.pop("block_size", 4)
    lists = {"block_indices": torch.zeros(1, 2, 9, 1, dtype=torch.long), **options}
    return listed_attention(module, q, k, k, **lists)


def test_calls_that_do_not_fit_are_refused():
    assert call()[0].shape == (1, 9, 4, 8)
    for options, error, problem in (
        ({"dropout": 0.1}, ConfigError, "dropout: expected 0, got 0.1; set attention_dropout=0"),
        ({"block_size": None}, ConfigError, "the size of a block at indexer.block_size or"),
        (
            {"block_indices": torch.zeros(1, 4, 9, 1)},
            ShapeError,
            "block_indices: expected [1, 2, 9, n], got [1, 4, 9, 1]",
        ),
        ({"attention_mask": torch.ones(1, 9)}, ShapeError, "expected bool [B, 1, T, S], got"),
    ):
        with pytest.raises(error) as raised:
            call(**options)
        assert problem in str(raised.value)


def test_a_model_without_lists_is_refused():
    model = dense()
    model.set_attn_implementation("nsa")
    with pytest.raises(ConfigError, match="expected a model whose layers list blocks") as error:
        model(tokens(1, 9))
    assert "LlamaAttention, which passes no block_indices" in str(error.value)
    assert "\n" not in str(error.value)
