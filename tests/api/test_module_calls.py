"""What the layer hands on: to the choice of a backend, to attention, to what compiles it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from nsa import ConfigError, NSAttention, module, use_settings
from nsa.config import MOST
from nsa.gates import GATES
from nsa.registry import TABLE
from tests.support.layers import CONFIG, DIM, LENGTHS, gradients, make_layer, problem

LAYOUTS = pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["regular", "packed"])


def noted(monkeypatch, name):
    """The calls of a function that the layer knows by this name, which goes on to do its work."""
    calls, function = [], getattr(module, name)

    def call(*args, **kwargs):
        calls.append((args, kwargs))
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, call)
    return calls


def test_the_limits_of_its_arguments():
    for dim in (1, MOST["dim"]):
        assert NSAttention(dim, CONFIG, device="meta").dim == dim
    refused = [
        *(({"dim": bad}, f"dim: expected an int >= 1, got {bad!r}") for bad in (0, True, "1")),
        ({"dim": MOST["dim"] + 1}, f"dim: expected at most {MOST['dim']}, got {MOST['dim'] + 1}"),
        ({"recompute": 1}, "recompute: expected True or False, got 1"),
    ]
    for changes, told in refused:
        with pytest.raises(ConfigError) as error:
            NSAttention(**{"dim": DIM, "config": CONFIG, "device": "meta", **changes})
        assert str(error.value) == told


@LAYOUTS
@pytest.mark.parametrize("grad", [True, False])
def test_the_choice_knows_the_problem(monkeypatch, lengths, grad):
    calls = noted(monkeypatch, "plan")
    layer, case = make_layer(backend="sdpa"), problem(lengths)
    longest = None if lengths is None else max(lengths)
    with torch.set_grad_enabled(grad):
        layer(case.x, cu_seqlens=case.cu_seqlens, max_seqlen=longest)
    (((asked, backend, settings), options),) = calls
    assert asked == (
        layer.config, case.x.device, case.x.dtype, longest or case.x.shape[1], lengths is not None,
        grad, False,
    )  # fmt: skip
    assert (backend, settings, options) == ("sdpa", layer.settings, {})


@LAYOUTS
@pytest.mark.parametrize("gate", sorted(GATES))
def test_attention_gets_what_it_needs(monkeypatch, lengths, gate):
    calls = noted(monkeypatch, "run")
    with use_settings(nvtx=True):
        layer, case = make_layer(replace(CONFIG, gate=gate)), problem(lengths)
    longest = None if lengths is None else max(lengths) + 1
    layer.probes = ()
    layer(case.x, cu_seqlens=case.cu_seqlens, max_seqlen=longest)
    ((chosen, inputs, config), options) = calls[0]
    assert (chosen, config) == (layer.resolution, layer.config)
    assert (inputs.cu_seqlens, inputs.max_seqlen) == (case.cu_seqlens, longest)
    assert options == {
        "gates_in_unit_interval": GATES[gate].in_unit_interval,
        "nvtx": True,
        "probes": layer.probes,
    }


@LAYOUTS
def test_what_is_computed_again_gets_the_same(monkeypatch, lengths):
    calls = noted(monkeypatch, "recompute")
    layer, case = make_layer(), problem(lengths)
    again = NSAttention(DIM, layer.config, recompute=True, dtype=case.x.dtype)
    again.load_state_dict(layer.state_dict())
    longest = None if lengths is None else max(lengths)
    packing = {"cu_seqlens": case.cu_seqlens, "max_seqlen": longest}
    want = gradients(layer, layer(case.x, **packing), case)
    got = gradients(again, again(case.x, **packing), case)
    assert all(torch.equal(got[name], want[name]) for name in want)
    (((_, *given), options),) = calls
    assert (given[-2], given[-1], options) == (case.cu_seqlens, longest, {})
    with torch.no_grad():
        again(case.x, **packing)
    assert len(calls) == 1


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("glue", [False, True])
def test_who_compiles_the_layer(monkeypatch, glue, compiling):
    """The layer itself where its backend wants it, unless it stands in somebody's trace."""
    entered = []

    @contextmanager
    def graph():
        entered.append(True)
        yield

    monkeypatch.setitem(TABLE, "sdpa", replace(TABLE["sdpa"], compiles_glue=glue))
    monkeypatch.setattr(module, "_ATTEND_COMPILED", lambda layer, *rest: (layer, *rest))
    monkeypatch.setattr(module, "in_a_graph", graph)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: compiling)
    case = problem(LENGTHS)
    for recompute in (False, True):
        layer = NSAttention(DIM, CONFIG, backend="sdpa", recompute=recompute, dtype=case.x.dtype)
        found = layer(case.x, cu_seqlens=case.cu_seqlens, max_seqlen=max(LENGTHS))
        if glue and not compiling:
            who, x, chosen, dtype, cu_seqlens, longest, angles = found
            assert angles is None
            assert (who, x, cu_seqlens) == (layer, case.x, case.cu_seqlens)
            assert (chosen.backend, dtype, longest) == ("sdpa", case.x.dtype, max(LENGTHS))
        else:
            assert isinstance(found, torch.Tensor)
    assert entered == ([True] if glue and not compiling else [])


def test_gates_that_are_fp32_stay_so_and_others_become_as_queries(monkeypatch):
    calls = noted(monkeypatch, "run")
    case = problem(None)
    layer = make_layer().to(torch.bfloat16)

    class To(torch.nn.Module):
        def __init__(self, inner, dtype):
            super().__init__()
            self.inner, self.dtype = inner, dtype

        def forward(self, x):
            return self.inner(x).to(self.dtype)

    gate = layer.gate_proj
    for dtype, gates in ((torch.float32, torch.float32), (torch.float64, torch.bfloat16)):
        layer.gate_proj = To(gate, dtype)
        layer(case.x.bfloat16())
        assert calls[-1][0][1].gates.dtype == gates


def test_compressed_tokens_become_as_queries(monkeypatch):
    """Whatever φ computes in."""
    calls, compress = noted(monkeypatch, "run"), module.compress_both

    def double(*args):
        return tuple(x.double() for x in compress(*args))

    monkeypatch.setattr(module, "compress_both", double)
    case, layer = problem(None), make_layer().float()
    layer(case.x.float())
    compressed = calls[-1][0][1].compressed
    assert (compressed.k.dtype, compressed.v.dtype) == (torch.float32, torch.float32)
