"""The kernels of the selected branch in Triton's interpreter: run with TRITON_INTERPRET=1."""

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
from nsa.backends.compiled.selected.launch import selected_backward, selected_forward
from nsa.backends.compiled.selected.lists import chunks, union_lists, union_lists_torch
from nsa.backends.compiled.selected.tiles import KeyTiles, QueryTiles, SelectedTiles, config_for
from nsa.core.packing import packed_tokens
from nsa.testing import Inputs, expected, make_inputs, random_blocks
from nsa.testing.strategies import Case, cases
from tests.triton_interpreter import triton_fixes

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


def cut(tokens: int = 4, block_n: int = 16, *, key_tokens: int = 4, **key: Any) -> SelectedTiles:
    """Small tiles, which take many steps."""
    common: dict[str, int] = {"block_n": block_n, "num_warps": 4, "num_stages": 1}
    query = QueryTiles(tokens=tokens, **common)
    dkv = KeyTiles(tokens=key_tokens, **common, **{"chunk": 12, **key})
    return SelectedTiles(forward=query, dq=query, dkv=dkv)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is not a number, or none that means anything."""
    empty = torch.empty

    def poisoned(*size: Any, **kwargs: Any) -> Tensor:
        x = empty(*size, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).min)

    monkeypatch.setattr("nsa.backends.compiled.selected.launch.torch.empty", poisoned)


def starts(inputs: Inputs) -> Tensor | None:
    """The first row of each token's sequence, None for a regular batch."""
    if inputs.cu_seqlens is None:
        return None
    tokens = packed_tokens(inputs.cu_seqlens, inputs.q.shape[1])
    return tokens.seq_start.int()


def run(inputs: Inputs, tiles: SelectedTiles | None = None) -> dict[str, Tensor]:
    """Forward and backward on the selected inputs, named as in the accuracy rule."""
    q, config, block_idx = inputs.q.detach(), inputs.config, inputs.block_idx
    assert block_idx is not None
    k, v = (x.detach() for x in inputs.selected)
    common = {
        "start": starts(inputs),
        "select_block": config.select_block,
        "scale": config.softmax_scale,
    }
    forward = None if tiles is None else tiles.forward
    out, lse = selected_forward(q, k, v, block_idx, **common, tiles=forward)
    sequences = None if inputs.cu_seqlens is None else inputs.cu_seqlens.numel() - 1
    dq, dk, dv = selected_backward(
        inputs.dout, q, k, v, out, lse, block_idx, **common, sequences=sequences, tiles=tiles
    )
    return {"out": out, "lse.selected": lse, "dq": dq, "dselected.k": dk, "dselected.v": dv}


def check(inputs: Inputs, tiles: SelectedTiles | None = None) -> None:
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(case=cases(max_length=30))
@settings(max_examples=3)
def test_obeys_the_accuracy_rule(dtype: torch.dtype, case: Case) -> None:
    check(case.inputs(dtype))


@pytest.mark.parametrize(
    ("heads", "width"),
    [((1, 1), 3), ((4, 2), None), ((3, 1), 3), ((4, 1), None), ((16, 1), 3), ((40, 1), None)],
)
def test_groups(heads: tuple[int, int], width: int | None) -> None:
    """Rows that no head fills, tokens that fill no tile, B of 2."""
    config = replace(CONFIG, num_heads=heads[0], num_kv_heads=heads[1])
    check(listed(make_inputs(config, length=11, batch=2, seed=heads[0]), width), cut())


@pytest.mark.parametrize(("size", "width"), [(4, 2), (6, None), (20, 2), (64, None), (64, 1)])
def test_block_sizes(size: int, width: int | None) -> None:
    """Smaller than a tile of keys, several tiles, a tail that no tile divides."""
    config = replace(CONFIG, num_heads=4, num_kv_heads=1, select_block=size, num_selected=2)
    length = min(size + 13, 70)
    check(listed(make_inputs(config, length=length, seed=size), width, seed=size), cut(16))


@pytest.mark.parametrize(
    "tiles",
    [
        cut(2, key_tokens=2),
        cut(8, key_tokens=2, chunk=3),
        cut(32, 32, key_tokens=16, chunk=1000),
        cut(5, key_tokens=3, with_dq=True),
        cut(7, key_tokens=10, with_dq=True),
        cut(4, span=16),
        cut(4, span=7, chunk=5),
    ],
)
@pytest.mark.parametrize("lengths", [None, (0, 3, 1, 0, 9, 5, 0)])
def test_any_tiles(tiles: SelectedTiles, lengths: tuple[int, ...] | None) -> None:
    length = 17 if lengths is None else None
    inputs = make_inputs(CONFIG, length=length, lengths=lengths)
    check(listed(inputs, 3, seed=3), tiles)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dq_beside_dk_and_dv_in_half_precision(dtype: torch.dtype) -> None:
    """bf16 scales ds before it is rounded; fp16 has few small numbers: dk and dq, after it."""
    inputs = make_inputs(CONFIG, length=17, dtype=dtype)
    check(listed(inputs, 3, seed=3), cut(5, key_tokens=3, with_dq=True))


@pytest.mark.parametrize("width", [None, 2])
def test_packed_with_empty_sequences(width: int | None) -> None:
    lengths = (0, 3, 1, 0, 14, 2, 9, 0)
    check(listed(make_inputs(CONFIG, lengths=lengths, seed=5), width, seed=1), cut(8))


@pytest.mark.parametrize(("rows", "S"), [(1, 23), (7, 23), (7, 17)])
def test_position_of_the_first_row(rows: int, S: int) -> None:
    """A few rows of q alone, fewer or more keys; those that no row sees get zero gradients."""
    T = 20
    inputs = listed(make_inputs(CONFIG, length=23, batch=2, dtype=torch.float64), 4)
    assert inputs.block_idx is not None
    block_idx = inputs.block_idx[:, T - rows : T]
    k, v = (x.detach()[:, :S].requires_grad_() for x in inputs.selected)
    q = inputs.q.detach()[:, T - rows : T].requires_grad_()
    dout = inputs.dout[:, T - rows : T]
    out, lse = reference.selected_attention(q, k, v, block_idx, CONFIG, q_start=T - rows)
    want = (out, lse, *torch.autograd.grad(out, (q, k, v), dout))
    q, k, v, dout = (x.detach().float() for x in (q, k, v, dout))
    common = {
        "start": None,
        "select_block": CONFIG.select_block,
        "scale": CONFIG.softmax_scale,
        "q_start": T - rows,
    }
    found = selected_forward(q, k, v, block_idx, **common, tiles=cut().forward)
    found += selected_backward(dout, q, k, v, *found, block_idx, **common, tiles=cut())
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.double(), b.detach(), rtol=1e-5, atol=1e-6)
    assert (found[3][:, T:] == 0).all()


def test_nothing_to_see() -> None:
    """Rows without a block, or with none that exists: out 0, lse −inf, no gradient."""
    inputs = make_inputs(CONFIG, length=15)
    blocks = torch.full((1, 15, 2, 3), -1, dtype=torch.int32)
    blocks[:, 3:9, :, 0] = 2  # past the query until row 12
    blocks[:, 9:, 0] = torch.tensor([1, 2**30, 2**31 - 1])
    inputs = replace(inputs, block_idx=blocks)
    found = run(inputs, cut(4))
    seen = torch.zeros(1, 15, 6, dtype=torch.bool)
    seen[:, 9:, :3] = True
    assert torch.equal(found["lse.selected"] > float("-inf"), seen)
    assert (found["out"][~seen] == 0).all()
    assert (found["dq"][~seen] == 0).all()
    assert (found["dselected.k"][:, :, 1] == 0).all()
    check(inputs, cut(8))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty_inputs(shape: tuple[int, int, int]) -> None:
    """B, T or S of 0."""
    B, T, S = shape
    q, k, v = torch.ones(B, T, 6, 4), torch.ones(B, S, 2, 4), torch.ones(B, S, 2, 3)
    block_idx = torch.zeros(B, T, 2, 2, dtype=torch.int32)
    common = {"start": None, "select_block": 4, "scale": 1.0}
    out, lse = selected_forward(q, k, v, block_idx, **common)
    assert out.shape == (B, T, 6, 3)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    grads = selected_backward(torch.ones_like(out), q, k, v, out, lse, block_idx, **common)
    for grad, x in zip(grads, (q, k, v), strict=True):
        assert grad.shape == x.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    check(listed(make_inputs(replace(CONFIG, scale=scale), length=13), 3), cut())


def test_strides() -> None:
    inputs = listed(make_inputs(CONFIG, length=13, batch=2))
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


def test_offsets_past_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for dk, dv and dq takes int64 where rows stand that far apart."""
    launched = []

    def far(x: Tensor) -> int:
        launched.append(x)
        return 2**31

    monkeypatch.setattr("nsa.backends.compiled.selected.bwd_dkv._reach", far)
    check(listed(make_inputs(CONFIG, length=20, batch=2)), cut())
    assert launched


@pytest.mark.parametrize("scale", [1e4, 1e10])
def test_huge_inputs_give_finite_results(scale: float) -> None:
    inputs = listed(make_inputs(CONFIG, length=20))
    leaves = tuple(x.detach() * scale for x in inputs.leaves())
    found = run(inputs.with_leaves(leaves), cut())
    assert all(torch.isfinite(x).all() for x in found.values())


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_a_sequence_does_not_leak_into_another() -> None:
    """Not even values that overflow in its own scores."""
    inputs = listed(make_inputs(CONFIG, lengths=(9, 7, 6), seed=1), 3)
    leaves = [x.detach().clone() for x in inputs.leaves()]
    for x in leaves:
        if x.shape[1] == 22:
            x[:, 9:16] = 3e38
    before, after = run(inputs, cut()), run(inputs.with_leaves(tuple(leaves)), cut())
    for name, x in before.items():
        assert torch.equal(x[:, :9], after[name][:, :9]), name
        assert torch.equal(x[:, 16:], after[name][:, 16:]), name


@pytest.mark.parametrize("size", [(6, 10), (40, 20)])
def test_default_tiles(size: tuple[int, int]) -> None:
    config = replace(CONFIG, head_dim=size[0], value_dim=size[1])
    check(listed(make_inputs(config, length=30, dtype=torch.bfloat16)))


def test_default_tiles_fit() -> None:
    """In shared memory, in a mask, in what the list builder sorts."""
    for dtype in (torch.float32, torch.bfloat16):
        for size in (16, 64, 128, 192, 256, 512):
            for group, width in ((1, 16), (1, 100), (3, 2000), (16, 16), (64, 5), (256, 16)):
                found = config_for(
                    size, size, group, width=width, select_block=64, dtype=dtype, length=10**6
                )
                for tiles, held in ((found.forward, size), (found.dq, 2 * size)):
                    assert tiles.tokens <= 32
                    assert tiles.tokens == 1 or tiles.tokens * width <= 1024
                    rows = max(16, tiles.tokens * group)
                    if rows <= 64 and size <= 256:
                        used = rows * held + tiles.block_n * 2 * size * tiles.num_stages
                        assert used * dtype.itemsize <= 227 * 1024


@pytest.mark.parametrize(("tokens", "far"), [(1, 0), (2, 2**31 - 1), (8, 0), (32, 2**28)])
@pytest.mark.parametrize("lengths", [None, (0, 3, 1, 0, 20, 11, 0)])
def test_union_lists(tokens: int, lengths: tuple[int, ...] | None, far: int) -> None:
    """Against plain PyTorch; ``far``: so many key rows that the sort needs int64."""
    regular = lengths is None
    inputs = make_inputs(
        CONFIG, length=21 if regular else None, batch=2 if regular else 1, lengths=lengths
    )
    kwargs = {
        "tokens": tokens,
        "key_rows": far or inputs.q.shape[1] - 2,
        "start": starts(inputs),
        "select_block": 3,
        "q_start": 5 if regular else 0,
    }
    block_idx = random_blocks(inputs, 6, seed=tokens)
    found, want = union_lists(block_idx, **kwargs), union_lists_torch(block_idx, **kwargs)
    assert torch.equal(found.counts, want.counts)
    assert torch.equal(found.masks, want.masks)
    used = torch.arange(want.rows.shape[-1]) < want.counts[..., None]
    assert torch.equal(found.rows.masked_fill(~used, -1), want.rows)
    assert want.counts.max() > 1


@pytest.mark.parametrize("lengths", [None, (0, 3, 1, 0, 20, 11, 0)])
@pytest.mark.parametrize("span", [None, 8])
@pytest.mark.parametrize("far", [0, 2**31])
def test_chunks(lengths: tuple[int, ...] | None, span: int | None, far: int) -> None:
    """Every visible pair is in one chunk of its block, and no chunk holds two blocks."""
    regular = lengths is None
    inputs = make_inputs(
        CONFIG, length=35 if regular else None, batch=2 if regular else 1, lengths=lengths
    )
    B, T = inputs.q.shape[:2]
    start = starts(inputs)
    block_idx = random_blocks(inputs, 6)
    S = far or T
    found = chunks(
        block_idx,
        key_rows=S,
        start=start,
        select_block=3,
        chunk=5,
        span=span,
        sequences=None if lengths is None else len(lengths),
    )
    want = set()
    for b, t, head, slot in (block_idx >= 0).nonzero().tolist():
        first = block_idx[b, t, head, slot].item() * 3 + (0 if start is None else start[t].item())
        if first <= t:
            want.add((b * 2 + head, t // (span or T), first, b * T + t))
    count = found.number.item()
    assert count <= found.at_most
    pairs = []
    for begin, end in zip(found.starts[:count], found.starts[1 : count + 1], strict=True):
        assert 0 < end - begin <= 5
        (key,) = set(found.keys[begin:end].tolist())
        tokens = found.tokens[begin:end].tolist()
        assert tokens == sorted(tokens)
        rest, block = divmod(key, found.blocks)
        first = block * found.unit
        pairs += [(*divmod(rest, found.spans), first, token) for token in tokens]
    assert len(pairs) == len(want)
    assert set(pairs) == want
