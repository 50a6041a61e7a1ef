"""The language model: its configuration, its parts, what it computes."""

import copy
import functools
import json
import logging
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from nsa import ConfigError, NSAConfig, NSAttention, ShapeError
from nsa.backends.sdpa import steps
from nsa.backends.shared import recompute
from nsa.models import DenseAttention, LanguageModel, ModelConfig

HEADS = NSAConfig(
    num_heads=4, num_kv_heads=2, head_dim=8, compress_block=8, compress_stride=4, select_block=8,
    num_selected=3, num_local=1, window=8,
)  # fmt: skip


def small(**changes: object) -> ModelConfig:
    return ModelConfig(**{"dim": 32, "num_layers": 2, "nsa": HEADS, **changes})


def bytes_of(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dim": 0}, "dim: expected an int >= 1, got 0"),
        ({"num_layers": 2.0}, "num_layers: expected an int >= 1, got 2.0"),
        ({"vocab_size": True}, "vocab_size: expected an int >= 1, got True"),
        ({"hidden_dim": -1}, "hidden_dim: expected an int >= 1, got -1"),
        (
            {"attention": "dense", "nsa": NSAConfig.preset("tiny", scale=-1.0)},
            "nsa.scale: expected a number > 0 with attention='dense', got -1.0",
        ),
        ({"attention": "dens"}, "attention: .* got 'dens'; did you mean 'dense'?"),
        ({"norm_eps": 0.0}, "norm_eps: expected a finite float > 0, got 0.0"),
        ({"norm_eps": math.nan}, "norm_eps: expected a finite float > 0, got nan"),
        ({"tied_embeddings": 1}, "tied_embeddings: expected True or False, got 1"),
        ({"nsa": {}}, "nsa: expected an NSAConfig, got {}"),
    ],
)
def test_config_refuses(changes, text):
    with pytest.raises(ConfigError, match=text):
        small(**changes)


def test_config_resolves_the_hidden_width():
    assert small(dim=768).hidden_dim == 2048
    assert small(dim=128).hidden_dim == 320
    assert small(dim=8).hidden_dim == 64
    assert small(hidden_dim=100).hidden_dim == 100
    assert small(dim=128).replace(dim=768).hidden_dim == 2048


def test_config_survives_json():
    config = small(attention="dense", hidden_dim=40)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_from_dict_names_what_is_wrong():
    values = small().to_dict()
    with pytest.raises(ConfigError, match=r"of ModelConfig, got 'dims'; did you mean 'dim'\?"):
        ModelConfig.from_dict({**values, "dims": 3})
    with pytest.raises(ConfigError, match="names of NSAConfig, got 'windows'"):
        ModelConfig.from_dict({**values, "nsa": {"windows": 3}})
    with pytest.raises(ConfigError, match="expected a value for 'num_layers', got none"):
        ModelConfig.from_dict({"dim": 3, "nsa": {}})
    with pytest.raises(ConfigError, match="nsa: expected a table of values, got 3"):
        ModelConfig.from_dict({**values, "nsa": 3})


def test_presets():
    config = ModelConfig.preset("small")
    assert (config.dim, config.num_layers, config.nsa) == (768, 12, NSAConfig.preset("small"))
    assert ModelConfig.preset("tiny", attention="dense").attention == "dense"
    with pytest.raises(ConfigError, match=r"got 'smal'; did you mean 'small'\?"):
        ModelConfig.preset("smal")
    with pytest.raises(ConfigError, match="got 'depth'"):
        ModelConfig.preset("tiny", depth=3)


@pytest.mark.parametrize("attention", ["nsa", "dense"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_loss(attention, tied):
    model = LanguageModel(small(attention=attention, tied_embeddings=tied))
    tokens = bytes_of(2, 21)
    targets = bytes_of(2, 21).roll(1, 1)
    logits = model(tokens)
    assert logits.shape == (2, 21, 256)
    picked = logits.log_softmax(-1).gather(-1, targets[..., None])
    torch.testing.assert_close(model.loss(tokens, targets), -picked.mean())
    some = targets.clone()
    some[0] = -100
    torch.testing.assert_close(model.loss(tokens, some), -picked[1].mean())
    assert ("head.weight" in model.state_dict()) is not tied


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_it_learns_a_sequence_by_heart(attention):
    torch.manual_seed(0)
    model = LanguageModel(small(attention=attention))
    text = bytes_of(1, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.loss(text[:, :-1], text[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss < 0.3 < math.log(256)


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_a_token_changes_nothing_before_it(attention):
    model = LanguageModel(small(attention=attention))
    tokens = bytes_of(1, 40)
    changed = tokens.clone()
    changed[0, 25] = (changed[0, 25] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :25], before[:, :25])
    assert not torch.equal(after[:, 25], before[:, 25])


def test_packed_sequences_are_computed_as_if_alone():
    model = LanguageModel(small(), dtype=torch.float64)
    tokens = bytes_of(1, 30)
    cu_seqlens = torch.tensor([0, 11, 11, 30], dtype=torch.int32)
    packed = model(tokens, cu_seqlens=cu_seqlens, max_seqlen=19)
    torch.testing.assert_close(packed[:, :11], model(tokens[:, :11]))
    torch.testing.assert_close(packed[:, 11:], model(tokens[:, 11:]))


def test_dense_attention_matches_explicit_softmax():
    torch.manual_seed(0)
    config = NSAConfig(num_heads=4, num_kv_heads=2, head_dim=8, value_dim=6, scale=0.3)
    layer = DenseAttention(16, config, dtype=torch.float64)
    x = torch.randn(2, 13, 16, dtype=torch.float64)
    q = layer.q_proj(x).view(2, 13, 4, 8)
    k = layer.k_proj(x).view(2, 13, 2, 8)
    v = layer.v_proj(x).view(2, 13, 2, 6)
    # Rotation as a product of complex numbers: (low + i high) * exp(i * position * frequency).
    frequency = 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turn = torch.polar(
        torch.ones(13, 4, dtype=torch.float64), torch.arange(13.0)[:, None] * frequency
    )[:, None]

    def rotate(t):
        turned = torch.complex(t[..., :4], t[..., 4:]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    q, k = rotate(q), rotate(k)
    out = torch.empty(2, 13, 4, 6, dtype=torch.float64)
    for h in range(4):
        for t in range(13):
            scores = 0.3 * torch.einsum("bd,bsd->bs", q[:, t, h], k[:, : t + 1, h // 2])
            out[:, t, h] = torch.einsum("bs,bsv->bv", scores.softmax(-1), v[:, : t + 1, h // 2])
    torch.testing.assert_close(layer(x), layer.o_proj(out.flatten(2)))


def test_dense_attention_refuses_packed_input():
    model = LanguageModel(small(attention="dense"))
    with pytest.raises(ShapeError, match=r"regular batch .* dense attention, got packed sequences"):
        model(bytes_of(1, 8), cu_seqlens=torch.tensor([0, 8], dtype=torch.int32))


def test_dense_has_no_backends():
    with pytest.raises(ConfigError, match="expected None with attention='dense', got 'sdpa'"):
        LanguageModel(small(attention="dense"), backend="sdpa")


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (torch.zeros(3, dtype=torch.int64), r"expected int64 \[B, T\], got int64 \[3\]"),
        (torch.zeros(1, 3), r"expected int64 \[B, T\], got float32 \[1, 3\]"),
        (torch.zeros(1, 3, dtype=torch.int32), r"expected int64 \[B, T\], got int32 \[1, 3\]"),
    ],
)
def test_forward_refuses(tokens, text):
    with pytest.raises(ShapeError, match=text):
        LanguageModel(small())(tokens)


def test_loss_refuses_targets_that_do_not_match():
    with pytest.raises(ShapeError, match=r"targets: expected int64 \[1, 8\] .* int64 \[1, 7\]"):
        LanguageModel(small()).loss(bytes_of(1, 8), bytes_of(1, 7))


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_activation_checkpointing_changes_only_the_memory(attention):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = LanguageModel(
            small(attention=attention), activation_checkpointing=checkpointing
        ).train()
        calls = []
        model.blocks[0].attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        loss = model.loss(bytes_of(2, 20), bytes_of(2, 20).roll(1, 1))
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((loss, gradients, len(calls)))
    (loss, gradients, calls), (loss2, gradients2, calls2) = results
    assert (calls, calls2) == (1, 2)
    assert torch.equal(loss, loss2)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients2[name]), name


@pytest.mark.parametrize("on_meta", [False, True])
def test_initialisation(on_meta):
    config = small(dim=96, num_layers=8)
    if on_meta:
        model = LanguageModel(config, device="meta")
        assert all(parameter.is_meta for parameter in model.parameters())
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.fill_(math.nan)
        model.reset_parameters()
    else:
        model = LanguageModel(config)
    block = model.blocks[1]
    assert float(model.embedding.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    for weight in (block.attention.q_proj.weight, block.mlp.up_proj.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    for weight in (block.attention.o_proj.weight, block.mlp.down_proj.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.1)
    assert torch.equal(block.mlp_norm.weight, torch.ones(96))
    # φ and the gates are the layer's own business.
    assert block.attention.compress_k.up.weight.std() > 0.05
    assert not block.attention.gate_proj.bias.any()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    loss = model.loss(bytes_of(1, 64), bytes_of(1, 64).roll(1, 1))
    assert float(loss.detach()) == pytest.approx(math.log(256), abs=0.3)


def test_resolution_tells_what_ran():
    model = LanguageModel(small(), backend="reference")
    assert isinstance(model.blocks[0].attention, NSAttention)
    assert model.resolution is None
    model(bytes_of(1, 8))
    assert model.resolution.backend == "reference"
    dense = LanguageModel(small(attention="dense"))
    dense(bytes_of(1, 8))
    assert dense.resolution is None


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_autocast(attention):
    torch.manual_seed(0)
    model = LanguageModel(small(attention=attention))
    tokens = bytes_of(2, 24)
    exact = model.loss(tokens, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.loss(tokens, tokens)
    rounded.backward()
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.01, atol=0.0)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_double_precision_loss():
    model = LanguageModel(small(), dtype=torch.float64)
    loss = model.loss(bytes_of(1, 8), bytes_of(1, 8))
    assert loss.dtype == torch.float64
    expected = F.cross_entropy(model(bytes_of(1, 8))[0], bytes_of(1, 8)[0])
    torch.testing.assert_close(loss, expected)


# Compiling, and what activation checkpointing keeps

compiles = pytest.mark.filterwarnings(
    # Torch hides this one from everybody but those to whom warnings are errors.
    "ignore:The .grad attribute of a Tensor:UserWarning"
)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_of(model: LanguageModel, mode: str):
    if mode == "model":
        return model.compile_loss(backend="aot_eager", dynamic=False)
    if mode == "blocks":
        model.compile_blocks(backend="aot_eager", dynamic=False)
    return model.loss


@compiles
@pytest.mark.usefixtures("fresh_compiler")
def test_one_code_serves_all_blocks():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    model = LanguageModel(small(num_layers=3, attention="dense"))
    names, expected = list(model.state_dict()), model.loss(bytes_of(2, 8), bytes_of(2, 8))
    model.compile_blocks(backend=count)
    torch.testing.assert_close(model.loss(bytes_of(2, 8), bytes_of(2, 8)), expected)
    assert len(graphs) == 1
    assert list(model.state_dict()) == names
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied.loss(bytes_of(2, 8), bytes_of(2, 8)), expected)


@compiles
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_loss_is_one_graph_and_leaves_the_model_alone():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    model = LanguageModel(small(attention="dense"))
    expected = model.loss(bytes_of(2, 8), bytes_of(2, 8))
    loss = model.compile_loss(backend=count)
    torch.testing.assert_close(loss(bytes_of(2, 8), bytes_of(2, 8)), expected)
    assert len(graphs) == 1
    model.loss(bytes_of(2, 9), bytes_of(2, 9))
    assert len(graphs) == 1
    with pytest.raises(ShapeError, match="targets: expected int64"):
        model.loss(bytes_of(2, 8), bytes_of(2, 7))


_EVERYTHING_AGAIN = functools.partial(
    create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE
)


@compiles
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("mode", "kept"),
    [("none", True), ("blocks", True), ("model", True), ("none", False), ("model", False)],
)
def test_a_checkpointed_block_does_not_select_again(monkeypatch, mode, kept):
    """The second selection, that of the recomputation, would come out otherwise; where the lists
    are not kept, gradients follow it without a word, and this test would see it."""
    if not kept:
        monkeypatch.setattr(recompute, "save_block_idx", _EVERYTHING_AGAIN)
    select, calls = steps.select_impl, []

    def fickle(*inputs):
        calls.append(1)
        lists = select(*inputs)
        if len(calls) == 1:
            return lists
        own_first = torch.arange(lists.shape[-1], dtype=torch.int32).clamp(max=1).neg()
        return own_first.expand(lists.shape)

    warned = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = warned.append
    log = logging.getLogger("torch._higher_order_ops.wrap")
    log.addHandler(handler)
    losses, gradients = [], []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = LanguageModel(
            small(num_layers=1), backend="sdpa", activation_checkpointing=checkpointing
        )
        if checkpointing:
            monkeypatch.setattr(steps, "select_impl", fickle)
        loss = loss_of(model, mode if checkpointing else "none")(
            bytes_of(1, 40), bytes_of(1, 40).roll(1, 1)
        )
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    log.removeHandler(handler)
    torch.testing.assert_close(losses[1], losses[0])
    assert model.resolution.backend == "sdpa"
    assert len(calls) == (1 if kept else 2)
    assert warned == []
    apart = max(float((gradients[1][name] - g).abs().max()) for name, g in gradients[0].items())
    largest = max(float(g.abs().max()) for g in gradients[0].values())
    assert (apart < 1e-5 * largest) == kept, (apart, largest)


def test_no_random_state_is_stashed(monkeypatch):
    def refuse(*_):
        raise AssertionError("the state of a generator was read")

    monkeypatch.setattr(torch, "get_rng_state", refuse)
    model = LanguageModel(small(num_layers=1), activation_checkpointing=True)
    model.loss(bytes_of(1, 20), bytes_of(1, 20)).backward()


@pytest.mark.parametrize("value", [256, -1])
def test_tokens_are_of_the_vocabulary(value):
    model, tokens = LanguageModel(small()), torch.tensor([[1, 2, value]])
    with pytest.raises(ShapeError, match=r"tokens: expected values in 0 … 255, got others"):
        model(tokens)
    with pytest.raises(ShapeError, match=r"targets: expected values in 0 … 255, or -100, got o"):
        model.loss(torch.zeros_like(tokens), tokens)


def test_arguments_are_what_they_should_be():
    with pytest.raises(ConfigError, match=r"^config: expected a ModelConfig, got None$"):
        LanguageModel(None)
    with pytest.raises(ShapeError, match=r"^tokens: expected a tensor, got list$"):
        LanguageModel(small())([[1, 2]])
    with pytest.raises(ConfigError, match=r"^dim: expected at most 16777216, got 10{12}$"):
        small(dim=10**12)


def test_kernels_are_built_before_a_compiled_loss_runs(monkeypatch):
    """Which would build them one after the other."""
    order = []

    def compiled(function, **options):
        return lambda *args, **kwargs: order.append("run") or function(*args, **kwargs)

    def build(layer, x, **packing):
        order.append((tuple(x.shape), x.dtype, list(packing)))

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(NSAttention, "build_kernels", build)
    tokens = bytes_of(1, 16)
    ends = torch.tensor([0, 9, 16], dtype=torch.int32)
    LanguageModel(small()).compile_loss()(tokens, tokens, cu_seqlens=ends)
    LanguageModel(small(attention="dense")).compile_loss()(tokens, targets=tokens)
    assert order == [((1, 16, 32), torch.float32, ["cu_seqlens"]), "run", "run"]
