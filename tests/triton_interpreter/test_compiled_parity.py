"""``compiled`` with its Triton kernels against the oracle: the rule that every backend obeys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nsa import NSAConfig, nsa_attention, resolve, select_blocks
from nsa.testing import Inputs, attention_parity, make_inputs, random_blocks, selection_faults

# NumPy multiplies in the kernels' place, and says so where 1e30 meets 1e30
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

CONFIG = NSAConfig(
    num_heads=4,
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
SHAPES = [
    {"length": 1},
    {"length": 3},
    {"length": 4, "batch": 2},
    {"length": 33, "batch": 2},
    {"lengths": (17, 0, 9, 1)},
    {"lengths": (1,)},
]


def problem(dtype: torch.dtype = torch.float32, **shape: object) -> Inputs:
    x = make_inputs(CONFIG, dtype=dtype, surplus="lengths" in shape, **shape)
    return replace(x, block_idx=random_blocks(x, 4))


def attend(x: Inputs, *, grad: bool = False) -> torch.Tensor:
    with torch.set_grad_enabled(grad):
        return nsa_attention(
            x.q,
            x.compressed,
            x.selected,
            x.window,
            x.gates,
            x.config,
            cu_seqlens=x.cu_seqlens,
            max_seqlen=x.max_seqlen,
            block_idx=x.block_idx,
            backend="compiled",
        )


def test_every_branch_is_compiled() -> None:
    resolution = resolve(
        CONFIG,
        device="cpu",
        dtype=torch.float32,
        length=9,
        packed=True,
        needs_grad=True,
        backend="compiled",
    )
    assert set(resolution.per_branch.values()) == {"compiled"}


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        *((torch.float32, shape) for shape in SHAPES),
        *((dtype, shape) for dtype in (torch.bfloat16, torch.float16) for shape in SHAPES[3:]),
    ],
    ids=str,
)
def test_parity(dtype: torch.dtype, shape: dict[str, object]) -> None:
    x = problem(dtype, **shape)
    faults = [
        f"{row.name}: error {row.error:.3e} > bound {row.bound:.3e}"
        for row in attention_parity("compiled", x)
        if not row.ok
    ]
    assert faults + selection_faults("compiled", x) == []


@pytest.mark.parametrize("shape", [{"length": 33}, {"lengths": (17, 0, 9, 1)}], ids=str)
def test_selection_under_every_option(shape: dict[str, object]) -> None:
    config = replace(
        CONFIG,
        select_schedule=((12, 2), (20, 3)),
        select_mass=0.7,
        select_share=2,
        select_regions=(1, 2),
        score_dtype="fp8",
    )
    x = make_inputs(config, dtype=torch.bfloat16, surplus="lengths" in shape, **shape)
    assert selection_faults("compiled", x) == []


SHARING = replace(CONFIG, select_share=8, select_block=8)
"""Eight tokens of two heads fill a tile of fp32."""


@pytest.mark.parametrize(
    "shape",
    [pytest.param({"length": 33}, marks=pytest.mark.slow), {"lengths": (17, 0, 9, 1)}],
    ids=str,
)
def test_only_selected_lists_are_taken_for_shared(shape: dict[str, object]) -> None:
    x = make_inputs(SHARING, surplus="lengths" in shape, **shape)
    given = attention_parity("compiled", replace(x, block_idx=random_blocks(x, 4)))
    assert [row.name for row in given if not row.ok] == []
    lists = select_blocks(x.q, x.compressed.k, SHARING, cu_seqlens=x.cu_seqlens, backend="compiled")
    found = []
    for block_idx in (None, lists):
        out = attend(replace(x, block_idx=block_idx), grad=True)
        found.append([out, *torch.autograd.grad(out, x.leaves(), x.dout)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    """In half types, whose scores selection masks before it scales them."""
    config = replace(CONFIG, scale=scale, compress_block=6, num_selected=3)
    x = make_inputs(config, length=37, dtype=torch.float16)
    x = replace(x, block_idx=random_blocks(x, 4))
    wrong = [row.name for row in attention_parity("compiled", x) if not row.ok]
    assert wrong + selection_faults("compiled", x) == []


@pytest.mark.parametrize("value", [1e30, -3e38])
def test_causality_is_bitwise_where_lists_are_given(value: float) -> None:
    x = problem(length=30)
    changed = [y.detach().clone() for y in x.leaves()]
    first = 13
    for y in (changed[0], *changed[3:7]):
        y[:, first] = value
    for y in changed[1:3]:  # blocks of 4 tokens, one every 2
        y[:, 5:7] = value
    before, after = attend(x), attend(x.with_leaves(tuple(changed)))
    assert torch.equal(before[:, :first], after[:, :first])


def test_packed_sequences_do_not_leak() -> None:
    x = problem(lengths=(11, 8, 6))
    changed = [y.detach().clone() for y in x.leaves()]
    for y in (changed[0], *changed[3:7]):
        y[:, 11:19] = 1e30
    for y in changed[1:3]:  # 4 blocks of the first sequence, 3 of the second
        y[:, 4:7] = 1e30
    before, after = attend(x), attend(x.with_leaves(tuple(changed)))
    assert torch.equal(before[:, :11], after[:, :11])
    assert torch.equal(before[:, 19:], after[:, 19:])
