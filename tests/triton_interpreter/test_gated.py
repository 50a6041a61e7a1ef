"""The gated sum of the branches at once, in Triton's interpreter."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from nsa import KV, NSAConfig
from nsa.backends.compiled import steps as compiled
from nsa.backends.compiled.selected import tiles as selected_tiles
from nsa.core.inputs import AttentionInputs
from nsa.testing import Inputs, expected, make_inputs, random_blocks
from nsa.testing.strategies import Case, cases
from tests.support.deterministic import deterministic
from tests.triton_interpreter import triton_fixes

triton_fixes.apply()

CONFIG = NSAConfig(
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    value_dim=6,
    compress_block=4,
    compress_stride=2,
    select_block=6,
    num_selected=4,
    num_local=1,
    window=7,
)
IN_UNIT_INTERVAL = pytest.mark.parametrize(
    "in_unit_interval", [True, False], ids=["folded", "weighted"]
)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is not a number."""
    empty = torch.empty

    def poisoned(*size: Any, **kwargs: Any) -> Tensor:
        x = empty(*size, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr("nsa.backends.compiled.gated.launch.torch.empty", poisoned)


def run(inputs: Inputs, in_unit_interval: bool) -> dict[str, Tensor]:
    """Forward and backward, named as in the accuracy rule."""
    leaves = [x.detach().requires_grad_() for x in inputs.leaves()]
    x = inputs.with_leaves(tuple(leaves))
    out = attend(x.record, x.config, in_unit_interval)
    grads = torch.autograd.grad(out, leaves, x.dout)
    assert [y.dtype for y in grads] == [y.dtype for y in leaves]
    return {"out": out, **{f"d{n}": g for n, g in zip(Inputs.NAMES, grads, strict=True)}}


def attend(
    x: AttentionInputs, config: NSAConfig, in_unit_interval: bool, *, selected_here: bool = False
) -> Tensor:
    with torch.no_grad():
        out_cmp, lse_cmp = compiled.compressed_attention(
            x.q, *x.compressed, config, x.cu_seqlens, q_start=x.q_start
        )
    assert x.block_idx is not None
    lists = x.block_idx
    if selected_here:  # on lists of a caller's it does not rely
        x = x._replace(block_idx=None)
    return compiled.gated_attention(
        x, out_cmp, lse_cmp, lists, config, gates_in_unit_interval=in_unit_interval
    )


def rows_of(x: AttentionInputs, config: NSAConfig, first: int, end: int) -> AttentionInputs:
    """Some queries, and the keys that they may see; of the window no more than that."""
    before = min(first, config.window - 1)
    return x._replace(
        q=x.q[:, first:end],
        compressed=KV(*(y[:, : config.num_compressed(end)] for y in x.compressed)),
        selected=KV(*(y[:, :end] for y in x.selected)),
        window=KV(*(y[:, first - before : end] for y in x.window)),
        gates=x.gates[:, first:end],
        block_idx=None if x.block_idx is None else x.block_idx[:, first:end],
        q_start=first,
        window_start=before,
    )


def check(inputs: Inputs, in_unit_interval: bool) -> None:
    if inputs.block_idx is None:
        inputs = replace(inputs, block_idx=random_blocks(inputs, 1))
    want = expected(inputs)
    for name, x in run(inputs, in_unit_interval).items():
        error = want[name].error(x)
        assert error <= want[name].bound, f"{name}: {error:.2e} > {want[name].bound:.2e}"


@IN_UNIT_INTERVAL
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
)
@given(case=cases(max_length=30))
@settings(max_examples=3)
def test_obeys_the_accuracy_rule(dtype: torch.dtype, in_unit_interval: bool, case: Case) -> None:
    check(case.inputs(dtype), in_unit_interval)


@IN_UNIT_INTERVAL
@pytest.mark.parametrize("head_dim", [8, 80])
@pytest.mark.parametrize("shape", [{"length": 25, "batch": 2}, {"lengths": (17, 0, 9, 1)}])
def test_every_way_to_sum_dq(
    shape: dict[str, object], head_dim: int, in_unit_interval: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 by atomic adds, in fp32 by the kernel for dq, in q's dtype by the same."""
    monkeypatch.setattr(selected_tiles, "WITH_DQ_FROM", 1)
    config = replace(CONFIG, head_dim=head_dim)
    surplus = "lengths" in shape
    for dtype in (torch.bfloat16, torch.float32)[: 2 if head_dim == 8 else 1]:
        check(make_inputs(config, dtype=dtype, surplus=surplus, **shape), in_unit_interval)


@pytest.mark.parametrize(
    ("mode", "in_unit_interval"),
    [(False, True), (True, False)],
    ids=["atomic, folded", "in order, weighted"],
)
def test_far_blocks(mode: bool, in_unit_interval: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of groups smaller than those with a row of tiles."""
    monkeypatch.setattr(selected_tiles, "FAR_SINCE", 3)
    monkeypatch.setattr(selected_tiles, "WITH_DQ_FROM", 1)
    config = replace(CONFIG, num_heads=4, num_kv_heads=2, select_block=4)
    shape: dict[str, Any] = {"lengths": (2, 0, 18)} if mode else {"length": 18}
    x = make_inputs(config, dtype=torch.bfloat16, surplus=mode, **shape)
    with deterministic(mode):
        check(replace(x, block_idx=random_blocks(x, 5)), in_unit_interval)


@IN_UNIT_INTERVAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_in_two_parts(dtype: torch.dtype, in_unit_interval: bool) -> None:
    config = replace(CONFIG, head_dim=48, value_dim=80)
    x = make_inputs(config, lengths=(17, 0, 9, 1), dtype=dtype, surplus=True)
    check(x, in_unit_interval)


@IN_UNIT_INTERVAL
def test_shut_gates(in_unit_interval: bool) -> None:
    """A gate of 0 takes its branch out, and still has a gradient."""
    x = make_inputs(CONFIG, length=30)
    gates = x.gates.detach().clone()
    gates[:, ::2, :, 0] = gates[:, 1::2, :, 1] = gates[:, ::3, :, 2] = 0.0
    check(replace(x, gates=gates.requires_grad_()), in_unit_interval)


@pytest.mark.parametrize(
    ("way", "in_unit_interval"),
    [("dq", True), ("atomic", False), ("far", False), ("shared lists", True)],
)
def test_queries_that_begin_at_a_position(
    way: str, in_unit_interval: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As context parallelism has them: parts are within the bounds of the whole."""
    config, T, parts = CONFIG, 19, [(0, 2), (2, 19)]
    if way in ("atomic", "far"):
        monkeypatch.setattr(selected_tiles, "WITH_DQ_FROM", 1)
    if way == "far":
        monkeypatch.setattr(selected_tiles, "FAR_SINCE", 3)
        config = replace(CONFIG, num_heads=4, num_kv_heads=2, select_block=4)
    if way == "shared lists":
        config = replace(CONFIG, select_block=16, select_share=16)
        T, parts = 35, [(0, 16), (16, 35)]
    x = make_inputs(config, length=T, dtype=torch.bfloat16)
    lists = random_blocks(x, 4)
    if way == "shared lists":
        assert selected_tiles.shared_tokens(x.q, x.selected.v, config.select_share) > 1
        lists = compiled.select_blocks(x.q, x.compressed.k, config)
    x = replace(x, block_idx=lists)
    out = torch.cat(
        [
            attend(
                rows_of(x.record, config, *part),
                config,
                in_unit_interval,
                selected_here=way == "shared lists",
            )
            for part in parts
        ],
        1,
    )
    grads = torch.autograd.grad(out, x.leaves(), x.dout)
    found = {"out": out, **{f"d{n}": g for n, g in zip(Inputs.NAMES, grads, strict=True)}}
    for name, want in expected(x).items():
        assert name not in found or want.error(found[name]) <= want.bound, name


def test_gates_below_zero() -> None:
    x = make_inputs(CONFIG, length=30)
    check(replace(x, gates=(x.gates.detach() - 0.5).requires_grad_()), in_unit_interval=False)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("factor", [-1.0, 1.5])
def test_gates_outside_the_unit_interval_are_seen(factor: float) -> None:
    """No wrong number comes out of it."""
    x = make_inputs(CONFIG, length=30)
    gates = torch.ones_like(x.gates.detach()) * factor
    x = replace(x, gates=gates, block_idx=random_blocks(x, 1))
    assert run(x, in_unit_interval=True)["dq"].isnan().all()


def test_gates_above_one() -> None:
    x = make_inputs(CONFIG, length=30)
    check(replace(x, gates=(x.gates.detach() * 3).requires_grad_()), in_unit_interval=False)
