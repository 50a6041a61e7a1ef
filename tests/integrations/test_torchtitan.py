"""torchtitan's models with their attention replaced by the override."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("torchtitan", reason="torchtitan is not installed: pip install torchtitan")

from torchtitan.config import OverrideConfig, apply_overrides
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import llama3_configs
from torchtitan.models.qwen3 import qwen3_configs

from nsa import ConfigError, ShapeError

OVERRIDE = "nsa.integrations.torchtitan.sparse_attention"
SPARSE = {
    "window": 32,
    "compress_block": 8,
    "compress_stride": 4,
    "select_block": 8,
    "num_selected": 4,
    "num_local": 1,
}
MODELS = {"Llama": llama3_configs, "Qwen3": qwen3_configs}


def build(kind, sparse=True, backend="flex", **fields):
    """A small model of torchtitan's, with each layer's attention replaced or by PyTorch's."""
    config = MODELS[kind]["debugmodel"](attn_backend=backend)
    config.layers = config.layers[:2]
    if sparse:
        wanted = OverrideConfig(imports=[(OVERRIDE, {**SPARSE, **fields})])
        assert len(apply_overrides(wanted, config)) == 2
    else:
        for layer in config.layers:
            layer.attention.inner_attention = ScaledDotProductAttention.Config()
    with torch.device("meta"):
        model = config.build()
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_states(buffer_device=torch.device("cpu"))
    return model


def tokens(B, T):
    return torch.randint(2048, (B, T), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", MODELS)
def test_short_inputs_are_the_dense_models(kind):
    """With half of the window and half of the selected blocks, which both hold everything:
    projections, norms, RoPE and scale are where they were, and so are their gradients."""
    model, dense, ids = build(kind), build(kind, sparse=False), tokens(2, 32)
    left = dense.load_state_dict(model.state_dict(), strict=False)
    assert left.missing_keys == []
    parts = {name.split("attention.")[1].split(".")[0] for name in left.unexpected_keys}
    assert parts == {"gate_proj", "compress_k", "compress_v"}
    for layer in model.layers.values():
        for part in (layer.attention.gate_proj, layer.attention.compress_v.down):
            for x in part.parameters():
                torch.nn.init.zeros_(x)
    found, expected = model(ids), dense(ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for logits in (found, expected):
        logits.logsumexp(-1).mean().backward()
    grads = {name: x.grad for name, x in model.named_parameters()}
    for name, x in dense.named_parameters():
        torch.testing.assert_close(grads[name], x.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("backend", ["flex", "varlen"])
@pytest.mark.parametrize("kind", MODELS)
def test_documents_of_a_row_see_themselves_alone(kind, backend):
    model, ids = build(kind, backend=backend), tokens(2, 90)
    positions = torch.cat([torch.arange(53), torch.arange(37)]).expand(2, -1)
    masks = model.get_attention_masks(positions)
    found = model(ids, positions, masks)
    for row in range(2):
        for part in (slice(0, 53), slice(53, 90)):
            alone = model(ids[row : row + 1, part], positions[:1, part])
            torch.testing.assert_close(found[row, part], alone[0], atol=1e-4, rtol=1e-4)
    found.logsumexp(-1).mean().backward()
    assert all(x.grad.abs().max() > 0 for x in model.parameters())


def checkpointed(model):
    FullAC.Config().build(dump_folder="").apply(model)


def compiled(model):
    for layer in model.layers.values():
        layer.compile(backend="eager", fullgraph=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's own
@pytest.mark.parametrize("change", [checkpointed, compiled])
def test_what_the_trainer_does_with_blocks_changes_nothing(change):
    ids, grads = tokens(2, 90), []
    positions = torch.cat([torch.arange(53), torch.arange(37)]).expand(2, -1)
    for changed in (False, True):
        model = build("Qwen3")
        if changed:
            change(model)
        model(ids, positions, model.get_attention_masks(positions)).logsumexp(-1).mean().backward()
        grads.append([x.grad for x in model.parameters()])
    torch.testing.assert_close(*grads)


def test_new_parts_are_drawn_as_in_a_layer():
    attention = build("Llama").layers["1"].attention
    assert attention.gate_proj.bias.eq(0).all()
    assert 0 < attention.gate_proj.weight.std() < 0.1
    assert attention.compress_k.position.std().item() == pytest.approx(0.02, rel=0.3)


def test_what_cannot_be_is_refused():
    model = build("Llama")
    attention, x = model.layers["0"].attention, torch.randn(1, 32, 256)
    for error, problem, call in (
        (ConfigError, "did you mean 'window'?", lambda: build("Llama", windw=8)),
        (
            ConfigError,
            "num_heads: expected none, the model has its own, got 4",
            lambda: build("Llama", num_heads=4),
        ),
        (
            ShapeError,
            "attention_masks: expected offsets of documents, got Tensor; take a model of",
            lambda: attention(x, torch.ones(32, 32)),
        ),
        (
            ConfigError,
            "expected none inside a layer of NSA, got tp; use FSDP",
            lambda: model.parallelize(SimpleNamespace(tp_enabled=True, cp_enabled=False)),
        ),
    ):
        with pytest.raises(error) as raised:
            call()
        assert problem in str(raised.value)
        assert "\n" not in str(raised.value)
