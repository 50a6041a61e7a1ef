"""What cannot be converted, or called so, is refused in one line that names the fix."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

import transformers
from torch import nn
from transformers.models.llama import modeling_llama

from nsa import CheckpointError, ConfigError, NSAError, ShapeError
from nsa.integrations.transformers import convert
from nsa.integrations.transformers import version as version_module
from tests.support.tiny_models import CONFIG, SHARED, dense, tokens


def other(name, **options):
    """A tiny model of another kind."""
    options = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        **options,
    }
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def changed(change, **options):
    model = dense(**options)
    for layer in model.model.layers:
        change(layer.self_attn)
    return model


def capped(attention):
    """Scores in (-1, 1), by an attention of its own."""

    def forward(x, position_embeddings, **kwargs):
        q, k, v = (getattr(attention, f"{n}_proj")(x).unflatten(-1, (-1, 8)) for n in "qkv")
        q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        k, v = (heads.repeat_interleave(2, 2) for heads in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) * attention.scaling
        out = torch.einsum("bhts,bshd->bthd", scores.tanh().softmax(-1), v)
        return attention.o_proj(out.flatten(2)), None

    attention.forward = forward


def gpt2():
    config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (gpt2, "attention modules with q_proj, k_proj, v_proj, o_proj, as of Llama, got GPT2LM"),
        (lambda: other("Phi3"), "got Phi3ForCausalLM without"),
        (lambda: other("Cohere"), "that RoPE rotates by halves, got another attention"),
        (lambda: other("Olmo2"), "normed one by one if at all"),
        (lambda: other("Olmo", clip_qkv=0.5), "got another attention"),
        (lambda: other("SmolLM3", no_rope_layers=[0]), "layers.0.self_attn: expected softmax"),
        (lambda: other("StableLm", partial_rotary_factor=0.25), "got another attention"),
        (lambda: nn.Linear(2, 2), "a transformers model, got Linear; convert before PEFT"),
        (lambda: dense(attention_dropout=0.1), "attention_dropout=0 (set it in model.config"),
        (
            lambda: changed(lambda x: x.register_parameter("sinks", nn.Parameter(torch.ones(4)))),
            "model.layers.0.self_attn: expected no parts but q_proj, k_proj, v_proj, o_proj, "
            "q_norm, k_norm, got sinks",
        ),
        (lambda: changed(capped), "expected softmax of heads"),
        (lambda: changed(lambda x: setattr(x, "is_causal", False)), "causal attention"),
        (
            lambda: changed(lambda x: setattr(x, "v_proj", nn.Identity())),
            "model.layers.0.self_attn.v_proj: expected a projection with a weight, got Identity",
        ),
        (lambda: dense().to("meta"), "weights in memory, got offloaded ones"),
        (lambda: convert(dense(), CONFIG).model, "got one that is converted already"),
    ],
)
def test_models(make, problem):
    model = make()
    with pytest.raises(ConfigError) as error:
        convert(model, CONFIG)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "options", "problem"),
    [
        (replace(CONFIG, num_heads=8), {}, "num_heads: expected the model's 4, got 8"),
        (replace(CONFIG, num_kv_heads=4), {}, "num_kv_heads: expected the model's 2, got 4"),
        (replace(CONFIG, head_dim=16), {}, "head_dim: expected the model's 8, got 16"),
        (replace(CONFIG, value_dim=4), {}, "value_dim: expected the model's 8, got 4"),
        (replace(CONFIG, scale=2.0), {}, "scale: expected None or the model's 0.35"),
        (CONFIG, {"start": "paperr"}, "did you mean 'paper'?"),
        (CONFIG, {"trainable": "none"}, "(known: new, attention, all)"),
        (CONFIG, {"backend": "cuda"}, "backend: expected one of the known names, got 'cuda'"),
        (
            replace(SHARED, gate="softmax"),
            {"start": "dense-equal"},
            "gate: expected 'sigmoid', whose halves add up to the dense layer for start=",
        ),
        (
            replace(SHARED, compression="mean"),
            {"start": "dense-equal"},
            "compression: expected 'mlp' or 'linear', which can start at 0 for start=",
        ),
        (replace(SHARED, select_mass=0.5), {"start": "dense-equal"}, "select_mass: expected None"),
        ({"num_heads": 4}, {}, "config: expected an NSAConfig"),
    ],
)
def test_configurations(config, options, problem):
    model = dense()
    before = model.state_dict().keys()
    with pytest.raises(ConfigError) as error:
        convert(model, config, **options)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)
    assert type(model) is transformers.LlamaForCausalLM
    assert model.state_dict().keys() == before


@pytest.fixture(scope="module")
def model():
    return convert(dense(), CONFIG).model


@pytest.mark.parametrize(
    ("options", "error", "problem"),
    [
        ({"attention_mask": torch.ones(2, 1, 9, 9)}, ShapeError, "or [B, T] of ones and, for pad"),
        ({"attention_mask": {"full_attention": None}}, ShapeError, "zeros, got dict"),
        ({"attention_mask": torch.ones(2, 5)}, ShapeError, "expected [2, 9], got [2, 5]"),
        ({"attention_mask": torch.tensor([[1] * 9, [1, 0, 1] * 3])}, ShapeError, "got a hole in 1"),
        ({"output_attentions": True}, ConfigError, "no matrix of attention"),
        ({"sliding_window": 4}, ConfigError, "sliding_window: expected None for a converted model"),
        ({"softcap": 30.0}, ConfigError, "got 30.0; window and scale are of its nsa_config"),
        ({"s_aux": torch.zeros(4)}, ConfigError, "s_aux: expected None"),
        ({"cu_seq_lens_q": torch.tensor([0, 18])}, ShapeError, "one row of packed sequences"),
        ({"cu_seq_lens_k": torch.tensor([0, 18])}, ShapeError, "as cu_seq_lens_q, got none there"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 18]), "cu_seq_lens_k": torch.tensor([0, 9, 18])},
            ShapeError,
            "got others, [2] there; keys are the queries' own",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 9]), "use_cache": True}, ShapeError, "use_cache=False"),
    ],
)
def test_calls(model, options, error, problem):
    ids = tokens(1 if options.get("use_cache") else 2, 9)
    with pytest.raises(error) as raised:
        model(ids, **options)
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_of_another_library(tmp_path):
    """Whose models are called "nsa", too."""
    (tmp_path / "config.json").write_text('{"model_type": "nsa", "block_size": 64}')
    with pytest.raises(CheckpointError, match="checkpoints.translate_folder"):
        transformers.AutoConfig.from_pretrained(tmp_path)


def test_a_layer_by_itself_does_not_guess_what_a_mask_means(model):
    layer, x = model.model.layers[0].self_attn, torch.randn(2, 9, 32)
    cos = torch.ones(1, 9, 8)
    with pytest.raises(ShapeError, match="call the model that"):
        layer(x, (cos, cos), attention_mask=torch.ones(2, 9))
    with pytest.raises(ShapeError, match="expected cosines and sines, got None"):
        layer(x)


def test_other_attention_functions(model):
    with pytest.raises(ConfigError, match=r"got 'sdpa'; convert\(backend=...\) or NSA_BACKEND"):
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    ("found", "fine"),
    [("4.57.1", False), ("5.23.9", False), ("5.24.0", True), ("5.30.0.dev0", True), ("6.0", True)],
)
def test_versions_of_transformers(monkeypatch, found, fine):
    monkeypatch.setattr(version_module, "version", lambda name: found)
    if fine:
        version_module.check_version()
        return
    with pytest.raises(NSAError, match="expected 5.24 or later, got") as error:
        version_module.check_version()
    assert "pip install --upgrade 'nsa-torch[hf]'" in str(error.value)
    assert isinstance(error.value, ImportError)
    assert "\n" not in str(error.value)


def test_no_transformers_at_all(monkeypatch):
    def missing(name):
        raise version_module.PackageNotFoundError(name)

    monkeypatch.setattr(version_module, "version", missing)
    with pytest.raises(NSAError, match="expected 5.24 or later, got none"):
        version_module.check_version()
