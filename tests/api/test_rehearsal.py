"""What a GPU builds kernels for before a call, and the layer's glue there, without a GPU.

``sdpa`` stands for the kernels, and PyTorch for the one that splits heads: which kernels are
launched is tests/triton_interpreter's subject.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from nsa import NSAttention, ShapeError, attention, module, nsa_attention
from nsa.core.dtypes import accumulation_dtype
from nsa.core.inputs import AttentionInputs
from nsa.core.rope import Angles, rope_angles
from nsa.core.split_heads.op import widths
from nsa.testing import make_inputs, random_blocks
from tests.support.layers import CONFIG, DIM, make_layer, problem

LENGTHS = (13, 0, 3, 21)
CONFIGS = {
    "paper": CONFIG,
    "softmax gate": replace(CONFIG, gate="softmax"),
    "shared kv": replace(CONFIG, independent_kv=False, compression="mean"),
    "no rope": replace(CONFIG, rope_theta=None, value_dim=None),
}


class Rehearsed(NamedTuple):
    """One that was asked for."""

    key: Hashable
    device: torch.device
    given: AttentionInputs
    options: dict[str, Any]
    split: list[Any]
    """What of the kernel that splits heads: product, bias, angles."""


def split_in_torch(
    product: Tensor, bias: Tensor | None, angles: Angles | None, config: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """As the kernel does, and as strict about what it is given."""
    sizes = widths(config)
    assert product.shape[-1] % 64 == 0
    q, *heads, logits = product.split([*sizes, product.shape[-1] - sum(sizes)], -1)[:-1]
    keys, values = heads[: len(heads) // 2], heads[len(heads) // 2 :]

    def rotated(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (-1, config.head_dim))
        if angles is None:
            return x.contiguous()
        half = config.head_dim // 2
        for a in angles:
            assert a.shape == (product.shape[1], half)
            assert a.dtype == accumulation_dtype(product)
        cos, sin = (a[:, None] for a in angles)
        low, high = x[..., :half], x[..., half:]
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)

    if bias is not None:
        logits = logits + bias.to(logits)
    v = [x.unflatten(-1, (-1, config.dv)).contiguous() for x in values]
    return rotated(q), [*map(rotated, keys)], v, logits.unflatten(-1, (-1, 3)).contiguous()


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> list[Rehearsed]:
    """As on a GPU; what is rehearsed is done at once and noted."""
    found: list[Rehearsed] = []
    splits: list[Any] = []
    rehearse = attention.rehearse

    def split(*of: Any) -> Any:
        splits.append(of)
        return split_in_torch(*of)

    def once(key: Hashable, device: torch.device, rehearsal: Callable[[], None]) -> None:
        def note(chosen: Any, given: AttentionInputs, config: Any, **options: Any) -> None:
            rehearse(chosen, given, config, **options)
            found.append(Rehearsed(key, device, given, {"chosen": chosen, **options}, splits[:]))
            assert config == chosen_config

        chosen_config = next(x for x in key if hasattr(x, "num_heads"))  # type: ignore[attr-defined]
        monkeypatch.setattr(attention, "rehearse", note)
        monkeypatch.setattr(module, "rehearse", note)
        splits.clear()
        with torch.enable_grad():  # a thread of its own has the default
            rehearsal()

    for where in (attention, module):
        monkeypatch.setattr(where, "launches_soon", lambda x: True)
        monkeypatch.setattr(where, "compiles_itself", lambda *of: False)
        monkeypatch.setattr(where, "build_once", once)
    monkeypatch.setattr(attention, "_has_glue", lambda chosen: True)
    monkeypatch.setattr(attention, "INTERPRETED", True)
    monkeypatch.setattr(module, "split_heads", split)
    return found


class Seen:
    """A probe that keeps what a call computes on."""

    given_to: AttentionInputs

    def given(self, inputs: AttentionInputs) -> AttentionInputs:
        self.given_to = inputs
        return inputs

    def listed(self, inputs: AttentionInputs) -> None: ...


def tensors(inputs: AttentionInputs) -> list[Tensor | None]:
    return [*inputs.differentiable, inputs.cu_seqlens, inputs.block_idx]


def assert_stand_for(found: AttentionInputs, real: AttentionInputs, *, layout: bool) -> None:
    """As large, of the same types, and with the same gradients, without memory."""
    assert found.max_seqlen == real.max_seqlen
    for x, y in zip(tensors(found), tensors(real), strict=True):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert x.is_meta
            assert (x.shape, x.dtype, x.requires_grad) == (y.shape, y.dtype, y.requires_grad)
            assert x.stride() == y.stride() or not layout


def assert_split_alike(rehearsed: Any, layer: NSAttention, config: Any) -> None:
    """The kernel is rehearsed with a bias and with angles where the call has them."""
    product, bias, angles, _ = rehearsed
    assert product.is_meta
    assert product.requires_grad
    real = layer.gate_proj.bias
    assert (bias.is_meta, bias.shape, bias.requires_grad) == (True, real.shape, True)
    assert (angles is None) == (config.rope_theta is None)
    assert angles is None or all(a.is_meta for a in angles)


@pytest.mark.parametrize("packed", [False, True], ids=["regular", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_rehearses_its_call(name: str, packed: bool, rehearsed: list[Rehearsed]) -> None:
    """By either of two ways; and computes what it computes elsewhere, gradients included."""
    config = CONFIGS[name]
    layer, plain = (make_layer(config, dtype=torch.float32, backend="sdpa") for _ in range(2))
    x, dout, cu_seqlens = problem(LENGTHS if packed else None, torch.float32)
    longest = max(LENGTHS) if packed else None
    layer.probes = (seen := Seen(),)
    planned: list[tuple[Any, ...]] = []
    plan_for = layer._plan_for
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "_plan_for", lambda *of: planned.append(of) or plan_for(*of))
        layer.build_kernels(x, cu_seqlens, longest)
        packing: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": longest}
        out = layer(x, **packing)
    assert planned[0][1:] == planned[1][1:] == (torch.float32, cu_seqlens, longest)
    assert len(rehearsed) == 2
    assert rehearsed[0].key == rehearsed[1].key
    for one in rehearsed:
        assert_stand_for(one.given, seen.given_to, layout=False)
        assert one.options["gates_in_unit_interval"] is True
        assert one.options["chosen"] == layer.resolution
        assert one.device == x.device
        assert_split_alike(one.split[0], layer, config)
    layer.probes = ()
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.setattr(module, "launches_itself", lambda *of: False)
        expected = plain(x, **packing)
    torch.testing.assert_close(out, expected)
    grads = [
        torch.autograd.grad(y, [x, *of.parameters()], dout)
        for y, of in ((out, layer), (expected, plain))
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_what_has_kernels_of_its_own(rehearsed: list[Rehearsed]) -> None:
    """Each of these is another key; the same once more, or a little longer, is not."""
    layer = make_layer(dtype=torch.float32, backend="sdpa")
    other = make_layer(replace(CONFIG, window=9), dtype=torch.float32, backend="sdpa")
    half = make_layer(dtype=torch.bfloat16, backend="sdpa")
    x = torch.randn(1, 37, DIM)
    given = rope_angles(torch.arange(37), CONFIG.head_dim, 500.0, torch.float32)
    for _ in range(2):
        layer(x)
        layer(torch.randn(1, 38, DIM))
        layer(torch.randn(1, 70, DIM))
        layer(x, cu_seqlens=torch.tensor([0, 37], dtype=torch.int32))
        layer(x, angles=given)
        other(x)
        half(x.bfloat16())
        with torch.no_grad():
            layer(x)
    keys = [one.key for one in rehearsed]
    assert len(keys) == 16
    assert keys[:8] == keys[8:]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 7
    assert [one.key[-1] for one in rehearsed[:8]] == [False] * 4 + [True] + [False] * 3  # type: ignore[index]
    for one in rehearsed:
        wants = one.key[3]  # type: ignore[index]
        assert all(y.requires_grad == wants for y in one.given.differentiable)


def test_given_angles(rehearsed: list[Rehearsed], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel where all rows share them, in PyTorch otherwise; rounded to fp32."""
    layer = make_layer(replace(CONFIG, rope_theta=None), dtype=torch.float32, backend="sdpa")
    own = make_layer(replace(CONFIG, rope_theta=500.0), dtype=torch.float32, backend="sdpa")
    x, calls = torch.randn(2, 7, DIM), []
    split = module.split_heads
    monkeypatch.setattr(module, "split_heads", lambda *x: calls.append(x[0]) or split(*x))
    given = rope_angles(torch.arange(7), CONFIG.head_dim, 500.0, torch.float64)
    expected = own(x)
    for angles, launched in ((given, 2), (Angles(*(a.expand(2, *a.shape) for a in given)), 0)):
        calls.clear()
        torch.testing.assert_close(layer(x, angles=angles), expected)
        assert [y.is_meta for y in calls] == [True, False][:launched]
        assert all(one.split[0][2] is not None for one in rehearsed)
    x = torch.randn(1, 7, DIM)
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    packed = Angles(*(torch.cat([a[:3], a[:4]]) for a in given))
    torch.testing.assert_close(
        layer(x, cu_seqlens=cu_seqlens, angles=packed), own(x, cu_seqlens=cu_seqlens)
    )


class Scaled(torch.nn.Linear):
    """More than a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Wide(torch.nn.Linear):
    """Of another dtype than its input's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


@pytest.mark.parametrize("change", [Scaled, Wide, None])
def test_parts_of_other_modules(change: type | None, rehearsed: list[Rehearsed]) -> None:
    """The kernel takes what any module made, if it is of one dtype, and none of fp64."""
    calls = []
    dtype = torch.float32 if change else torch.float64
    layer = make_layer(dtype=dtype, backend="sdpa")
    if change:
        layer.gate_proj = change(DIM, layer.gate_proj.out_features, bias=True)
    if change is Wide:
        layer.gate_proj.double()
    if change is None:
        layer.q_proj = Scaled(DIM, layer.q_proj.out_features, bias=False, dtype=dtype)
    x = torch.randn(2, 7, DIM, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        split = module.split_heads
        patch.setattr(module, "split_heads", lambda *x: calls.append(x) or split(*x))
        positions = torch.arange(3, 10)
        found, want = layer._project_by_kernel(x, positions), layer._project(x, positions)
    assert bool(calls) == (change is Scaled)
    for a, b in zip((*found.q, found.gates), (*want.q, want.gates), strict=True):
        torch.testing.assert_close(a, b)


def test_a_gate_inside_another_module(rehearsed: list[Rehearsed]) -> None:
    """It has no bias to speak of."""
    layer = make_layer(dtype=torch.float32, backend="sdpa")
    x = torch.randn(1, 9, DIM)
    expected = layer(x)
    layer.gate_proj = torch.nn.Sequential(layer.gate_proj)  # type: ignore[assignment]
    torch.testing.assert_close(layer(x), expected)
    assert [one.split[0][1] is None for one in rehearsed] == [False, True]


def test_linear_layers_are_one_product(
    rehearsed: list[Rehearsed], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make_layer(dtype=torch.float32, backend="sdpa")
    monkeypatch.setattr(module, "project", None)
    assert layer._project_by_kernel(torch.randn(2, 7, DIM), None).q.shape[:2] == (2, 7)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("packed", [False, True], ids=["regular", "packed"])
def test_a_call_rehearses_itself(packed: bool, grad: bool, rehearsed: list[Rehearsed]) -> None:
    shape: dict[str, Any] = {"lengths": LENGTHS} if packed else {"length": 21, "batch": 2}
    x = make_inputs(CONFIG, **shape)
    x = replace(x, block_idx=random_blocks(x, 3))
    q, *pairs, gates = x.q.mT.contiguous().mT, x.compressed, x.selected, x.window, x.gates
    options: dict[str, Any] = {"cu_seqlens": x.cu_seqlens, "max_seqlen": x.max_seqlen}
    real = AttentionInputs(q, *pairs, gates, **options, block_idx=x.block_idx)
    with torch.set_grad_enabled(grad):
        for block_idx in (x.block_idx, None, x.block_idx):
            call = (q, *pairs, gates, x.config)
            nsa_attention(*call, **options, block_idx=block_idx, backend="sdpa")
    first, second, third = rehearsed
    assert first.key == third.key != second.key
    assert second.given.block_idx is None
    assert first.device == q.device
    if grad:
        assert_stand_for(first.given, real, layout=True)
        assert all(y.grad is not None for y in first.given.differentiable)
    else:
        assert not any(y.requires_grad for y in first.given.differentiable)


def test_a_rehearsal_runs_as_the_call_does(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def run(*args: Any, **options: Any) -> Tensor:
        seen.append((args, options))
        return torch.empty(2)

    monkeypatch.setattr(attention, "run", run)
    attention.rehearse("chosen", "inputs", "config", gates_in_unit_interval=True)  # type: ignore[arg-type]
    assert seen == [(("chosen", "inputs", "config"), {"gates_in_unit_interval": True})]


def test_keys_of_calls(rehearsed: list[Rehearsed]) -> None:
    for config, dtype, length in (
        (CONFIG, torch.float32, 21),
        (CONFIG, torch.float32, 22),
        (CONFIG, torch.float32, 64),
        (CONFIG, torch.float64, 21),
        (replace(CONFIG, window=9), torch.float32, 21),
    ):
        x = make_inputs(config, length=length, dtype=dtype)
        x.attend(nsa_attention, backend="sdpa")
    keys = [one.key for one in rehearsed]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


def test_build_kernels_refuses_what_a_call_refuses(rehearsed: list[Rehearsed]) -> None:
    layer = make_layer(dtype=torch.float32, backend="sdpa")
    with pytest.raises(ShapeError, match="x: expected"):
        layer.build_kernels(torch.randn(1, 5, DIM + 1))
    with pytest.raises(ShapeError, match="cu_seqlens"):
        layer.build_kernels(torch.randn(2, 5, DIM), torch.tensor([0, 5], dtype=torch.int32))
    with pytest.raises(ShapeError, match="x: expected"):
        layer.build_kernels(torch.randn(1, 5, DIM, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        layer.build_kernels(torch.randn(1, 5, DIM))
    assert rehearsed[-1].given.q.dtype == torch.bfloat16
    assert len(rehearsed) == 1


def test_where_no_kernel_is_launched(
    rehearsed: list[Rehearsed], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make_layer(dtype=torch.float32, backend="sdpa")
    x = make_inputs(CONFIG, length=9)
    for where in (attention, module):
        monkeypatch.setattr(where, "launches_soon", lambda x: False)
    layer(torch.randn(1, 9, DIM))
    layer.build_kernels(torch.randn(1, 9, DIM))
    x.attend(nsa_attention, backend="sdpa")
    assert rehearsed == []
    for where in (attention, module):
        monkeypatch.setattr(where, "launches_soon", lambda x: True)
    monkeypatch.setattr(attention, "_has_glue", lambda chosen: False)
    layer(torch.randn(1, 9, DIM))
    x.attend(nsa_attention, backend="sdpa")
    assert rehearsed == []


def test_whose_glue_is_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = NSAttention(DIM, CONFIG, backend="sdpa"), torch.randn(1, 9, DIM)
    layer(x)
    sdpa = layer.resolution
    assert sdpa is not None
    compiled = sdpa._replace(backend="compiled")
    monkeypatch.setattr(attention, "INTERPRETED", False)
    assert not attention.launches_itself(compiled, x)
    monkeypatch.setattr(attention, "INTERPRETED", True)
    assert not attention.launches_itself(sdpa, x)
    assert attention.launches_itself(compiled, x) is True

    def inside(y: Tensor) -> Tensor:
        assert attention.launches_itself(compiled, x) is torch.compiler.is_compiling()
        return y.sum()

    torch.func.grad(inside)(x)
    with forward_ad.dual_level():
        inside(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.func.grad(inside)(x)
    assert attention.launches_itself(compiled, x) is True
