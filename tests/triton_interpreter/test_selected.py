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
from nsa.backends.compiled.selected.inverse_index import inverse_index
from nsa.backends.compiled.selected.launch import selected_backward, selected_forward
from nsa.backends.compiled.selected.tiles import (
    ROWS,
    FarTiles,
    KeyTiles,
    QueryTiles,
    SelectedTiles,
    dq_dtype,
    tile_row,
    tiles_for,
)
from nsa.backends.compiled.selected.union import TileUnions, tile_unions
from nsa.backends.compiled.tiling import UNTUNED
from nsa.core.packing import packed_tokens
from nsa.testing import Inputs, expected, make_inputs, random_blocks
from nsa.testing.strategies import Case, cases
from tests.support.deterministic import unequal
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


def tiling(
    tokens: int = 4,
    block_n: int = 16,
    *,
    key_tokens: int = 4,
    since: int | None = None,
    room: int = 10**9,
    **key: Any,
) -> SelectedTiles:
    """Small tiles, which take many steps; far blocks from position ``since`` on."""
    common: dict[str, int] = {"block_n": block_n, "num_warps": 4, "num_stages": 1}
    dkv = KeyTiles(tokens=key_tokens, **common, **{"chunk": 12, **key})
    far = None
    if since is not None:
        far = FarTiles(tokens=key_tokens, **common, chunk=dkv.chunk, since=since, room=room)
    query = QueryTiles(tokens=tokens, **common, far=far)
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


def run(inputs: Inputs, tiles: SelectedTiles | None = None, share: int = 1) -> dict[str, Tensor]:
    """Forward and backward on the selected inputs, named as in the accuracy rule."""
    q, config, block_idx = inputs.q.detach(), inputs.config, inputs.block_idx
    assert block_idx is not None
    k, v = (x.detach() for x in inputs.selected)
    common = {
        "start": starts(inputs),
        "select_block": config.select_block,
        "scale": config.softmax_scale,
        "sequences": None if inputs.cu_seqlens is None else inputs.cu_seqlens.numel() - 1,
        "share": share,
    }
    forward = None if tiles is None else tiles.forward
    out, lse = selected_forward(q, k, v, block_idx, **common, tiles=forward)
    dq, dk, dv = selected_backward(inputs.dout, q, k, v, out, lse, block_idx, **common, tiles=tiles)
    return {"out": out, "lse.selected": lse, "dq": dq, "dselected.k": dk, "dselected.v": dv}


def check(inputs: Inputs, tiles: SelectedTiles | None = None, share: int = 1) -> None:
    """The accuracy rule, with gates that shut the other branches."""
    gates = torch.zeros_like(inputs.gates)
    gates[..., 1] = 1.0
    want = expected(replace(inputs, gates=gates))
    for name, x in run(inputs, tiles, share).items():
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
    check(listed(make_inputs(config, length=11, batch=2, seed=heads[0]), width), tiling())


@pytest.mark.parametrize(("size", "width"), [(4, 2), (6, None), (20, 2), (64, None), (64, 1)])
def test_block_sizes(size: int, width: int | None) -> None:
    """Smaller than a tile of keys, several tiles, a tail that no tile divides."""
    config = replace(CONFIG, num_heads=4, num_kv_heads=1, select_block=size, num_selected=2)
    length = min(size + 13, 70)
    check(listed(make_inputs(config, length=length, seed=size), width, seed=size), tiling(16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "with_dq"), [((48, 80), False), ((72, 40), True)])
def test_heads_in_two_parts(heads: tuple[int, int], dtype: torch.dtype, with_dq: bool) -> None:
    config = replace(CONFIG, head_dim=heads[0], value_dim=heads[1])
    inputs = listed(make_inputs(config, lengths=(9, 0, 5, 1), dtype=dtype), 3)
    check(inputs, tiling(with_dq=with_dq))


@pytest.mark.parametrize(
    "tiles",
    [
        tiling(2, key_tokens=2),
        tiling(8, key_tokens=2, chunk=3),
        tiling(32, 32, key_tokens=16, chunk=1000),
        tiling(5, key_tokens=3, with_dq=True),
        tiling(7, key_tokens=10, with_dq=True),
        tiling(4, key_tokens=2, chunk=5),
    ],
)
@pytest.mark.parametrize("lengths", [None, (0, 3, 1, 0, 9, 5, 0)])
def test_any_tiles(tiles: SelectedTiles, lengths: tuple[int, ...] | None) -> None:
    length = 17 if lengths is None else None
    inputs = make_inputs(CONFIG, length=length, lengths=lengths)
    check(listed(inputs, 3, seed=3), tiles)


@pytest.mark.parametrize("lengths", [None, (0, 3, 1, 0, 13, 8, 0)])
@pytest.mark.parametrize(
    ("share", "tiles"),
    [(2, None), (6, tiling(3, 16)), (3, tiling(1, 16, with_dq=True)), (8, tiling(4, 16))],
    ids=str,
)
def test_shared_lists(share: int, tiles: SelectedTiles | None, lengths: Any) -> None:
    """Whole blocks of a step without masks (l' 16), and blocks of fewer keys; one without its own
    block."""
    size = 16 if share == 8 else 6
    config = replace(CONFIG, select_share=share, select_block=size, num_local=int(share != 3))
    shape: dict[str, Any] = (
        {"length": 20 + share % 3, "batch": 2} if lengths is None else {"lengths": lengths}
    )
    check(listed(make_inputs(config, **shape, seed=share)), tiles, share)


@pytest.mark.parametrize(
    ("heads", "shape", "since", "dtype", "with_dq"),
    [
        ((4, 4), {"length": 15}, 0, torch.bfloat16, False),
        ((4, 2), {"lengths": (0, 17, 1, 0, 14)}, 0, torch.float32, False),
        ((4, 1), {"length": 19, "batch": 2}, 13, torch.float16, False),
        ((8, 1), {"lengths": (16, 12)}, 13, torch.bfloat16, True),
    ],
    ids=str,
)
def test_far_blocks(
    heads: tuple[int, int], shape: dict[str, Any], since: int, dtype: torch.dtype, with_dq: bool
) -> None:
    """From the first token on or not; blocks of fewer keys than a tile."""
    config = replace(CONFIG, num_heads=heads[0], num_kv_heads=heads[1], select_block=2)
    inputs = listed(make_inputs(config, **shape, dtype=dtype), 6, seed=since)
    check(inputs, tiling(since=since, with_dq=with_dq))


@pytest.mark.parametrize(
    "shape",
    [{"length": 9, "batch": 2}, pytest.param({"lengths": (9, 0, 4)}, marks=pytest.mark.slow)],
    ids=str,
)
def test_far_blocks_in_slices(shape: Any) -> None:
    """Parts of some tokens, or of some heads, at a time: the same bits."""
    config = replace(CONFIG, select_block=2)
    x = listed(make_inputs(config, **shape), 6)

    def forward(room: int) -> dict[str, Tensor]:
        given = (x.q.detach(), *(y.detach() for y in x.selected), x.block_idx)
        call: dict[str, Any] = {"start": starts(x), "select_block": 2, "scale": 0.5}
        found = selected_forward(*given, **call, tiles=tiling(since=0, room=room).forward)
        return dict(zip(("out", "lse"), found, strict=True))

    want = forward(10**9)
    for room in (2000, 12_000):
        assert unequal(want, forward(room)) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dq_beside_dk_and_dv_in_half_precision(dtype: torch.dtype) -> None:
    """bf16 scales ds before it is rounded; fp16 has few small numbers: dk and dq, after it."""
    inputs = make_inputs(CONFIG, length=17, dtype=dtype)
    check(listed(inputs, 3, seed=3), tiling(5, key_tokens=3, with_dq=True))


@pytest.mark.parametrize("width", [None, 2])
def test_packed_with_empty_sequences(width: int | None) -> None:
    lengths = (0, 3, 1, 0, 14, 2, 9, 0)
    check(listed(make_inputs(CONFIG, lengths=lengths, seed=5), width, seed=1), tiling(8))


@pytest.mark.parametrize(
    ("rows", "S", "since"), [(1, 23, None), (7, 23, None), (7, 17, None), (7, 9, 19)]
)
def test_position_of_the_first_row(rows: int, S: int, since: int | None) -> None:
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
    found = selected_forward(q, k, v, block_idx, **common, tiles=tiling(since=since).forward)
    found += selected_backward(dout, q, k, v, *found, block_idx, **common, tiles=tiling())
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
    found = run(inputs, tiling(4, since=0))
    seen = torch.zeros(1, 15, 6, dtype=torch.bool)
    seen[:, 9:, :3] = True
    assert torch.equal(found["lse.selected"] > float("-inf"), seen)
    assert (found["out"][~seen] == 0).all()
    assert (found["dq"][~seen] == 0).all()
    assert (found["dselected.k"][:, :, 1] == 0).all()
    check(inputs, tiling(8))


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
    check(listed(make_inputs(replace(CONFIG, scale=scale), length=13), 3), tiling())


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
    check(odd, tiling())


def test_offsets_past_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for dk, dv and dq takes int64 where rows stand that far apart."""
    launched = []

    def far(x: Tensor) -> int:
        launched.append(x)
        return 2**31

    monkeypatch.setattr("nsa.backends.compiled.selected.launch._row_extent", far)
    check(listed(make_inputs(CONFIG, length=20, batch=2)), tiling())
    assert launched


@pytest.mark.parametrize("scale", [1e4, 1e10])
def test_huge_inputs_give_finite_results(scale: float) -> None:
    inputs = listed(make_inputs(CONFIG, length=20))
    leaves = tuple(x.detach() * scale for x in inputs.leaves())
    found = run(inputs.with_leaves(leaves), tiling())
    assert all(torch.isfinite(x).all() for x in found.values())


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_a_sequence_does_not_leak_into_another() -> None:
    """Not even values that overflow in its own scores."""
    inputs = listed(make_inputs(CONFIG, lengths=(9, 7, 6), seed=1), 3)
    leaves = [x.detach().clone() for x in inputs.leaves()]
    for x in leaves:
        if x.shape[1] == 22:
            x[:, 9:16] = 3e38
    before, after = run(inputs, tiling()), run(inputs.with_leaves(tuple(leaves)), tiling())
    for name, x in before.items():
        assert torch.equal(x[:, :9], after[name][:, :9]), name
        assert torch.equal(x[:, 16:], after[name][:, 16:]), name


@pytest.mark.parametrize("size", [(6, 10), (40, 20)])
def test_default_tiles(size: tuple[int, int]) -> None:
    config = replace(CONFIG, head_dim=size[0], value_dim=size[1])
    check(listed(make_inputs(config, length=30, dtype=torch.bfloat16)))


def test_default_tiles_fit() -> None:
    """In shared memory, in a mask, in what :func:`tile_unions` sorts."""
    for dtype in (torch.float32, torch.bfloat16):
        for size in (16, 64, 128, 192, 256, 512):
            for group, width in ((1, 16), (1, 100), (3, 2000), (16, 16), (64, 5), (256, 16)):
                found = tiles_for(
                    size, size, group, width=width, select_block=64, dtype=dtype, length=10**6
                )
                for tiles, held in ((found.forward, size), (found.dq, 2 * size)):
                    assert tiles.tokens <= 32
                    assert tiles.tokens == 1 or tiles.tokens * width <= 1024
                    rows = max(16, tiles.tokens * group)
                    if rows <= 64 and size <= 256:
                        used = rows * held + tiles.block_n * 2 * size * tiles.num_stages
                        assert used * dtype.itemsize <= 227 * 1024
                    if (far := tiles.far) is not None:
                        used = rows * held * far.num_stages + far.block_n * 2 * size
                        assert used * dtype.itemsize <= 227 * 1024 or far.num_stages == 1


def test_dq_is_in_fp32_where_atomic_adds_sum_it() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for D in (16, 40, 64, 65, 128, 192):
            for V in (16, 64, 128):
                for G in (1, 6, 16):
                    sizes = {"width": 16, "select_block": 64, "dtype": dtype, "length": 10**6}
                    tiles = tiles_for(D, V, G, **sizes)
                    assert not tiles.dkv.with_dq or dq_dtype(dtype, D, V, G) == torch.float32
    assert tiles_for(64, 64, 6, **sizes).dkv.with_dq


def test_a_shape_without_a_row_is_untuned() -> None:
    for row in ROWS:
        dtype = torch.float32 if row.fp32 else torch.bfloat16
        assert tile_row(row.D, row.V, row.G, dtype) is row
    paper, small = (tile_row(192, 128, G, torch.bfloat16) for G in (16, 8))
    assert tile_row(192, 128, 12, torch.bfloat16).dq == paper.dq
    assert (small.forward, small.far) == (paper.forward, tile_row(128, 128, 8, torch.bfloat16).far)
    assert paper.far is None
    found = tile_row(80, 96, 4, torch.float16)
    assert (found.D, found.V, found.G, found.measured) == (80, 96, 4, UNTUNED)


def tile_unions_torch(
    block_idx: Tensor,
    *,
    tokens: int,
    key_rows: int,
    start: Tensor | None,
    select_block: int,
    q_start: int,
) -> TileUnions:
    """:func:`tile_unions` in PyTorch; entries past ``counts`` are −1."""
    B, T, K, n = block_idx.shape
    t = torch.arange(T)[:, None, None]
    first = block_idx.long() * select_block
    if start is not None:
        first = first + start.long()[:, None, None]
    seen = (block_idx >= 0) & (first <= t + q_start) & (first < key_rows)
    nowhere = key_rows
    first = first.masked_fill(~seen, nowhere)
    first = torch.nn.functional.pad(first, (0, 0, 0, 0, 0, -T % tokens), value=nowhere)
    tiles = first.shape[1] // tokens
    first = first.view(B, tiles, tokens, K, n).transpose(2, 3).reshape(B, tiles, K, tokens * n)
    first, order = first.sort(dim=-1, stable=True)
    token = order // n
    begins = first < nowhere
    begins[..., 1:] &= first[..., 1:] != first[..., :-1]
    slot = (begins.cumsum(-1) - 1).clamp_min(0)
    slot = slot.masked_fill(first == nowhere, tokens * n)
    blank = torch.zeros(B, tiles, K, tokens * n + 1, dtype=torch.int64)
    rows = (blank - 1).scatter(-1, slot, first)[..., :-1]
    masks = blank.scatter_add(-1, slot, torch.ones_like(token) << token)[..., :-1]
    masks = torch.where(masks >= 2**31, masks - 2**32, masks)
    return TileUnions(tokens, rows.int(), masks.int(), begins.sum(-1).int())


@pytest.mark.parametrize(("tokens", "far"), [(1, 0), (2, 2**31 - 1), (8, 0), (32, 2**28)])
@pytest.mark.parametrize("lengths", [None, (0, 3, 1, 0, 20, 11, 0)])
def test_tile_unions(tokens: int, lengths: tuple[int, ...] | None, far: int) -> None:
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
    found, want = tile_unions(block_idx, **kwargs), tile_unions_torch(block_idx, **kwargs)
    assert torch.equal(found.counts, want.counts)
    assert torch.equal(found.masks, want.masks)
    used = torch.arange(want.first_rows.shape[-1]) < want.counts[..., None]
    assert torch.equal(found.first_rows.masked_fill(~used, -1), want.first_rows)
    assert want.counts.max() > 1


@pytest.mark.parametrize("lengths", [None, (0, 3, 1, 0, 20, 11, 0)])
@pytest.mark.parametrize("far", [0, 2**31])
def test_inverse_index(lengths: tuple[int, ...] | None, far: int) -> None:
    """Every visible pair is in one chunk of its block, and no chunk holds two blocks."""
    regular = lengths is None
    inputs = make_inputs(
        CONFIG, length=35 if regular else None, batch=2 if regular else 1, lengths=lengths
    )
    B, T = inputs.q.shape[:2]
    start = starts(inputs)
    block_idx = random_blocks(inputs, 6)
    S = far or T
    found = inverse_index(
        block_idx,
        key_rows=S,
        start=start,
        select_block=3,
        chunk=5,
        sequences=None if lengths is None else len(lengths),
    )
    want = set()
    for b, t, head, slot in (block_idx >= 0).nonzero().tolist():
        first = block_idx[b, t, head, slot].item() * 3 + (0 if start is None else start[t].item())
        if first <= t:
            want.add((b * 2 + head, first, b * T + t))
    count = found.num_chunks.item()
    assert count <= found.max_chunks
    pairs = []
    for begin, end in zip(found.offsets[:count], found.offsets[1 : count + 1], strict=True):
        assert 0 < end - begin <= 5
        (block_id,) = set(found.block_ids[begin:end].tolist())
        tokens = found.tokens[begin:end].tolist()
        assert tokens == sorted(tokens)
        head, block = divmod(block_id, found.num_blocks)
        pairs += [(head, block * found.block_pitch, token) for token in tokens]
    assert len(pairs) == len(want)
    assert set(pairs) == want
