"""The kernels of the selected branch for short sequences, in Triton's interpreter."""

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
from nsa.kernels.selected_short import block_bits, short_backward, short_forward
from nsa.kernels.window import WindowTiles
from nsa.testing import Inputs, expected, make_inputs, random_blocks
from nsa.testing.strategies import Case, cases
from nsa.varlen import token_members
from tests.interpreter import triton_fixes

triton_fixes.apply()

CONFIG = NSAConfig(
    num_heads=6,
    num_kv_heads=2,
    head_dim=6,
    value_dim=10,
    compress_block=2,
    compress_stride=2,
    select_block=6,
    num_selected=4,
    num_local=1,
)


def cut(rows: int = 16, keys: int = 16) -> WindowTiles:
    """Small tiles, which take many steps."""
    return WindowTiles(rows=rows, keys=keys, num_warps=4, num_stages=1)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is not a number, or none that means anything."""
    empty = torch.empty

    def poisoned(*size: Any, **kwargs: Any) -> Tensor:
        x = empty(*size, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else -(10**9))

    monkeypatch.setattr("nsa.kernels.selected_short.torch.empty", poisoned)


def run(inputs: Inputs, tiles: WindowTiles | None) -> dict[str, Tensor]:
    """Forward and backward on the selected inputs, named as in the accuracy rule."""
    q, config, block_idx = inputs.q.detach(), inputs.config, inputs.block_idx
    assert block_idx is not None
    k, v = (x.detach() for x in inputs.selected)
    start = None
    if inputs.cu_seqlens is not None:
        tokens = token_members(inputs.cu_seqlens, q.shape[1])
        start = tokens.starts[tokens.seq].int()
    common = {
        "start": start,
        "select_block": config.select_block,
        "scale": config.softmax_scale,
    }
    out, lse = short_forward(q, k, v, block_idx, **common, tiles=tiles)
    dq, dk, dv = short_backward(
        inputs.dout, q, k, v, out, lse, block_idx, **common, q_tiles=tiles, k_tiles=tiles
    )
    return {"out": out, "lse.selected": lse, "dq": dq, "dselected.k": dk, "dselected.v": dv}


def check(inputs: Inputs, tiles: WindowTiles | None = None) -> None:
    """The accuracy rule, with gates that shut the other branches."""
    gates = torch.zeros_like(inputs.gates)
    gates[..., 1] = 1.0
    want = expected(replace(inputs, gates=gates))
    for name, x in run(inputs, tiles).items():
        error = want[name].error(x)
        assert error <= want[name].bound, f"{name}: {error:.2e} > {want[name].bound:.2e}"
        assert x.dtype == (torch.float32 if name == "lse.selected" else inputs.q.dtype)


def listed(inputs: Inputs, width: int | None = None, seed: int = 0) -> Inputs:
    """With random lists of that width, or those that the oracle selects."""
    if width is not None:
        return replace(inputs, block_idx=random_blocks(inputs, width, seed))
    q, k = inputs.q.detach(), inputs.compressed.k.detach()
    return replace(
        inputs, block_idx=reference.select_blocks(q, k, inputs.config, inputs.cu_seqlens)
    )


def few_blocks(case: Case) -> Case:
    """The same with blocks large enough for 64 of them to make a sequence."""
    longest = case.length or max(case.lengths or (0,))
    if longest <= 64 * case.config.select_block:
        return case
    return replace(case, config=replace(case.config, select_block=4 * case.config.select_block))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(case=cases(max_length=60))
@settings(max_examples=4)
def test_obeys_the_accuracy_rule(dtype: torch.dtype, case: Case) -> None:
    check(few_blocks(case).inputs(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [4, 6, 16])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (4, 1), (16, 1)])
def test_groups_and_block_sizes(heads: tuple[int, int], size: int, dtype: torch.dtype) -> None:
    """Rows that no head fills; tiles of keys that divide blocks, and that do not."""
    config = replace(CONFIG, num_heads=heads[0], num_kv_heads=heads[1], select_block=size)
    inputs = make_inputs(config, length=37, batch=2, dtype=dtype, seed=size)
    check(listed(inputs, 3, seed=heads[0]), cut())


@pytest.mark.parametrize("size", [32, 16, 6])
@pytest.mark.parametrize("tiles", [cut(), cut(64, 32), cut(32, 64)])
@pytest.mark.parametrize("width", [None, 2])
def test_packed_with_empty_sequences(width: int | None, tiles: WindowTiles, size: int) -> None:
    """Several sequences to a tile, tiles of keys that start where sequences do."""
    inputs = make_inputs(
        replace(CONFIG, select_block=size), lengths=(0, 3, 1, 0, 41, 2, 17, 0), seed=5
    )
    check(listed(inputs, width, seed=1), tiles)


@pytest.mark.parametrize("tiles", [cut(), cut(16, 32), cut(64, 64), cut(8, 16)])
@pytest.mark.parametrize("size", [64, 32, 2])
def test_any_tiles(tiles: WindowTiles, size: int) -> None:
    """Several tiles to a block, several blocks to a tile, more of them than 32 bits."""
    config = replace(CONFIG, num_heads=3, num_kv_heads=1, select_block=size, num_selected=2)
    check(listed(make_inputs(config, length=64, seed=size), 2, seed=size), tiles)


@pytest.mark.parametrize("keys", [16, 64])
@pytest.mark.parametrize("size", [1, 16])
def test_all_64_blocks(size: int, keys: int) -> None:
    """The last of them too, whose bit is the sign, and many query tiles a key tile."""
    config = NSAConfig(
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        compress_block=1,
        compress_stride=1,
        select_block=size,
        num_selected=4,
        rope_theta=None,
    )
    inputs = listed(make_inputs(config, length=64 * size, seed=1), 5)
    assert inputs.block_idx is not None
    inputs.block_idx[:, 63 * size :, :, 0] = 63
    inputs.block_idx[:, 63 * size :, :, 1:] = -1
    check(inputs, cut(8, keys))


@pytest.mark.parametrize("size", [6, 16])
@pytest.mark.parametrize(("rows", "S"), [(1, 53), (7, 53), (30, 50)])
def test_position_of_the_first_row(rows: int, S: int, size: int) -> None:
    """A few rows of q alone; keys that none of them sees get zero gradients."""
    T, config = 50, replace(CONFIG, select_block=size)
    inputs = listed(make_inputs(config, length=53, batch=2, dtype=torch.float64), 4)
    assert inputs.block_idx is not None
    block_idx = inputs.block_idx[:, T - rows : T]
    k, v = (x.detach()[:, :S].requires_grad_() for x in inputs.selected)
    q = inputs.q.detach()[:, T - rows : T].requires_grad_()
    dout = inputs.dout[:, T - rows : T]
    out, lse = reference.selected_attention(q, k, v, block_idx, config, q_start=T - rows)
    want = (out, lse, *torch.autograd.grad(out, (q, k, v), dout))
    q, k, v, dout = (x.detach().float() for x in (q, k, v, dout))
    common = {
        "start": None,
        "select_block": size,
        "scale": config.softmax_scale,
        "q_start": T - rows,
    }
    found = short_forward(q, k, v, block_idx, **common, tiles=cut())
    found += short_backward(
        dout, q, k, v, *found, block_idx, **common, q_tiles=cut(), k_tiles=cut()
    )
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.double(), b.detach(), rtol=1e-5, atol=1e-6)
    assert (found[3][:, T:] == 0).all()


@pytest.mark.parametrize("keys", [16, 32])
def test_nothing_to_see(keys: int) -> None:
    """Rows without a block, or with none that exists: out 0, lse −inf, no gradient."""
    inputs = make_inputs(replace(CONFIG, select_block=16), length=50)
    blocks = torch.full((1, 50, 2, 3), -1, dtype=torch.int32)
    blocks[:, 3:39, :, 0] = 2  # past the query until row 32
    blocks[:, 39:, 0] = torch.tensor([1, 64, 2**31 - 1])
    inputs = replace(inputs, block_idx=blocks)
    found = run(inputs, cut(16, keys))
    seen = torch.zeros(1, 50, 6, dtype=torch.bool)
    seen[:, 32:39] = True
    seen[:, 39:, :3] = True
    assert torch.equal(found["lse.selected"] > float("-inf"), seen)
    assert (found["out"][~seen] == 0).all()
    assert (found["dq"][~seen] == 0).all()
    assert (found["dselected.k"][:, :16] == 0).all()
    check(inputs, cut(16, keys))


def test_blocks_past_the_bits_are_dropped() -> None:
    lists = torch.tensor([[-1, -1], [0, 63], [64, 127], [5, 2**31 - 1]], dtype=torch.int32)
    bits = block_bits(lists.view(1, 4, 1, 2)).flatten().tolist()
    assert bits == [0, 1 - 2**63, 0, 32]


def test_keys_past_64_blocks_are_not_seen() -> None:
    """Too long a sequence: nothing wraps round to a block that is listed."""
    q, k, v = torch.ones(1, 140, 1, 2), torch.ones(1, 140, 1, 2), torch.ones(1, 140, 1, 2)
    block_idx = torch.tensor([0, 1, 63], dtype=torch.int32).expand(1, 140, 1, 3)
    common = {"start": None, "select_block": 2, "scale": 1.0}
    for tiles in (cut(), cut(16, 2), cut(16, 64)):
        if tiles.keys == 2:
            continue  # no such products
        out, lse = short_forward(q, k, v, block_idx, **common, tiles=tiles)
        _, dk, dv = short_backward(
            out, q, k, v, out, lse, block_idx, **common, q_tiles=tiles, k_tiles=tiles
        )
        nobody = torch.ones(140, dtype=torch.bool)
        nobody[[0, 1, 2, 3, 126, 127]] = False
        assert (dv[0, nobody] == 0).all()
        assert (dk[0, nobody] == 0).all()
        torch.testing.assert_close(dv.sum((0, 1, 2)), out.sum((0, 1, 2)))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty_inputs(shape: tuple[int, int, int]) -> None:
    """B, T or S of 0."""
    B, T, S = shape
    q, k, v = torch.ones(B, T, 6, 4), torch.ones(B, S, 2, 4), torch.ones(B, S, 2, 3)
    block_idx = torch.zeros(B, T, 2, 2, dtype=torch.int32)
    common = {"start": None, "select_block": 4, "scale": 1.0}
    out, lse = short_forward(q, k, v, block_idx, **common)
    assert out.shape == (B, T, 6, 3)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    grads = short_backward(torch.ones_like(out), q, k, v, out, lse, block_idx, **common)
    for grad, x in zip(grads, (q, k, v), strict=True):
        assert grad.shape == x.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    check(listed(make_inputs(replace(CONFIG, scale=scale), length=30), 3), cut())


def test_strides() -> None:
    inputs = listed(make_inputs(CONFIG, length=25, batch=2))
    leaves = [x.detach() for x in inputs.leaves()]
    for i in (0, 3, 4):
        leaves[i] = leaves[i].transpose(1, 2).contiguous().transpose(1, 2)
    leaves[3] = torch.stack([leaves[3], leaves[3]], -1)[..., 0]
    odd = inputs.with_leaves(tuple(leaves))
    odd = replace(odd, dout=inputs.dout.sum(-1, keepdim=True).expand(inputs.dout.shape))
    assert inputs.block_idx is not None
    backwards = inputs.block_idx.transpose(1, 2).contiguous().transpose(1, 2)
    odd = replace(odd, block_idx=backwards)
    assert not any(x.is_contiguous() for x in (odd.q, odd.selected.k, odd.dout, backwards))
    check(odd, cut())


@pytest.mark.parametrize("size", [6, 16])
@pytest.mark.parametrize("scale", [1e4, 1e10])
def test_huge_inputs_give_finite_results(scale: float, size: int) -> None:
    inputs = listed(make_inputs(replace(CONFIG, select_block=size), length=50))
    leaves = tuple(x.detach() * scale for x in inputs.leaves())
    found = run(inputs.with_leaves(leaves), cut())
    assert all(torch.isfinite(x).all() for x in found.values())


@pytest.mark.parametrize("size", [6, 16])
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_a_sequence_does_not_leak_into_another(size: int) -> None:
    """Not even values that overflow in its own scores."""
    config = replace(CONFIG, select_block=size)
    inputs = listed(make_inputs(config, lengths=(20, 13, 12), seed=1), 3)
    leaves = [x.detach().clone() for x in inputs.leaves()]
    for x in leaves:
        if x.shape[1] == 45:
            x[:, 20:33] = 3e38
    tiles = cut(64, 16)
    before, after = run(inputs, tiles), run(inputs.with_leaves(tuple(leaves)), tiles)
    for name, x in before.items():
        assert torch.equal(x[:, :20], after[name][:, :20]), name
        assert torch.equal(x[:, 33:], after[name][:, 33:]), name


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_default_tiles(size: int, dtype: torch.dtype) -> None:
    config = replace(CONFIG, head_dim=40, value_dim=20, select_block=size)
    check(listed(make_inputs(config, length=64, dtype=dtype)))
