"""The window kernels in Triton's interpreter: run with TRITON_INTERPRET=1."""

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

from nsa import NSAConfig, reference
from nsa.backends.compiled.window.launch import addressable, window_backward, window_forward
from nsa.backends.compiled.window.tiles import Tiles
from nsa.core.packing import packed_tokens
from nsa.testing import Inputs, expected, make_inputs, random_blocks
from nsa.testing.strategies import Case, cases
from tests.triton_interpreter import triton_fixes

triton_fixes.apply()

TILES = Tiles(block_m=64, block_n=16, num_warps=4, num_stages=1)
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


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is not a number."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(*size: Any, **kwargs: Any) -> Tensor:
        return empty(*size, **kwargs).fill_(float("nan"))

    def poisoned_like(x: Tensor, **kwargs: Any) -> Tensor:
        return empty_like(x, **kwargs).fill_(float("nan"))

    monkeypatch.setattr("nsa.backends.compiled.window.launch.torch.empty", poisoned)
    monkeypatch.setattr("nsa.backends.compiled.window.launch.torch.empty_like", poisoned_like)


def run(inputs: Inputs, tiles: Tiles | None = TILES) -> dict[str, Tensor]:
    """Forward and backward on the window's inputs, named as in the accuracy rule."""
    q, (k, v), config = inputs.q.detach(), inputs.window, inputs.config
    k, v = k.detach(), v.detach()
    start = None
    if inputs.cu_seqlens is not None:
        tokens = packed_tokens(inputs.cu_seqlens, q.shape[1])
        start = tokens.seq_start.int()
    common = {"window": config.window, "start": start, "scale": config.softmax_scale}
    out, lse = window_forward(q, k, v, **common, tiles=tiles)
    dq, dk, dv = window_backward(
        inputs.dout, q, k, v, out, lse, **common, q_tiles=tiles, k_tiles=tiles
    )
    return {"out": out, "lse.window": lse, "dq": dq, "dwindow.k": dk, "dwindow.v": dv}


def check(inputs: Inputs, tiles: Tiles | None = TILES) -> None:
    """The accuracy rule, with gates that shut the other branches."""
    gates = torch.zeros_like(inputs.gates)
    gates[..., 2] = 1.0
    if inputs.block_idx is None:
        inputs = replace(inputs, block_idx=random_blocks(inputs, 1))
    want = expected(replace(inputs, gates=gates))
    for name, x in run(inputs, tiles).items():
        error = want[name].error(x)
        assert error <= want[name].bound, f"{name}: {error:.2e} > {want[name].bound:.2e}"
        assert x.dtype == (torch.float32 if name == "lse.window" else inputs.q.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(case=cases(max_length=60))
@settings(max_examples=5)
def test_obeys_the_accuracy_rule(dtype: torch.dtype, case: Case) -> None:
    check(case.inputs(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 7, 16, 41, 1000])
def test_windows(window: int, dtype: torch.dtype) -> None:
    """41: the last token of the second tile is the first that does not see the first key."""
    check(make_inputs(replace(CONFIG, window=window), length=50, dtype=dtype))


@pytest.mark.parametrize("lengths", [None, (0, 3, 41, 20, 0)])
def test_parts_of_the_queries_add_up(lengths: tuple[int, ...] | None) -> None:
    length = 70 if lengths is None else None
    x = make_inputs(replace(CONFIG, window=40), length=length, lengths=lengths)
    q, k, v = x.q.detach(), *(y.detach() for y in x.window)
    start = None
    if x.cu_seqlens is not None:
        tokens = packed_tokens(x.cu_seqlens, q.shape[1])
        start = tokens.seq_start.int()
    call = {"window": 40, "start": start, "scale": 0.3}
    out, lse = window_forward(q, k, v, **call, tiles=TILES)
    whole, parts = (
        window_backward(x.dout, q, k, v, out, lse, **call, k_tiles=TILES, splits=splits)
        for splits in (1, 3)
    )
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("window", [1, 7, 40])
def test_packed_with_empty_sequences(window: int) -> None:
    lengths = (0, 3, 1, 0, 41, 2, 20, 0)
    check(make_inputs(replace(CONFIG, window=window), lengths=lengths, seed=5))


def test_long_sequences_after_the_256_starts_read_at_once() -> None:
    """The end of a key's sequence is found 256 tokens at a time."""
    config = NSAConfig(num_heads=1, num_kv_heads=1, head_dim=2, window=400, rope_theta=None)
    tiles = Tiles(block_m=64, block_n=64, num_warps=4, num_stages=1)
    check(make_inputs(config, lengths=(5, 300, 260), seed=2), tiles)


@pytest.mark.parametrize("heads", [(1, 1), (5, 1), (16, 1), (40, 1), (3, 3)])
def test_groups(heads: tuple[int, int]) -> None:
    """Rows that no head fills, one token a tile, many tokens a tile."""
    config = replace(CONFIG, num_heads=heads[0], num_kv_heads=heads[1], window=9)
    check(make_inputs(config, length=23, seed=heads[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(48, 80), (72, 40)])
def test_heads_in_two_parts(heads: tuple[int, int], dtype: torch.dtype) -> None:
    config = replace(CONFIG, head_dim=heads[0], value_dim=heads[1])
    check(make_inputs(config, lengths=(17, 0, 9, 1), dtype=dtype))


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    check(make_inputs(replace(CONFIG, scale=scale), length=30))


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_position_of_the_first_row(rows: int) -> None:
    """The last rows of q alone; keys that none of them sees get zero gradients."""
    T = 45
    inputs = make_inputs(CONFIG, length=T, dtype=torch.float64)
    k, v = (x.detach().requires_grad_() for x in inputs.window)
    q = inputs.q.detach()[:, T - rows :].requires_grad_()
    dout = inputs.dout[:, T - rows :]
    out, lse = reference.window_attention(q, k, v, CONFIG, q_start=T - rows)
    want = (out, lse, *torch.autograd.grad(out, (q, k, v), dout))
    q, k, v, dout = (x.detach().float() for x in (q, k, v, dout))
    common = {
        "window": CONFIG.window,
        "start": None,
        "scale": CONFIG.softmax_scale,
        "q_start": T - rows,
    }
    found = window_forward(q, k, v, **common, tiles=TILES)
    found += window_backward(dout, q, k, v, *found, **common, q_tiles=TILES, k_tiles=TILES)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.double(), b.detach(), rtol=1e-5, atol=1e-6)
    assert (found[3][:, : T - rows - CONFIG.window + 1] == 0).all()


def test_strides() -> None:
    inputs = make_inputs(CONFIG, length=30, batch=2)
    leaves = [x.detach() for x in inputs.leaves()]
    for i in (0, 5, 6):
        leaves[i] = leaves[i].transpose(1, 2).contiguous().transpose(1, 2)
    leaves[5] = torch.stack([leaves[5], leaves[5]], -1)[..., 0]
    odd = inputs.with_leaves(tuple(leaves))
    odd = replace(odd, dout=inputs.dout.sum(-1, keepdim=True).expand(inputs.dout.shape))
    assert not any(x.is_contiguous() for x in (odd.q, odd.window.k, odd.dout))
    check(odd)


@pytest.mark.parametrize("strides", [(0, 2**24, 8, 1), (0, 8, 2**30, 1), (0, 16, 8, 2**28)])
def test_rows_that_stand_far_apart_are_copied(strides: tuple[int, ...]) -> None:
    """Offsets within a tile are int32."""
    near = torch.empty(1, 4, 2, 8, device="meta")
    assert addressable(near) is near
    far = torch.empty_strided((1, 4, 2, 8), strides, device="meta")
    assert addressable(far).stride() == near.stride()


@pytest.mark.parametrize("scale", [1e4, 1e10])
def test_huge_inputs_give_finite_results(scale: float) -> None:
    inputs = make_inputs(CONFIG, length=50)
    leaves = tuple(x.detach() * scale for x in inputs.leaves())
    found = run(inputs.with_leaves(leaves))
    assert all(torch.isfinite(x).all() for x in found.values())


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_a_sequence_does_not_leak_into_another() -> None:
    """Not even values that overflow in its own scores."""
    inputs = make_inputs(CONFIG, lengths=(20, 13, 12), seed=1)
    leaves = [x.detach().clone() for x in inputs.leaves()]
    for x in leaves:
        if x.shape[1] == 45:
            x[:, 20:33] = 3e38
    before, after = run(inputs), run(inputs.with_leaves(tuple(leaves)))
    for name, x in before.items():
        assert torch.equal(x[:, :20], after[name][:, :20]), name
        assert torch.equal(x[:, 33:], after[name][:, 33:]), name


def test_default_tiles() -> None:
    check(make_inputs(CONFIG, length=70, dtype=torch.bfloat16), None)
