"""The window kernels over keys that stand some tokens apart, in Triton's interpreter."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from nsa import NSAConfig
from nsa.backends.compiled.window.bounds import Blocks
from nsa.backends.compiled.window.launch import window_backward, window_forward
from nsa.backends.compiled.window.tiles import Tiles
from nsa.core.packing import block_bounds
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
)


def run(inputs: Inputs, splits: int | None) -> dict[str, Tensor]:
    """Forward and backward of the compressed branch, named as in the accuracy rule."""
    q, config = inputs.q.detach(), inputs.config
    k, v = (x.detach() for x in inputs.compressed)
    start = None
    places: tuple[Tensor, ...] = ()
    if inputs.cu_seqlens is not None:
        start, *places = block_bounds(inputs.cu_seqlens, q.shape[1], k.shape[1], config)
    common = {
        "window": max(1, k.shape[1]),
        "start": start,
        "scale": config.softmax_scale,
        "blocks": Blocks(config.compress_block, config.compress_stride, *places),
    }
    out, lse = window_forward(q, k, v, **common, tiles=TILES)
    dq, dk, dv = window_backward(
        inputs.dout, q, k, v, out, lse, **common, q_tiles=TILES, k_tiles=TILES, splits=splits
    )
    return {
        "out": out,
        "lse.compressed": lse,
        "dq": dq,
        "dcompressed.k": dk,
        "dcompressed.v": dv,
    }


def check(inputs: Inputs, splits: int | None = None) -> None:
    """The accuracy rule, with gates that shut the other branches."""
    gates = torch.zeros_like(inputs.gates)
    gates[..., 0] = 1.0
    if inputs.block_idx is None:
        inputs = replace(inputs, block_idx=random_blocks(inputs, 1))
    want = expected(replace(inputs, gates=gates))
    for name, x in run(inputs, splits).items():
        error = want[name].error(x)
        assert error <= want[name].bound, f"{name}: {error:.2e} > {want[name].bound:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(case=cases(max_length=60))
@settings(max_examples=6)
def test_obeys_the_accuracy_rule(dtype: torch.dtype, case: Case) -> None:
    check(case.inputs(dtype))


@pytest.mark.parametrize("splits", [2, 5, 40])
@pytest.mark.parametrize("shape", [{"length": 90}, {"lengths": (0, 3, 50, 1, 25, 5, 10, 0)}])
def test_parts_of_the_queries_add_up(shape: dict[str, object], splits: int) -> None:
    """Also more parts than there are tiles of queries."""
    check(make_inputs(CONFIG, surplus="lengths" in shape, seed=3, **shape), splits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(48, 80), (72, 40)])
def test_heads_in_two_parts(heads: tuple[int, int], dtype: torch.dtype) -> None:
    config = replace(CONFIG, head_dim=heads[0], value_dim=heads[1])
    check(make_inputs(config, lengths=(17, 0, 9, 1), dtype=dtype), splits=2)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 6, 7])
def test_few_tokens(length: int) -> None:
    """No block, one, and the first queries that see it."""
    check(make_inputs(CONFIG, length=length))


def test_the_end_of_a_sequence_after_256_starts() -> None:
    check(make_inputs(CONFIG, lengths=(5, 300, 260), seed=2))


@pytest.mark.parametrize("rows", [1, 7])
def test_position_of_the_first_row(rows: int) -> None:
    """The last rows of q alone see what they saw among all."""
    x = make_inputs(CONFIG, length=45, batch=2)
    k, v = (y.detach() for y in x.compressed)
    call = {"window": k.shape[1], "start": None, "scale": 0.3, "blocks": Blocks(4, 2)}
    out, lse = window_forward(x.q.detach(), k, v, **call, tiles=TILES)
    q = x.q.detach()[:, -rows:]
    last, last_lse = window_forward(q, k, v, **call, q_start=45 - rows, tiles=TILES)
    torch.testing.assert_close(last, out[:, -rows:])
    torch.testing.assert_close(last_lse, lse[:, -rows:])
