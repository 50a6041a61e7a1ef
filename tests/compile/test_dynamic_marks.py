"""What users say to torch about which sizes are dynamic: one graph serves the lengths it is for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa import NSAttention, use_settings
from tests.compile.test_configurations import CONFIG

LENGTHS = (30, 41, 77)


def _range_of_batch(x: Tensor) -> None:
    torch._dynamo.mark_dynamic(x, 1)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=64)


def _unbacked(x: Tensor) -> None:
    if "min" not in inspect.signature(torch._dynamo.decorators.mark_unbacked).parameters:
        pytest.skip("torch 2.11 cannot be told a range")
    torch._dynamo.decorators.mark_unbacked(x, 1, min=16, max=4096)


MARKS: dict[str, tuple[Callable[[Tensor], None], int]] = {
    "mark_dynamic": (lambda x: torch._dynamo.mark_dynamic(x, 1), 1),
    "mark_dynamic-range-of-B": (_range_of_batch, 1),
    "maybe_mark_dynamic": (lambda x: torch._dynamo.maybe_mark_dynamic(x, 1), 1),
    "mark_unbacked": (_unbacked, 1),
    "mark_static": (lambda x: torch._dynamo.mark_static(x, 1), len(LENGTHS)),
}
"""How x is marked, and the graphs of three lengths."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with use_settings(fa2_provider="math"):
        yield
    torch._dynamo.reset()


def cases() -> Iterator[Any]:
    for backend in ("sdpa", "compiled", "fa2-dense", "fa2-varlen"):
        for mark in MARKS:
            quick = (backend, mark) == ("sdpa", "mark_unbacked")
            marks = [] if quick else [pytest.mark.slow]
            yield pytest.param(backend, mark, id=f"{backend}-{mark}", marks=marks)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("backend", "mark"), [*cases()])
def test_a_marked_length(backend: str, mark: str) -> None:
    layer = NSAttention(8, CONFIG, backend=backend)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    say, graphs = MARKS[mark]
    for length in LENGTHS:
        x = torch.randn(2, length, 8)
        say(x)
        torch.testing.assert_close(compiled(x), layer(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize(("dynamic", "graphs"), [(False, 3), (True, 1)])
def test_packed_sequences(dynamic: bool, graphs: int) -> None:
    """Sizes that are plain numbers in the trace, and sizes that are not."""
    layer = NSAttention(8, CONFIG, backend="sdpa")
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="eager")
    for length in LENGTHS:
        cu_seqlens = torch.tensor([0, 13, length], dtype=torch.int32)
        compiled(
            torch.randn(1, length, 8), cu_seqlens=cu_seqlens, max_seqlen=length
        ).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
