"""Values: of `cu_seqlens` on a CPU always, of block lists and everything else under `NSA_CHECK`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa import DataError, NSAttention, use_settings
from nsa.testing import Inputs, make_inputs
from tests.support.entries import (
    CONFIG,
    DIM,
    PACKED,
    REGULAR,
    Entry,
    attention,
    changed,
    every_entry,
    packed,
    refused,
    selection,
)

# Packed sequences


@every_entry
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (packed([0, 5, 11], dtype=torch.int64), "cu_seqlens: expected int32, got torch.int64; use"),
        (packed([1, 5, 11]), "cu_seqlens: expected the first value to be 0, got 1"),
        (packed([0, 6, 5, 11]), "cu_seqlens: expected values that never decrease, got [0, 6, 5, 1"),
        (packed([0, 5, 10]), "cu_seqlens: expected the last value to be the total 11, got 10"),
        (packed([0, 5, 12]), "cu_seqlens: expected the last value to be the total 11, got 12"),
        (packed([[0, 11]]), "cu_seqlens: expected shape [n_seq + 1], n_seq >= 1, got [1, 2]"),
        (packed(11), "cu_seqlens: expected shape [n_seq + 1], n_seq >= 1, got []"),
        (packed([0]), "cu_seqlens: expected shape [n_seq + 1], n_seq >= 1, got [1]"),
        (packed(PACKED.cu_seqlens.to("meta")), "cu_seqlens: expected device cpu, got meta"),
        (
            replace(REGULAR, cu_seqlens=PACKED.cu_seqlens),
            "cu_seqlens: expected packed input [1, total, ...], got batch size 2",
        ),
        (packed([0, 5, 11], 5), "max_seqlen: expected at least the longest sequence, 6, got 5"),
        (packed([0, 5, 11], torch.tensor(6)), "max_seqlen: expected an int, got Tensor; a tensor"),
        (packed([0, 5, 11], 6.0), "max_seqlen: expected an int, got float"),
        (packed([0, 5, 11], True), "max_seqlen: expected an int, got bool"),
        (packed([0, 5, 11], -1), "max_seqlen: expected >= 0, got -1"),
        (
            replace(REGULAR, max_seqlen=11),
            "max_seqlen: expected None without cu_seqlens, got 11; pass cu_seqlens as well",
        ),
    ],
)
def test_packing(entry: Entry, inputs: Inputs, message: str) -> None:
    with refused(message):
        entry(inputs)


@every_entry
@pytest.mark.parametrize("longest", [None, 6, 7, 1000])
def test_max_seqlen_is_an_upper_bound(entry: Entry, longest: int | None) -> None:
    torch.manual_seed(0)
    bounded = entry(packed([0, 5, 11], longest))
    torch.manual_seed(0)
    torch.testing.assert_close(bounded, entry(packed([0, 5, 11], 6)))


@pytest.mark.parametrize(("entry", "name"), [(attention, "compressed.k"), (selection, "k_cmp")])
def test_packed_blocks_may_be_surplus_but_not_missing(entry: Entry, name: str) -> None:
    def with_rows(rows: int) -> Inputs:  # 1 block of 5 tokens, 2 of 6
        inputs = changed(PACKED, "compressed.k", lambda x: x[:, :1].expand(1, rows, -1, -1))
        return changed(inputs, "compressed.v", lambda x: x[:, :1].expand(1, rows, -1, -1))

    for rows in (3, 5, 9):
        entry(with_rows(rows))
    with refused(f"{name}: expected at least 3 compressed blocks for these sequences"):
        entry(with_rows(2))


# Lists of blocks


def with_list(inputs: Inputs, blocks: list[int], token: int = 10) -> Inputs:
    """``blocks`` for one token and head, [0, −1, −1] for all others."""
    lists = torch.tensor([0, -1, -1], dtype=torch.int32).repeat(*inputs.q.shape[:2], 2, 1)
    lists[0, token, 1] = torch.tensor(blocks)
    return replace(inputs, block_idx=lists)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.long(), "int32, got torch.int64; use block_idx.to(torch.int32)"),
        (lambda x: x.float(), "int32, got torch.float32"),
        (lambda x: x[:1], "[2, 11, 2, width >= 1], got [1, 11, 2, 3]"),
        (lambda x: x[:, 1:], "[2, 11, 2, width >= 1], got [2, 10, 2, 3]"),
        (lambda x: x[:, :, :1], "[2, 11, 2, width >= 1], got [2, 11, 1, 3]"),
        (lambda x: x[..., :0], "[2, 11, 2, width >= 1], got [2, 11, 2, 0]"),
        (lambda x: x[..., 0], "[2, 11, 2, width >= 1], got [2, 11, 2]"),
        (lambda x: x.to("meta"), "q's device cpu, got meta"),
    ],
)
def test_lists_have_a_shape_and_a_type(change: Callable[[Tensor], Tensor], message: str) -> None:
    inputs = with_list(REGULAR, [0, 1, -1])
    with refused(f"block_idx: expected {message}"):
        attention(replace(inputs, block_idx=change(inputs.block_idx)))


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            with_list(REGULAR, [0, 2, -1]),
            "-1 or a block of the sequence, 0 … 1, got 2 at [0, 10, 1, 1]",
        ),
        (
            with_list(REGULAR, [-2, 0, 1]),
            "-1 or a block of the sequence, 0 … 1, got -2 at [0, 10, 1, 0]",
        ),
        (with_list(PACKED, [0, 1, -1]), "-1 or a block of the sequence, 0 … 0, got 1"),
        (
            with_list(REGULAR, [1, 0, -1]),
            "strictly ascending blocks, then -1, got [1, 0, -1] at [0, 10, 1]",
        ),
        (with_list(REGULAR, [1, 1, -1]), "strictly ascending blocks, then -1, got [1, 1, -1]"),
        (with_list(REGULAR, [0, -1, 1]), "strictly ascending blocks, then -1, got [0, -1, 1]"),
        (with_list(REGULAR, [-1, 0, 1]), "strictly ascending blocks, then -1, got [-1, 0, 1]"),
    ],
)
def test_values_of_lists_under_check(inputs: Inputs, message: str, check: bool) -> None:
    expected = refused(f"block_idx: expected {message}") if check else nullcontext()
    with use_settings(check=check), expected:
        attention(inputs)


@pytest.mark.parametrize("blocks", [[0, 1, -1], [1, -1, -1], [-1, -1, -1]])
def test_legal_lists_under_check(blocks: list[int]) -> None:
    """Blocks past the query and rows without a block are legal."""
    with use_settings(check=True):
        for token in (0, 10):
            attention(with_list(REGULAR, blocks, token))


@pytest.mark.parametrize("backend", ["sdpa", "fa2-dense", "compiled"])
def test_lists_that_are_not_looked_at(backend: str) -> None:
    """Any order, negative entries and blocks past the query; not a block twice."""
    lists = torch.tensor([[7, 1, -3, 0], [-1, 0, 5, -1], [2**31 - 1, -(2**31), -1, 1]])
    lists = lists[torch.arange(2 * 11 * 2).view(2, 11, 2) % 3].to(torch.int32)
    inputs = replace(REGULAR, block_idx=lists)
    with use_settings(fa2_provider="math"):
        got = attention(inputs, backend)
        dx = torch.autograd.grad(got, inputs.leaves(), inputs.dout)
    want = attention(inputs, "reference")
    torch.testing.assert_close(got, want)
    for a, b in zip(dx, torch.autograd.grad(want, inputs.leaves(), inputs.dout), strict=True):
        torch.testing.assert_close(a, b)


# Finite values


def spoiled(x: Tensor, value: float = float("nan")) -> Tensor:
    x = x.clone()
    x[-1, 2, 1, 0] = value
    return x


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", Inputs.NAMES)
@pytest.mark.parametrize("inputs", [REGULAR, PACKED], ids=["regular", "packed"])
def test_values_that_are_not_finite_under_check(inputs: Inputs, name: str, value: float) -> None:
    bad = changed(inputs, name, lambda x: spoiled(x, value))
    attention(bad)
    where = [inputs.q.shape[0] - 1, 2, 1, 0]
    message = "expected finite values, got 1 that are NaN or infinite, the first at"
    with use_settings(check=True), refused(f"{name}: {message} {where}", DataError):
        attention(bad)


@pytest.mark.parametrize("inputs", [REGULAR, PACKED], ids=["regular", "packed"])
def test_select_blocks_wants_finite_values_under_check(inputs: Inputs) -> None:
    for name, told in (("q", "q"), ("compressed.k", "k_cmp")):
        with use_settings(check=True), refused(f"{told}: expected finite values", DataError):
            selection(changed(inputs, name, spoiled))


def test_surplus_rows_may_hold_anything_under_check() -> None:
    inputs = make_inputs(CONFIG, lengths=(5, 0, 6), surplus=True)
    assert inputs.compressed.k.isnan().any()
    with use_settings(check=True):
        assert attention(inputs).isfinite().all()
        selection(inputs)


def test_the_layer_wants_finite_values_under_check() -> None:
    with use_settings(check=True):
        module = NSAttention(DIM, CONFIG)
    x = torch.zeros(2, 11, DIM)
    assert module(x).isfinite().all()
    x[1, 3, 7] = float("nan")
    with refused("x: expected finite values, got 1 that are NaN", DataError):
        module(x)
    with torch.no_grad():
        module.v_proj["window"].weight.fill_(float("inf"))
    with refused("window.v: expected finite values", DataError):
        module(torch.ones(2, 11, DIM))
