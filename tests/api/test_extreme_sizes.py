"""Bounds far above what there is cost nothing: `max_seqlen`, `num_selected`, `select_block`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nsa import NSAConfig, nsa_attention, select_blocks
from nsa.testing import Inputs, make_inputs
from tests.support.backends import fa2_by_math, refuses_packed
from tests.support.entries import CONFIG, layer

LENGTHS = (20, 0, 30)
BACKENDS = ("sdpa", "fa2-dense", "fa2-varlen")
MEBIBYTES = 64
HUGE = {
    "lists": ({"num_selected": 2 * 10**7}, {"num_selected": 9}),
    "lists of forced blocks": (
        {"num_selected": 2 * 10**7, "num_initial": 10**7, "num_local": 10**7},
        {"num_selected": 9},
    ),
    "blocks": ({"select_block": 6 * 10**7}, {"select_block": 60}),
    "lists of blocks": (
        {"select_block": 6 * 10**7, "num_selected": 2 * 10**7},
        {"select_block": 60},
    ),
    "windows": ({"window": 2**31 - 1}, {"window": 50}),
}


@contextmanager
def little_memory() -> Iterator[None]:
    """Fails where the process takes more than a little, at its peak."""
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not refs.exists():
        yield
        return

    def kilobytes(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", status.read_text())
        assert found
        return int(found[1])

    refs.write_text("5")  # forgets the peak so far
    before = kilobytes("VmRSS")
    yield
    assert (kilobytes("VmHWM") - before) / 1024 < MEBIBYTES


def problem(config: NSAConfig, packed: bool) -> Inputs:
    if packed:
        return make_inputs(config, lengths=LENGTHS)
    return make_inputs(config, length=50, batch=2)


def gradients(inputs: Inputs, backend: str) -> list[Tensor]:
    with fa2_by_math("cpu"):
        out = inputs.attend(nsa_attention, backend=backend)
    return [out, *torch.autograd.grad(out, inputs.leaves(), inputs.dout)]


@pytest.mark.parametrize("bound", [10**7, 2**31 - 1, 10**30])
@pytest.mark.parametrize("backend", ["sdpa", "fa2-varlen"])
def test_max_seqlen(backend: str, bound: int) -> None:
    inputs = problem(CONFIG, packed=True)
    want = gradients(inputs, backend)
    loose = replace(inputs, max_seqlen=bound)
    with little_memory():
        got = gradients(loose, backend)
        blocks = select_blocks(
            inputs.q,
            inputs.compressed.k,
            CONFIG,
            cu_seqlens=inputs.cu_seqlens,
            max_seqlen=bound,
            backend="sdpa",
        )
        layer(loose, "sdpa")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert blocks.shape == (1, 50, CONFIG.num_kv_heads, CONFIG.num_selected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("huge", "enough"), HUGE.values(), ids=HUGE)
def test_geometry(huge: dict[str, int], enough: dict[str, int], backend: str, packed: bool) -> None:
    if packed and refuses_packed(backend):
        pytest.skip(f"{backend} takes regular batches only")
    want = gradients(problem(replace(CONFIG, **enough), packed), backend)
    inputs = problem(replace(CONFIG, **huge), packed)
    with little_memory():
        got = gradients(inputs, backend)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_many_sequences_in_large_blocks() -> None:
    """Blocks are as large as a sequence at most, not as all of them."""
    inputs = make_inputs(replace(CONFIG, select_block=6 * 10**7), lengths=(10,) * 300)
    with little_memory():
        gradients(inputs, "sdpa")


@pytest.mark.parametrize(
    ("huge", "packed"),
    [
        ("lists", True),
        pytest.param("lists", False, marks=pytest.mark.slow),
        pytest.param("blocks", False, marks=pytest.mark.slow),
        pytest.param("blocks", True, marks=pytest.mark.slow),
    ],
)
def test_one_graph_for_all_lengths(huge: str, packed: bool) -> None:
    torch._dynamo.reset()
    config = replace(CONFIG, **HUGE[huge][0])
    graphs = []

    def compiler(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        graphs.append(graph)
        return graph

    attend = torch.compile(nsa_attention, fullgraph=True, dynamic=True, backend=compiler)
    for length in (50, 90, 61):
        lengths = (length - 30, 0, 30) if packed else None
        inputs = make_inputs(config, length=None if packed else length, lengths=lengths)
        inputs = inputs.with_leaves(tuple(x.detach() for x in inputs.leaves()))
        inputs = replace(inputs, max_seqlen=2**31 - 1 if packed else None)
        want = inputs.attend(nsa_attention, backend="sdpa")
        torch.testing.assert_close(inputs.attend(attend, backend="sdpa"), want)
    assert len(graphs) == 1
    torch._dynamo.reset()
