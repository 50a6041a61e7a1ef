"""Where packed tokens and blocks stand is computed once for a call, and anew for the next."""

from __future__ import annotations

import threading

import pytest
import torch

from nsa import NSAConfig, NSAttention
from nsa.core import packing
from nsa.core.packing import block_bounds, packed_tokens, packing_kept


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The items of every search among offsets, as they come."""
    found: list[int] = []
    items = packing.packed_items

    def counted(offsets: torch.Tensor, count: int) -> packing.PackedItems:
        found.append(count)
        return items(offsets, count)

    monkeypatch.setattr(packing, "packed_items", counted)
    return found


def test_within_a_call_each_result_is_computed_once(searches: list[int]) -> None:
    config = NSAConfig.preset("tiny")
    cu_seqlens = torch.tensor([0, 30, 30, 77], dtype=torch.int32)
    alone = block_bounds(cu_seqlens, 77, 10, config)
    searches.clear()
    with packing_kept(cu_seqlens):
        for _ in range(3):
            with packing_kept(cu_seqlens):
                found = block_bounds(cu_seqlens, 77, 10, config)
            packed_tokens(cu_seqlens, 77)
        others = packed_tokens(torch.tensor([0, 5, 77], dtype=torch.int32), 77)
    assert sorted(searches) == [10, 77, 77]
    assert others.seq_start[5] == 5
    for one, other in zip(alone, found, strict=True):
        assert torch.equal(one, other)


def test_nothing_outlives_the_call(searches: list[int]) -> None:
    """What is written to cu_seqlens between calls counts, and threads have results of their own."""
    cu_seqlens = torch.tensor([0, 30, 77], dtype=torch.int32)
    with packing_kept(cu_seqlens):
        before = packed_tokens(cu_seqlens, 77).seq_start
        thread = threading.Thread(target=packed_tokens, args=(cu_seqlens, 77))
        thread.start()
        thread.join()
    cu_seqlens[1] = 40
    with packing_kept(cu_seqlens):
        after = packed_tokens(cu_seqlens, 77).seq_start
    assert before[-1] == 30
    assert after[-1] == 40
    assert len(searches) == 3


@pytest.mark.parametrize("recompute", [False, True])
def test_a_layer_computes_nothing_twice(searches: list[int], recompute: bool) -> None:
    layer = NSAttention(32, NSAConfig.preset("tiny"), backend="sdpa", recompute=recompute)
    x = torch.randn(1, 77, 32, requires_grad=True)
    layer(x, cu_seqlens=torch.tensor([0, 30, 77], dtype=torch.int32))
    twice = len(searches) - len(set(searches))
    assert twice == recompute  # positions, outside of what is recomputed
