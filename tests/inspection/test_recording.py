"""The recorder and the interventions: they change what they say and nothing else, everywhere."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from nsa import ConfigError, ShapeError, nsa_attention, use_settings
from nsa.core import compile as glue
from nsa.inspection import (
    KNOCK_OUTS,
    inspect,
    knock_outs,
    nsa_layers,
    oracle_lists,
    record,
    replace_lists,
    replay,
    shut_branch,
)
from nsa.models import LanguageModel, ModelConfig
from tests.support.layers import CONFIG, DIM, LENGTHS, make_layer, problem, seen_by_attention

BACKENDS = ("reference", "sdpa", "fa2-dense", "fa2-varlen", "compiled")


class Own(nn.Module):
    """Somebody's model: two layers in a residual stream, named as they please."""

    def __init__(self, backend: str | None = None) -> None:
        super().__init__()
        self.first = make_layer(backend=backend, dtype=torch.float32)
        self.tower = nn.ModuleDict({"second": make_layer(backend=backend, dtype=torch.float32)})

    def forward(self, x, **packing):
        x = x + self.first(x, **packing)
        return x + self.tower["second"](x, **packing)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setattr(glue, "COMPILER", None)
    with use_settings(fa2_provider="math"):
        yield request.param


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["regular", "packed"])
def test_a_recorder_changes_nothing_and_sees_what_was_read(backend, lengths, monkeypatch):
    if backend == "fa2-dense" and lengths:
        pytest.skip("fa2-dense takes no packed input")
    case = problem(lengths, torch.float32)
    model, packing = Own(backend), {"cu_seqlens": case.cu_seqlens}
    plain = model(case.x, **packing)
    (grad,) = torch.autograd.grad(plain, case.x, case.dout)
    seen = seen_by_attention(monkeypatch)
    with record(model) as recording:
        out = model(case.x, **packing)
    assert torch.equal(out, plain)
    assert torch.equal(torch.autograd.grad(out, case.x, case.dout)[0], grad)
    assert recording.layers == ["first", "tower.second"]
    for call, inputs in zip(recording.calls, seen, strict=True):
        assert torch.equal(call.q, inputs.q)
        assert torch.equal(call.k_compressed, inputs.compressed.k)
        assert torch.equal(call.k_selected, inputs.selected.k)
        assert torch.equal(call.k_window, inputs.window.k)
        assert torch.equal(call.gates, inputs.gates)
        assert not call.q.requires_grad
        assert call.block_idx.shape == (*case.x.shape[:2], 2, 3)
        assert [len(part.q) for part in call.sequences()] == (
            [n for n in LENGTHS if n] if lengths else [37, 37]
        )
        again = nsa_attention(
            *inputs[:5],
            CONFIG,
            cu_seqlens=case.cu_seqlens,
            block_idx=call.block_idx,
            backend=backend,
        )
        want = nsa_attention(*inputs[:5], CONFIG, cu_seqlens=case.cu_seqlens, backend=backend)
        assert torch.equal(again, want)
    with record(model) as later:
        pass
    model(case.x, **packing)
    assert later.calls == []
    assert all(layer.probes is None for layer in nsa_layers(model).values())


def test_lists_that_are_replayed_are_read(backend):
    case = problem(None, torch.float32)
    model = Own(backend)
    with torch.no_grad(), record(model) as recording:
        plain = model(case.x)
    lists = recording.lists()
    with torch.no_grad(), replay(model, lists), record(model) as again:
        assert torch.equal(model(case.x), plain)
    assert all(torch.equal(again.lists()[name], lists[name]) for name in lists)
    # other weights would have selected otherwise
    with torch.no_grad():
        for layer in nsa_layers(model).values():
            layer.q_proj.weight.neg_()
        with record(model) as changed:
            model(case.x)
        with replay(model, lists), record(model) as kept:
            model(case.x)
    assert not torch.equal(changed.lists()["first"], lists["first"])
    assert torch.equal(kept.lists()["tower.second"], lists["tower.second"])


def test_a_compiled_layer_is_recorded_as_well():
    case = problem(None, torch.float32)
    layer = make_layer(backend="sdpa", dtype=torch.float32)
    graphs = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=graphs, dynamic=False)
    with torch.no_grad():
        plain = compiled(case.x)
        for _ in range(2):
            with record(layer) as recording:
                assert torch.equal(compiled(case.x), plain)
            assert len(recording.calls) == 1
        assert torch.equal(compiled(case.x), plain)
        assert graphs.frame_count == 2  # without a recorder, and with one
        with record(layer) as written:
            layer(case.x)
    assert len(recording.calls) == 1
    assert torch.equal(recording.calls[0].block_idx, written.calls[0].block_idx)


@pytest.mark.parametrize("branch", ["compressed", "selected", "window"])
def test_a_shut_branch_counts_for_nothing(branch):
    case = problem(None)
    layer = make_layer(backend="reference")
    index = ("compressed", "selected", "window").index(branch)
    with torch.no_grad(), shut_branch(layer, branch), record(layer) as recording:
        shut = layer(case.x)
    gates = recording.calls[0].gates
    assert gates[..., index].eq(0).all()
    with torch.no_grad():
        with record(layer) as plain:
            whole = layer(case.x)
        assert torch.equal(gates[..., index - 1], plain.calls[0].gates[..., index - 1])
        assert not torch.equal(shut, whole)
        # the branch is read through its values alone
        if branch == "window":
            layer.v_proj["window"].weight.mul_(7)
            with shut_branch(layer, branch):
                assert torch.equal(layer(case.x), shut)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["regular", "packed"])
def test_lists_are_replaced_sequence_by_sequence(lengths):
    case = problem(lengths)
    layer = make_layer(backend="reference")
    with torch.no_grad(), replace_lists(layer, oracle_lists), record(layer) as recording:
        layer(case.x, cu_seqlens=case.cu_seqlens)
    for part in recording.calls[0].sequences():
        want = oracle_lists(part.q, part.k_selected, CONFIG)
        assert torch.equal(part.block_idx, want)


def test_knock_outs_end_as_they_began():
    model = LanguageModel(ModelConfig.preset("tiny", num_layers=2), backend="sdpa").eval()
    tokens = torch.randint(256, (1, 200), generator=torch.Generator().manual_seed(0))

    def loss() -> float:
        return float(model.loss(tokens, tokens))

    found = dict(knock_outs(model, loss))
    assert tuple(found) == KNOCK_OUTS
    with torch.no_grad():
        assert found["none"] == loss()
    assert len(set(found.values())) == len(found)
    assert found == dict(knock_outs(model, loss))


def test_knock_outs_compile_nothing(monkeypatch):
    def compiler(*args):
        raise AssertionError("something was compiled")

    monkeypatch.setattr(glue, "COMPILER", compiler)
    model = LanguageModel(ModelConfig.preset("tiny", num_layers=1), backend="compiled")
    tokens = torch.randint(256, (1, 160), generator=torch.Generator().manual_seed(0))
    found = dict(knock_outs(model, lambda: float(model.loss(tokens, tokens))))
    assert len(set(found.values())) == len(found)


def test_inspect_runs_and_reports():
    case = problem(None, torch.float32)
    report = inspect(Own("sdpa"), case.x)
    assert report.sequences == (37, 37)
    assert [layer.layer for layer in report.layers] == ["first", "tower.second"]


def test_two_forwards_are_no_list_to_replay():
    layer, case = make_layer(), problem(None)
    with record(layer) as recording:
        pass
    text = r"expected one forward in the recording, got 0 calls of 0 layers; record each"
    with pytest.raises(ShapeError, match=text):
        recording.lists()
    with torch.no_grad(), record(layer) as recording:
        layer(case.x)
        layer(case.x)
    with pytest.raises(ShapeError, match="got 2 calls of 1 layers"):
        recording.lists()


def test_mistakes_are_told():
    layer = make_layer()
    with pytest.raises(ShapeError, match=r"expected a model with nsa.NSAttention layers, got Lin"):
        inspect(nn.Linear(2, 2), torch.ones(2))
    with pytest.raises(ShapeError, match="expected a forward of at least one token inside"):
        inspect(make_layer(dtype=torch.float32), torch.ones(2, 0, DIM))
    with pytest.raises(ConfigError, match="branch: expected one of the known names, got 'windw'"):
        shut_branch(layer, "windw").__enter__()
    with pytest.raises(ConfigError, match="layer: expected one of the known names, got 'blocks.0'"):
        replay(Own(), {"blocks.0": torch.zeros(1)}).__enter__()
    case = problem(None)
    wrong = torch.zeros(2, 36, 2, 3, dtype=torch.int32)
    text = r"block_idx: expected \[2, 37, 2, width >= 1\], got"
    with pytest.raises(ShapeError, match=text), replay(layer, {"": wrong}):
        layer(case.x)
    assert layer.probes is None
