"""Shapes, dtypes and devices are checked always, and the message says what was expected."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nsa import NSAttention
from nsa.testing import Inputs
from tests.support.entries import (
    CONFIG,
    DIM,
    PACKED,
    REGULAR,
    attention,
    changed,
    refused,
    selection,
)


def longer(x: Tensor, dim: int) -> Tensor:
    return torch.cat([x, x.narrow(dim, 0, 1)], dim)


# Shapes


@pytest.mark.parametrize(
    ("name", "dim"),
    [(name, dim) for name in Inputs.NAMES for dim in range(4) if (name, dim // 2) != ("q", 0)],
)
@pytest.mark.parametrize("inputs", [REGULAR, PACKED], ids=["regular", "packed"])
def test_every_size_of_every_argument(inputs: Inputs, name: str, dim: int) -> None:
    """B and T of q are free: there the others no longer fit."""
    bad = changed(inputs, name, lambda x: longer(x, dim))
    if inputs is PACKED and dim == 1 and name.startswith("compressed"):
        other = "compressed.v: expected [1, "  # rows may be surplus, but k and v have as many
        with refused(other):
            attention(bad)
    else:
        with refused(f"{name}: expected "):
            attention(bad)


@pytest.mark.parametrize("dim", [0, 1])
def test_q_of_another_batch_or_length(dim: int) -> None:
    with refused("compressed.k: expected "):
        attention(changed(REGULAR, "q", lambda x: x.narrow(dim, 0, 1)))


@pytest.mark.parametrize("name", Inputs.NAMES)
def test_a_missing_dimension(name: str) -> None:
    with refused(f"{name}: expected ["):
        attention(changed(REGULAR, name, lambda x: x[0]))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x[..., :7], "[B, T, 4, 8] (B, T, num_heads, head_dim), got [2, 11, 4, 7]"),
        (
            "compressed.k",
            lambda x: x[:, 1:],
            "4 compressed blocks for T=11 (N = (T - 4)//2 + 1, 0 if T < 4), got 3",
        ),
        ("compressed.v", lambda x: x[..., 1:], "[2, 4, 2, 6], got [2, 4, 2, 5]"),
        ("selected.k", lambda x: x[:, 1:], "[2, 11, 2, 8], got [2, 10, 2, 8]"),
        ("window.v", lambda x: x.repeat(1, 1, 2, 1), "[2, 11, 2, 6], got [2, 11, 4, 6]"),
        ("gates", lambda x: x[..., :2], "[2, 11, 4, 3], got [2, 11, 4, 2]"),
    ],
)
def test_the_shape_expected_is_told(
    name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    with refused(f"{name}: expected {message}"):
        attention(changed(REGULAR, name, change))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x[:, :, 1:], "q: expected [B, T, 4, 8]"),
        ("compressed.k", lambda x: x[:, 1:], "k_cmp: expected 4 compressed blocks for T=11"),
        ("compressed.k", lambda x: x[..., 1:], "k_cmp: expected [2, 4, 2, 8], got [2, 4, 2, 7]"),
        ("compressed.k", lambda x: x.double(), "k_cmp: expected q's dtype torch.float32"),
        ("compressed.k", lambda x: x.to("meta"), "k_cmp: expected q's device cpu, got meta"),
    ],
)
def test_select_blocks_checks_both_arguments(
    name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    with refused(message):
        selection(changed(REGULAR, name, change))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 11, 13), "[B, T, 12], got [2, 11, 13]"),
        (torch.zeros(11, 12), "[B, T, 12], got [11, 12]"),
        (torch.zeros(1, 2, 11, 12), "[B, T, 12], got [1, 2, 11, 12]"),
        (torch.zeros(2, 11, 12, device="meta"), "the layer's device cpu, got meta"),
        (torch.zeros(2, 11, 12).double(), "the layer's dtype torch.float32, got torch.float64"),
        (torch.zeros(2, 11, 12).bfloat16(), "the layer's dtype torch.float32, got torch.bfloat16"),
        (torch.zeros(2, 11, 12).int(), "float16, bfloat16, float32 or float64, got torch.int32"),
    ],
)
def test_the_layer_checks_its_input(x: Tensor, message: str) -> None:
    with refused(f"x: expected {message}"):
        NSAttention(DIM, CONFIG)(x)


def test_autocast_takes_what_it_can_lower() -> None:
    module, x = NSAttention(DIM, CONFIG), torch.zeros(2, 11, DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert module(x.to(dtype)).dtype == torch.bfloat16
        with refused("x: expected the layer's dtype torch.float32, got torch.float64"):
            module(x.double())


# Types and devices


@pytest.mark.parametrize("name", Inputs.NAMES[1:-1])
def test_keys_and_values_have_the_dtype_of_q(name: str) -> None:
    with refused(f"{name}: expected q's dtype torch.float32, got torch.bfloat16"):
        attention(changed(REGULAR, name, lambda x: x.bfloat16()))


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_q_is_a_float(dtype: torch.dtype) -> None:
    with refused(f"q: expected float16, bfloat16, float32 or float64, got {dtype}"):
        attention(changed(REGULAR, "q", lambda x: x.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gates_have_the_dtype_of_q_or_fp32(dtype: torch.dtype) -> None:
    inputs = REGULAR.cast(dtype)
    for gates in (dtype, torch.float32):
        assert attention(changed(inputs, "gates", lambda x: x.to(gates))).dtype == dtype  # noqa: B023
    other = torch.bfloat16 if dtype != torch.bfloat16 else torch.float16
    with refused(f"gates: expected q's dtype {dtype} or float32, got {other}"):
        attention(changed(inputs, "gates", lambda x: x.to(other)))


@pytest.mark.parametrize("name", Inputs.NAMES[1:])
def test_everything_is_where_q_is(name: str) -> None:
    with refused(f"{name}: expected q's device cpu, got meta"):
        attention(changed(REGULAR, name, lambda x: x.to("meta")))


def test_q_alone_is_elsewhere() -> None:
    with refused("compressed.k: expected q's device meta, got cpu"):
        attention(changed(REGULAR, "q", lambda x: x.to("meta")))
