"""NSAttention against the same layer written out over the oracle; names, causality, precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nsa import ConfigError, NSAConfig, NSAttention, module, reference, use_settings
from nsa.attention import run
from nsa.backends.dispatch import plan
from nsa.gates import GATES
from tests.support.layers import (
    BRANCHES,
    CONFIG,
    DIM,
    LENGTHS,
    VARIANTS,
    Problem,
    agree,
    by_hand,
    by_part,
    gradients,
    make_layer,
    problem,
    seen_by_attention,
)

LAYOUTS = pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["regular", "packed"])


@pytest.fixture(autouse=True)
def _joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The projections are one product, however few tokens a test has."""
    monkeypatch.setattr("nsa.core.linear.MIN_ROWS_TO_JOIN", 0)


# Against the oracle


@LAYOUTS
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_the_layer_is_the_method(config: NSAConfig, lengths: tuple[int, ...] | None) -> None:
    layer, case = make_layer(config), problem(lengths)
    got, want = layer(case.x, cu_seqlens=case.cu_seqlens), by_hand(layer, case.x, case.cu_seqlens)
    assert layer.resolution is not None
    assert layer.resolution.backend != "reference"
    assert got.shape == case.x.shape
    agree({"out": got}, {"out": want})
    agree(gradients(layer, got, case), gradients(layer, want, case))


@LAYOUTS
def test_the_layer_on_the_oracle(lengths: tuple[int, ...] | None) -> None:
    layer, case = make_layer(backend="reference"), problem(lengths)
    got, want = layer(case.x, cu_seqlens=case.cu_seqlens), by_hand(layer, case.x, case.cu_seqlens)
    assert layer.resolution is not None
    assert layer.resolution.backend == "reference"
    agree({"out": got}, {"out": want})


def test_max_seqlen_changes_nothing() -> None:
    layer, case = make_layer(), problem(LENGTHS)
    outs = [layer(case.x, cu_seqlens=case.cu_seqlens, max_seqlen=n) for n in (None, 21, 30)]
    for out in outs[1:]:
        agree({"out": out}, {"out": outs[0]})


def test_rope_turns_q_and_keys_but_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, case = seen_by_attention(monkeypatch), problem(LENGTHS)
    layer = make_layer()
    layer(case.x, cu_seqlens=case.cu_seqlens)
    layer.config = replace(CONFIG, rope_theta=None)
    layer(case.x, cu_seqlens=case.cu_seqlens)
    turned, plain = seen
    for kind in ("selected", "window"):
        got, raw = getattr(turned, kind), getattr(plain, kind)
        assert torch.equal(got.v, raw.v)
        agree({"k": got.k}, {"k": reference.apply_rope(raw.k, 100.0, case.cu_seqlens)})
    agree({"q": turned.q}, {"q": reference.apply_rope(plain.q, 100.0, case.cu_seqlens)})
    assert torch.equal(turned.compressed.v, plain.compressed.v)
    assert not torch.allclose(turned.compressed.k, plain.compressed.k)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_gates_are_head_major_and_branch_minor(monkeypatch: pytest.MonkeyPatch, gate: str) -> None:
    seen, case = seen_by_attention(monkeypatch), problem(None)
    layer = make_layer(replace(CONFIG, gate=gate))  # type: ignore[arg-type]
    with torch.no_grad():
        layer.gate_proj.weight.zero_()
        layer.gate_proj.bias.copy_(torch.arange(12.0) / 4)
    layer(case.x)
    rows_HC = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]).double() / 4
    want = rows_HC.sigmoid() if gate == "sigmoid" else rows_HC.softmax(-1)
    torch.testing.assert_close(seen[0].gates, want.expand(2, 37, 4, 3))


# Parameters


@pytest.mark.parametrize("independent", [True, False])
def test_the_names_and_shapes_of_parameters(independent: bool) -> None:
    layer = NSAttention(DIM, replace(CONFIG, independent_kv=independent))
    shapes = {
        "q_proj.weight": (4 * 8, DIM),
        "gate_proj.weight": (4 * 3, DIM),
        "gate_proj.bias": (4 * 3,),
        "o_proj.weight": (DIM, 4 * 6),
    }
    for suffix in [f".{branch}" for branch in BRANCHES] if independent else [""]:
        shapes[f"k_proj{suffix}.weight"] = (2 * 8, DIM)
        shapes[f"v_proj{suffix}.weight"] = (2 * 6, DIM)
    for name, size in (("compress_k", 8), ("compress_v", 6)):
        shapes[f"{name}.position"] = (4, size)
        shapes[f"{name}.up.weight"] = (2 * size, 4 * size)
        shapes[f"{name}.up.bias"] = (2 * size,)
        shapes[f"{name}.down.weight"] = (size, 2 * size)
        shapes[f"{name}.down.bias"] = (size,)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == shapes
    assert set(layer.state_dict()) == set(shapes)


@pytest.mark.parametrize(
    ("compression", "names"),
    [("mean", []), ("linear", ["proj.bias", "proj.weight"])],
)
def test_the_parameters_of_simpler_compressions(compression: str, names: list[str]) -> None:
    layer = NSAttention(DIM, replace(CONFIG, compression=compression))  # type: ignore[arg-type]
    found = sorted(name for name, _ in layer.named_parameters() if "compress_" in name)
    assert found == [f"{phi}.{name}" for phi in ("compress_k", "compress_v") for name in names]


def test_every_gate_starts_half_open(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = seen_by_attention(monkeypatch)
    NSAttention(DIM, CONFIG)(torch.zeros(1, 5, DIM))
    assert torch.equal(seen[0].gates, torch.full((1, 5, 4, 3), 0.5))


@pytest.mark.parametrize("lengths", [(3,), (3, 0, 2), (0, 0)], ids=str)
@pytest.mark.parametrize("compression", ["mlp", "linear"])
@pytest.mark.parametrize("packed", [True, False])
def test_without_blocks_phi_gets_zero_gradients(
    compression: str, lengths: tuple[int, ...], packed: bool
) -> None:
    layer = make_layer(replace(CONFIG, compression=compression))  # type: ignore[arg-type]
    case = problem(lengths if packed else (lengths[0],))
    layer(case.x, cu_seqlens=case.cu_seqlens if packed else None).backward(case.dout)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if name.startswith("compress_"):
            assert not parameter.grad.any(), name
    assert bool(layer.v_proj["window"].weight.grad.any()) == (lengths[0] > 0)


@pytest.mark.parametrize("dim", [0, -1, 1.5, True, "64"])
def test_dim_is_a_positive_int(dim: object) -> None:
    with pytest.raises(ConfigError, match="^dim: expected an int >= 1, got "):
        NSAttention(dim, CONFIG)  # type: ignore[arg-type]


# Causality, packing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [0.0, 7.0, 1e4])
@pytest.mark.parametrize("first", [0, 1, 5, 18, 36])
@torch.no_grad()
def test_causality_is_bitwise(first: int, value: float, dtype: torch.dtype) -> None:
    layer, x = make_layer(dtype=dtype), problem(None, dtype).x
    changed = x.clone()
    changed[:, first] = value
    before, after = layer(x), layer(changed)
    assert torch.equal(before[:, :first], after[:, :first])
    assert not torch.equal(before[:, first], after[:, first])


@pytest.mark.parametrize("chosen", [0, 2, 3])
@torch.no_grad()
def test_packed_sequences_do_not_leak(chosen: int) -> None:
    layer, case = make_layer(dtype=torch.float32), problem(LENGTHS, torch.float32)
    start = sum(LENGTHS[:chosen])
    end = start + LENGTHS[chosen]
    changed = case.x.clone()
    changed[:, start:end] = 1e4
    before, after = (layer(x, cu_seqlens=case.cu_seqlens) for x in (case.x, changed))
    assert torch.equal(before[:, :start], after[:, :start])
    assert torch.equal(before[:, end:], after[:, end:])
    assert not torch.equal(before[:, start:end], after[:, start:end])


@pytest.mark.parametrize("config", [CONFIG, VARIANTS["odd"]], ids=["paper", "odd"])
def test_packed_equals_alone(config: NSAConfig) -> None:
    """Outputs side by side, gradients of the parameters summed."""
    layer, case = make_layer(config), problem(LENGTHS)
    together = layer(case.x, cu_seqlens=case.cu_seqlens)
    alone = torch.cat([layer(x) for x in case.x.split(LENGTHS, dim=1)], dim=1)
    agree({"out": together}, {"out": alone})
    agree(gradients(layer, together, case), gradients(layer, alone, case))


# Precision, memory


@LAYOUTS
def test_bf16_autocast_is_as_close_as_the_oracle_under_autocast(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...] | None
) -> None:
    # every block is read: rounding must not decide which
    layer = make_layer(replace(CONFIG, num_selected=8), dtype=torch.float32)
    case = problem(lengths, torch.float32)
    exact = make_layer(replace(CONFIG, num_selected=8))
    wide = Problem(case.x.detach().double().requires_grad_(), case.dout.double(), case.cu_seqlens)
    true_out = by_hand(exact, wide.x, case.cu_seqlens)
    truth = by_part({"out": true_out, **gradients(exact, true_out, wide)})
    seen = seen_by_attention(monkeypatch)
    errors = []
    for function in (layer, lambda x, cu_seqlens: by_hand(layer, x, cu_seqlens)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = function(case.x, cu_seqlens=case.cu_seqlens)
        assert out.dtype == torch.bfloat16
        found = by_part({"out": out, **gradients(layer, out, case)})
        errors.append({name: (found[name] - x).norm().item() for name, x in truth.items()})
    (inputs,) = seen
    pairs = (*inputs.compressed, *inputs.selected, *inputs.window)
    assert {x.dtype for x in (inputs.q, *pairs)} == {torch.bfloat16}
    mine, plain = errors
    for name, x in truth.items():
        factor = 2.0 if name == "out" else 3.0
        assert mine[name] <= factor * plain[name], name
        assert plain[name] < 0.05 * x.norm().item(), name  # or the bound would mean nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_layer_in_half_precision(dtype: torch.dtype) -> None:
    layer, case = make_layer(dtype=dtype), problem(LENGTHS, dtype)
    out = layer(case.x, cu_seqlens=case.cu_seqlens)
    assert out.dtype == dtype
    assert all(x.isfinite().all() for x in (out, *gradients(layer, out, case).values()))


@LAYOUTS
def test_activation_checkpointing_changes_no_gradient(lengths: tuple[int, ...] | None) -> None:
    layer, case = make_layer(), problem(lengths)
    plain = layer(case.x, cu_seqlens=case.cu_seqlens)
    again = checkpoint(layer, case.x, cu_seqlens=case.cu_seqlens, use_reentrant=False)
    assert torch.equal(plain, again)
    agree(gradients(layer, again, case), gradients(layer, plain, case), 1e-12)


def test_strided_input() -> None:
    layer, x = make_layer(), problem(None).x
    strided = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    agree({"out": layer(strided)}, {"out": layer(x)})


def test_an_empty_forward() -> None:
    assert make_layer()(torch.zeros(2, 0, DIM).double()).shape == (2, 0, DIM)


def test_projections_have_no_bias() -> None:
    linears = {name: m for name, m in make_layer().named_modules() if isinstance(m, nn.Linear)}
    with_bias = {name for name, m in linears.items() if m.bias is not None}
    phi = {f"{name}.{part}" for name in ("compress_k", "compress_v") for part in ("up", "down")}
    assert with_bias == {"gate_proj", *phi}


# What a forward hands on


@pytest.mark.parametrize("unit", [True, False])
def test_the_steps_are_told_what_the_layer_knows(
    monkeypatch: pytest.MonkeyPatch, unit: bool
) -> None:
    """A bound on the lengths, whether gates are in 0…1, whether a profiler wants ranges."""
    told = []

    def spy(chosen, inputs, config, **options):
        told.append((inputs.max_seqlen, options))
        return run(chosen, inputs, config, **options)

    monkeypatch.setattr(module, "run", spy)
    gate = GATES["sigmoid"]._replace(in_unit_interval=unit)
    monkeypatch.setattr(module, "GATES", {"sigmoid": gate})
    with use_settings(nvtx=unit):
        layer = make_layer()
    case = problem(LENGTHS)
    layer(case.x, cu_seqlens=case.cu_seqlens, max_seqlen=30)
    options = {"gates_in_unit_interval": unit, "nvtx": unit, "probes": None}
    assert told == [(30, options)]


def test_a_projection_that_decides_its_dtype_is_planned_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """First for what the input promises, then, if q has another dtype, for that."""
    asked = []

    def spy(problem, backend, settings):
        asked.append((problem.dtype, problem.length, problem.packed))
        return plan(problem, backend, settings)

    monkeypatch.setattr(module, "plan", spy)
    layer, case = make_layer(VARIANTS["mean"]), problem(LENGTHS)
    call = {"cu_seqlens": case.cu_seqlens, "max_seqlen": 30}
    want = layer(case.x, **call)
    assert asked == [(torch.float64, 30, True)]
    layer.q_proj.register_forward_hook(lambda module, args, out: out.float())
    layer.o_proj.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    got = layer(case.x, **call)
    assert asked[1:] == [(torch.float64, 30, True), (torch.float32, 30, True)]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
