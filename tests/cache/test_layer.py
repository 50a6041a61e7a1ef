"""Decode is training: any split of a sequence into calls gives what one forward gives."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa import NSACache, NSAConfig, NSAttention, Resolution, module
from nsa.backends.dispatch import load
from nsa.backends.protocol import Problem
from nsa.testing.strategies import configs, with_selection_options
from tests.support.backends import fa2_by_math

DIM = 12


@st.composite
def problems(draw: st.DrawFn) -> tuple[NSAConfig, list[int], list[list[int]], dict[str, Any]]:
    """A configuration, a prompt and steps for every sequence, and options of the cache."""
    config = draw(configs(max_group=4))
    config = draw(st.just(config) | with_selection_options(config))
    config = replace(
        config,
        compression=draw(st.sampled_from(["mlp", "linear", "mean"])),
        gate=draw(st.sampled_from(["sigmoid", "softmax"])),
        independent_kv=draw(st.booleans()),
        rope_theta=draw(st.sampled_from([None, 100.0])),
    )
    prompts = draw(st.lists(st.integers(0, 45), min_size=1, max_size=3))
    steps = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    chunks = []
    for length in prompts:
        cuts = sorted(draw(st.lists(st.integers(0, length), max_size=2)))
        chunks.append([b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)])
    options = {
        "page_size": config.select_block * draw(st.integers(1, 3)),
        "pages": draw(st.none() | st.just(150)),
    }
    return config, steps, chunks, options


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@given(problem=problems(), seed=st.integers(0, 99))
def test_any_split_is_one_forward(backend: str, problem: Any, seed: int):
    check(backend, *problem, seed)


@pytest.mark.parametrize("backend", ["fa2-dense", "fa2-varlen", "compiled"])
@pytest.mark.parametrize("options", [{}, {"select_share": 2}], ids=["exact", "share"])
def test_other_backends(backend: str, options: dict[str, Any]):
    config = replace(SMALL, **options)
    with fa2_by_math("cpu"):
        check(backend, config, [1, 3, 9, 1, 12, 1], [[20, 13], [7, 0, 1]], {}, 0, torch.float32)


SMALL = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    compress_block=4,
    compress_stride=2,
    select_block=8,
    num_selected=4,
    window=7,
)


def check(
    backend: str,
    config: NSAConfig,
    steps: list[int],
    chunks: list[list[int]],
    options: dict[str, Any],
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Prefill row by row in chunks, then steps of all; against each row's own forward."""
    torch.manual_seed(seed)
    layer = NSAttention(DIM, config, backend=backend, dtype=dtype)
    B, prompts = len(chunks), [sum(row) for row in chunks]
    lengths = [prompt + sum(steps) for prompt in prompts]
    x = torch.randn(B, max(lengths), DIM, dtype=dtype)
    cache = NSACache(
        config, num_layers=1, batch_size=B, max_length=max(lengths), dtype=dtype, **options
    )
    found: list[list[torch.Tensor]] = [[] for _ in range(B)]
    with torch.no_grad():
        for i in range(max(len(row) for row in chunks)):
            counts = [row[i] if i < len(row) else 0 for row in chunks]
            call(layer, cache, x, counts, found)
        for S in steps:
            call(layer, cache, x, [S] * B, found)
        for b, length in enumerate(lengths):
            whole = layer(x[b : b + 1, :length])[0]
            mine = torch.cat(found[b])
            scale = whole.abs().max().item() if length else 1.0
            limit = 1e-10 if dtype == torch.float64 else 1e-5
            assert (mine - whole).abs().max().item() <= limit * max(1.0, scale)
    assert cache.lengths == lengths


def call(
    layer: NSAttention,
    cache: NSACache,
    x: torch.Tensor,
    counts: list[int],
    found: list[list[torch.Tensor]],
) -> None:
    """The next tokens of every sequence, left-aligned; what stands past them is nonsense."""
    if not max(counts):
        return
    starts = [length or 0 for length in cache.lengths]
    new = torch.full((len(counts), max(counts), DIM), 1e3, dtype=x.dtype)
    for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
        new[b, :count] = x[b, start : start + count]
    uniform = min(counts) == max(counts)
    out = layer(new, cache=cache.layers[0], counts=None if uniform else counts)
    for b, count in enumerate(counts):
        found[b].append(out[b, :count])


def test_e4m3_differs_by_its_rounding_alone():
    """Half a unit in the last place of 3 bits, times what attention adds up."""
    torch.manual_seed(0)
    layer = NSAttention(DIM, SMALL, backend="sdpa", dtype=torch.float64)
    x = torch.randn(1, 60, DIM, dtype=torch.float64)
    made = {"num_layers": 1, "batch_size": 1, "max_length": 60, "dtype": x.dtype}
    exact, rounded = (NSACache(SMALL, **made, selected_dtype=d) for d in (None, "e4m3"))
    with torch.no_grad():
        for part in x.split([40, 1, 8, 11], 1):
            out = [layer(part, cache=cache.layers[0]) for cache in (exact, rounded)]
            error = (out[0] - out[1]).norm() / out[0].norm()
            assert 1e-5 < error < 2**-4
    assert rounded.layers[0].pages.k.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        ("sdpa", ""),
        ("reference", ""),
        ("fa2-dense", "; decode on sdpa: fa2-dense has none"),
        ("compiled", "; decode on sdpa: compiled has kernels for a GPU alone"),
    ],
)
def test_the_layer_says_what_runs_a_step(backend: str, why: str):
    cache = NSACache(SMALL, num_layers=1, batch_size=1, max_length=9)
    with fa2_by_math("cpu"), torch.no_grad():
        layer = NSAttention(DIM, SMALL, backend=backend)
        layer(torch.randn(1, 1, DIM), cache=cache.layers[0])
    assert layer.resolution is not None
    assert layer.resolution.backend == backend
    assert layer.resolution.reason.startswith(f"backend={backend!r}")
    assert layer.resolution.reason.endswith(why)
    assert ("decode on" in layer.resolution.reason) == bool(why)


@pytest.mark.parametrize("selected_dtype", [None, "e4m3"])
def test_the_choice_knows_the_cache_and_its_decoder_runs(
    monkeypatch: pytest.MonkeyPatch, selected_dtype: str | None
):
    asked, ran = [], []

    class Decoder:
        def decode_attention(self, *step: Any) -> Any:
            ran.append(step)
            return load("sdpa").decode_attention(*step)  # type: ignore[attr-defined]

    def spy(chosen: Resolution, problem: Problem, *, e4m3: bool) -> Any:
        asked.append((chosen.backend, problem, e4m3))
        return chosen, Decoder()

    monkeypatch.setattr(module, "decoding", spy)
    layer = NSAttention(DIM, SMALL, backend="sdpa")
    cache = NSACache(SMALL, num_layers=1, batch_size=2, max_length=9, selected_dtype=selected_dtype)
    with torch.no_grad():
        layer(torch.randn(2, 1, DIM), cache=cache.layers[0])
    problem = Problem(SMALL, torch.device("cpu"), torch.float32, 9, False, False)
    assert asked == [("sdpa", problem, selected_dtype == "e4m3")]
    assert len(ran) == 1
