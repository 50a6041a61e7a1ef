"""Published layouts of NSA checkpoints: random tensors of each, against the layer written by hand.

B batch, T tokens, H query heads, K key/value heads, D head size, C vocabulary.
"""

import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nsa import CheckpointError, ConfigError, NSAConfig, NSAttention
from nsa.integrations.checkpoints import LAYOUTS, REFUSED, translate, translate_folder
from tests.support.layers import agree

FORCED = {"fla": ("first", "own", "previous"), "fla-own-block": ("own",), "llama-nsa": ("own",)}
SIZES = {"width": 12, "H": 4, "K": 2, "D": 6, "hidden": 20, "C": 31, "layers": 2}
BLOCK, COUNT, WINDOW, THETA, EPS = 8, 4, 11, 500.0, 1e-5
HEADS_1B = {"width": 2048, "H": 32, "K": 2, "D": 64, "hidden": 8192, "C": 128256, "layers": 16}


def config_json(layout, sizes=SIZES, **changes):
    """What the code of a layout writes."""
    common = {
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["layers"],
        "block_size": BLOCK,
        "block_counts": COUNT,
        "window_size": WINDOW,
        "rope_theta": THETA,
        "vocab_size": sizes["C"],
        "max_position_embeddings": 128,
    }
    if layout == "llama-nsa":
        own = {
            "model_type": "llama-nsa",
            "num_attention_heads": sizes["H"],
            "num_key_value_heads": sizes["K"],
            "head_dim": sizes["D"],
            "intermediate_size": sizes["hidden"],
            "rms_norm_eps": EPS,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": True,
        }
    else:  # its head_dim is read by nothing, and the size of the MLP may be a formula
        own = {
            "model_type": "nsa",
            "num_heads": sizes["H"],
            "num_kv_heads": sizes["K"],
            "head_dim": 32,
            "intermediate_size": None,
            "norm_eps": EPS,
            "hidden_act": "swish",
            "qkv_bias": False,
            "tie_word_embeddings": False,
        }
    return {**common, **own, **changes}


def shapes(layout, sizes=SIZES):
    """Every tensor of a layout, by its own names."""
    width, queries, keys = sizes["width"], sizes["H"] * sizes["D"], sizes["K"] * sizes["D"]
    llama = layout == "llama-nsa"
    attn = "self_attn" if llama else "attn"
    before, after = (
        ("input_layernorm", "post_attention_layernorm") if llama else ("attn_norm", "mlp_norm")
    )
    layer = {
        f"{before}.weight": (width,),
        f"{attn}.q_proj.weight": (queries, width),
        f"{attn}.k_proj.weight": (keys, width),
        f"{attn}.v_proj.weight": (keys, width),
        f"{attn}.g_proj.weight": (3 * sizes["H"], width),
        f"{attn}.o_proj.weight": (width, queries),
        f"{after}.weight": (width,),
        "mlp.gate_proj.weight": (sizes["hidden"], width),
        "mlp.up_proj.weight": (sizes["hidden"], width),
        "mlp.down_proj.weight": (width, sizes["hidden"]),
    }
    embedding = "model.embed_tokens.weight" if llama else "model.embeddings.weight"
    model = {embedding: (sizes["C"], width), "model.norm.weight": (width,)}
    if not llama:
        model["lm_head.weight"] = (sizes["C"], width)
    for i in range(sizes["layers"]):
        model |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return model


def weights(layout, dtype=torch.float64):
    made = torch.Generator().manual_seed(3)
    drawn = {
        name: torch.randn(shape, generator=made, dtype=torch.float64)
        for name, shape in shapes(layout).items()
    }
    return {
        name: (x * x.shape[-1] ** -0.5 if x.ndim == 2 else 1 + 0.2 * x).to(dtype)
        for name, x in drawn.items()
    }


# The definition, written out: nothing of this library


def rotate_halves(x_THD):
    D = x_THD.shape[-1]
    angle = torch.arange(len(x_THD))[:, None] * THETA ** (-torch.arange(0, D, 2).double() / D)
    cos, sin = angle.cos()[:, None].to(x_THD), angle.sin()[:, None].to(x_THD)
    a, b = x_THD.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention_by_hand(layout, w, x_TC):
    """One sequence: mean-pooled blocks, a list for each group, the window, sigmoid gates."""
    H, K, D = SIZES["H"], SIZES["K"], SIZES["D"]
    q = rotate_halves(F.linear(x_TC, w["q_proj.weight"]).unflatten(-1, (H, D)))
    k = rotate_halves(F.linear(x_TC, w["k_proj.weight"]).unflatten(-1, (K, D)))
    v = F.linear(x_TC, w["v_proj.weight"]).unflatten(-1, (K, D))
    gates = F.linear(x_TC, w["g_proj.weight"]).unflatten(-1, (H, 3)).sigmoid()
    whole = len(x_TC) // BLOCK
    k_mean = k[: whole * BLOCK].unflatten(0, (whole, BLOCK)).mean(1)
    v_mean = v[: whole * BLOCK].unflatten(0, (whole, BLOCK)).mean(1)
    rows = []
    for t in range(len(x_TC)):
        own, seen = t // BLOCK, (t + 1) // BLOCK
        forced = {"first": 0, "own": own, "previous": max(own - 1, 0)}
        listed = {forced[name] for name in FORCED[layout]}
        heads = []
        for group in range(K):
            members = range(group * H // K, (group + 1) * H // K)
            p = torch.stack(
                [((k_mean[:seen, group] @ q[t, h]) * D**-0.5).softmax(0) for h in members]
            )
            score = p.sum(0).tolist()
            rest = sorted(set(range(own)) - listed, key=lambda j, score=score: -score[j])
            blocks = sorted([*listed, *rest[: COUNT - len(listed)]])
            chosen = [s for j in blocks for s in range(j * BLOCK, (j + 1) * BLOCK) if s <= t]
            near = list(range(max(0, t - WINDOW + 1), t + 1))
            for i, h in enumerate(members):
                parts = [p[i] @ v_mean[:seen, group]]
                for tokens in (chosen, near):
                    score_S = (k[tokens, group] @ q[t, h]) * D**-0.5
                    parts.append(score_S.softmax(0) @ v[tokens, group])
                heads.append(sum(g * part for g, part in zip(gates[t, h], parts, strict=True)))
        rows.append(torch.cat(heads))
    return F.linear(torch.stack(rows), w["o_proj.weight"])


def model_by_hand(layout, w, ids_T):
    llama = layout == "llama-nsa"
    before, after = (
        ("input_layernorm", "post_attention_layernorm") if llama else ("attn_norm", "mlp_norm")
    )
    attn = "self_attn." if llama else "attn."
    embedding = w["model.embed_tokens.weight" if llama else "model.embeddings.weight"]

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * w[f"{name}.weight"]

    x = embedding[ids_T]
    for i in range(SIZES["layers"]):
        at = f"model.layers.{i}."
        own = {n.removeprefix(at + attn): y for n, y in w.items() if n.startswith(at + attn)}
        x = x + attention_by_hand(layout, own, norm(x, at + before))
        y = norm(x, at + after)
        up = F.linear(y, w[f"{at}mlp.up_proj.weight"])
        gated = F.silu(F.linear(y, w[f"{at}mlp.gate_proj.weight"])) * up
        x = x + F.linear(gated, w[f"{at}mlp.down_proj.weight"])
    return F.linear(norm(x, "model.norm"), embedding if llama else w["lm_head.weight"])


# Names, shapes, values


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_is_handed_on_once(layout):
    given = weights(layout)
    made = translate(layout, config_json(layout), given)
    biases = {name for name in made.tensors if name.endswith("gate_proj.bias")}
    assert len(biases) == SIZES["layers"]
    assert not any(made.tensors[name].any() for name in biases)
    assert {id(x) for name, x in made.tensors.items() if name not in biases} == {
        id(x) for x in given.values()
    }
    assert len(made.tensors) == len(given) + len(biases)


def test_the_models_of_one_billion_have_the_heads_they_say():
    config = config_json(
        "llama-nsa", HEADS_1B, block_size=16, block_counts=16, window_size=128, rope_theta=5e5
    )
    sizes = shapes("llama-nsa", HEADS_1B)
    given = {name: torch.empty(shape, device="meta") for name, shape in sizes.items()}
    text = "block_size: expected at least 2 * 16 selected blocks, got 16: past 256 tokens the"
    with pytest.raises(CheckpointError, match=re.escape(text)):
        translate("llama-nsa", config, given)
    made = translate("llama-nsa", config, given, exact=False)
    assert made.config == NSAConfig(
        num_heads=32,
        num_kv_heads=2,
        head_dim=64,
        compress_block=16,
        compress_stride=16,
        select_block=16,
        num_selected=16,
        num_initial=0,
        num_local=1,
        window=128,
        compression="mean",
        independent_kv=False,
        rope_theta=5e5,
    )
    layer = NSAttention(2048, made.config, device="meta")
    layer.load_state_dict(made.layer(15), assign=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T", [5, 8, 77])
def test_a_layer_is_the_published_definition(layout, T):
    given = weights(layout)
    made = translate(layout, config_json(layout), given)
    layer = NSAttention(SIZES["width"], made.config, dtype=torch.float64)
    layer.load_state_dict(made.layer(1))
    generator = torch.Generator().manual_seed(T)
    x, dout = torch.randn(2, 1, T, SIZES["width"], generator=generator, dtype=torch.float64)
    at = "model.layers.1." + ("self_attn." if layout == "llama-nsa" else "attn.")
    own = {name.removeprefix(at): y for name, y in given.items() if name.startswith(at)}
    results = []
    for attend in (layer, lambda y: attention_by_hand(layout, own, y[0])[None]):
        leaf = x.clone().requires_grad_()
        out = attend(leaf)
        results.append({"out": out.detach(), "dx": torch.autograd.grad(out, leaf, dout)[0]})
    agree(*results, tolerance=1e-12)


def test_what_is_always_selected_is_what_tells_fla_apart():
    x = torch.randn(1, 77, SIZES["width"], dtype=torch.float64)
    outs = []
    for layout in ("fla", "fla-own-block"):
        made = translate(layout, config_json(layout), weights("fla"))
        layer = NSAttention(SIZES["width"], made.config, dtype=torch.float64)
        layer.load_state_dict(made.layer(0))
        outs.append(layer(x))
    assert not torch.allclose(*outs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_becomes_a_model_of_transformers(layout, tmp_path):
    pytest.importorskip("transformers", minversion="5.24")
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    import nsa.integrations.transformers  # noqa: F401

    given, source = weights(layout), tmp_path / "published"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config_json(layout)))
    names = sorted(given)
    for i in range(2):  # as large models are
        part = {name: given[name] for name in names[i::2]}
        save_file(part, source / f"model-{i + 1:05}-of-00002.safetensors")
    made = translate_folder(layout, source, tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    assert type(model).__name__ == "NSALlamaForCausalLM"
    layer = model.model.layers[0].self_attn
    assert layer.config == replace(made.config, rope_theta=None)
    ids = torch.randint(SIZES["C"], (1, 45), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        got, want = model(ids).logits[0], model_by_hand(layout, given, ids[0])
    # transformers makes angles in fp32
    assert (got - want).norm() <= 1e-5 * want.norm()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(x, again[name]) for name, x in made.tensors.items())


def test_a_list_is_a_power_of_two_wide():
    made = translate("fla", config_json("fla", block_counts=3), weights("fla"))
    assert made.config.num_selected == 4


# Refusals


@pytest.mark.parametrize(
    ("layout", "changes", "text"),
    [
        ("fla", {"qkv_bias": True}, "qkv_bias: expected False in config.json of layout 'fla', got"),
        ("fla", {"model_type": "llama"}, "model_type: expected 'nsa' in config.json"),
        ("fla", {"window_size": 0}, "window_size: expected an int >= 1, got 0; a model without"),
        (
            "fla",
            {"block_counts": None},
            "block_counts: expected an int >= 1 in config.json, got No",
        ),
        ("fla", {"rope_theta": None}, "rope_theta: expected a number in config.json, got None"),
        ("fla", {"nsa_config": {}}, "config.json: expected a published layout, got this library's"),
        ("fla", {"vocab_size": 30}, "model.embeddings.weight: expected [30, 12], got [31, 12]"),
        ("fla", {"num_hidden_layers": 1}, "got one more, model.layers.1.attn.g_proj.weight and 9"),
        ("fla", {"num_hidden_layers": 3}, "got none called model.layers.2.attn.g_proj.weight and"),
        ("fla", {"tie_word_embeddings": True}, "lm_head.weight: expected the embedding, as tie_"),
        ("fla", {"num_kv_heads": 1}, "attn.k_proj.weight: expected [6, 12], got [12, 12]"),
        ("llama-nsa", {"attention_bias": True}, "attention_bias: expected False"),
        ("llama-nsa", {"rope_scaling": {"factor": 4.0}}, "rope_scaling: expected None"),
        ("llama-nsa", {"head_dim": 4}, "self_attn.q_proj.weight: expected [16, 12], got [24, 12]"),
    ],
)
def test_what_the_layers_cannot_be_is_refused(layout, changes, text):
    with pytest.raises(CheckpointError, match=re.escape(text)) as caught:
        translate(layout, config_json(layout, **changes), weights(layout))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", REFUSED)
def test_a_layout_that_no_config_describes_is_refused(layout):
    with pytest.raises(CheckpointError, match=f"layout: .*{layout}.*with its own code"):
        translate(layout, {}, {})


def test_an_unknown_layout_and_too_few_blocks_are_refused():
    with pytest.raises(ConfigError, match="layout: .*did you mean 'llama-nsa'"):
        translate("llama_nsa", {}, {})
    with pytest.raises(ConfigError, match="num_initial \\+ num_local: expected at most"):
        translate("fla", config_json("fla", block_counts=2), weights("fla"))
    with pytest.raises(CheckpointError, match=r"expected a table of values, got \[\]"):
        translate("fla", [], {})


def test_a_layer_that_is_not_there_is_refused():
    made = translate("fla", config_json("fla"), weights("fla"))
    with pytest.raises(CheckpointError, match=r"index: expected a layer in 0 … 1, got 2"):
        made.layer(2)


def test_folders_that_do_not_fit_are_refused(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    with pytest.raises(CheckpointError, match=r"source: expected config.json and \*.safetensors"):
        translate_folder("fla", tmp_path, tmp_path / "ours")
    save_file(weights("fla"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: expected JSON, got"):
        translate_folder("fla", tmp_path, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="target: expected a new or empty folder"):
        translate_folder("fla", tmp_path, tmp_path)
