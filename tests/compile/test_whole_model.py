"""A whole model under ``torch.compile``: one graph, no breaks, no recompiles after a warm-up.

The structure of graphs is what is tested, so the compiler is ``aot_eager``; a few run through
Inductor in tests/backends/compiled/test_cpu.py and tests/backends/compiled/test_gpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa import NSAConfig, use_settings
from nsa.core import compile as core_compile
from nsa.models import LanguageModel, ModelConfig

CONFIG = ModelConfig(
    dim=16,
    num_layers=1,
    vocab_size=32,
    nsa=NSAConfig(num_heads=2, num_kv_heads=1, head_dim=8, num_selected=4, window=100),
)
WARM_UP = (1, 31, 32, 128)
"""T = 1, no compressed block, one of them, and T >= 2·l': each has a graph of its own."""
LENGTHS = (33, 100, 1000, 2048, 4097)


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with use_settings(fa2_provider="math"):
        yield
    torch._dynamo.reset()


def batch(length: int, packed: bool) -> tuple[tuple[Tensor, Tensor], dict[str, object]]:
    generator = torch.Generator().manual_seed(length)
    shape = (1, length) if packed else (2, length)
    tokens, targets = (torch.randint(32, shape, generator=generator) for _ in range(2))
    if not packed:
        return (tokens, targets), {}
    cut = length // 3
    cu_seqlens = torch.tensor([0, cut, cut, length], dtype=torch.int32)
    return (tokens, targets), {"cu_seqlens": cu_seqlens, "max_seqlen": max(length - cut, 2)}


QUICK = {("compiled", True)}


def runs() -> Iterator[Any]:
    """Backend, packed, warm-up. All but one take patience, the shortest inputs most."""
    for backend, packed in (
        ("sdpa", False),
        ("sdpa", True),
        ("fa2-dense", False),
        ("fa2-varlen", True),
        ("compiled", False),
        ("compiled", True),
    ):
        name = f"{backend}-{'packed' if packed else 'regular'}"
        marks = [] if (backend, packed) in QUICK else [pytest.mark.slow]
        yield pytest.param(backend, packed, WARM_UP[2:], id=f"{name}-from-32", marks=marks)
        yield pytest.param(backend, packed, WARM_UP, id=name, marks=pytest.mark.slow)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("backend", "packed", "warm_up"), [*runs()])
def test_one_graph_serves_all_lengths(backend: str, packed: bool, warm_up: tuple[int, ...]) -> None:
    """With floats as the README advises, once with torch's default."""
    floats = nullcontext if (backend, packed) == ("compiled", True) else core_compile.static_floats
    model = LanguageModel(CONFIG, backend=backend)
    weights = list(model.parameters())
    loss_of = torch.compile(model.loss, fullgraph=True, dynamic=True, backend="aot_eager")

    def step(length: int) -> None:
        inputs, packing = batch(length, packed)
        with floats():
            loss = loss_of(*inputs, **packing)
        grads = torch.autograd.grad(loss, weights)
        if length > 300:
            return
        want = model.loss(*inputs, **packing)
        torch.testing.assert_close(loss, want)
        for got, expected in zip(grads, torch.autograd.grad(want, weights), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    for length in warm_up:
        step(length)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= len(warm_up)
    longest = 1000 if backend.startswith("fa2") else LENGTHS[-1]  # the math provider is quadratic
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in LENGTHS:
            if length <= longest:
                step(length)
    assert model.resolution is not None
    assert model.resolution.backend == backend


def test_a_graph_break_would_be_seen() -> None:
    model = LanguageModel(CONFIG, backend="sdpa")

    def broken(*inputs: Tensor) -> Tensor:
        loss = model.loss(*inputs)
        torch._dynamo.graph_break()
        return loss * 2

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(broken, fullgraph=True, backend="eager")(*batch(40, False)[0])


def test_a_recompile_would_be_seen() -> None:
    model = LanguageModel(CONFIG, backend="sdpa")
    loss_of = torch.compile(model.loss, fullgraph=True, dynamic=False, backend="eager")
    loss_of(*batch(40, False)[0])
    with (
        torch.compiler.set_stance("fail_on_recompile"),
        pytest.raises(RuntimeError, match="recompile"),
    ):
        loss_of(*batch(41, False)[0])


def test_dynamic_shapes_make_a_graph_once() -> None:
    """Floats of the model as symbols would make torch begin anew when it is done."""
    from torch._dynamo.backends.debugging import aot_eager

    made = []

    def compiler(graph: torch.fx.GraphModule, example: list[Tensor], **options: Any) -> Any:
        made.append(graph)
        return aot_eager(graph, example, **options)

    model = LanguageModel(replace(CONFIG, attention="dense"))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        model.compile_loss(dynamic=True, backend=compiler)(*batch(40, False)[0])
        assert len(made) == 1
        patch.setattr(core_compile, "COMPILER", compiler)

        def norm(x: Tensor) -> Tensor:
            return model.norm(x)

        core_compile.compile_glue(norm, lambda x: None)(torch.randn(2, 40, CONFIG.dim))
    assert len(made) == 2


def test_flags_that_ask_for_the_length_are_obeyed_in_a_trace() -> None:
    with use_settings(backend="fa2-dense", fa2_min_len_win=50, fa2_min_len_cmp=60):
        model = LanguageModel(CONFIG)
        loss_of = model.compile_loss(dynamic=True, backend="eager")
        for length, window, compressed in (
            (40, "sdpa", "sdpa"),
            (55, "fa2-dense", "sdpa"),
            (70, "fa2-dense", "fa2-dense"),
        ):
            loss_of(*batch(length, False)[0])
            assert model.resolution is not None
            ran = model.resolution.per_branch
            assert (ran["window"], ran["compressed"]) == (window, compressed)


def test_a_refusal_names_its_reason_in_a_trace() -> None:
    with use_settings(fa2_provider="auto"):
        model = LanguageModel(CONFIG, backend="fa2-dense")
        with pytest.raises(RuntimeError, match="needs a CUDA device, got cpu"):
            torch.compile(model.loss, fullgraph=True, backend="eager")(*batch(40, False)[0])


def test_the_marker_of_a_constant_is_torchs() -> None:
    """nsa.backends.dispatch sets it without importing the compiler."""
    from nsa.backends.dispatch import _plan_by_key, _settings_key

    @torch.compiler.assume_constant_result
    def theirs() -> None: ...

    for ours in (_plan_by_key, _settings_key):
        assert vars(ours) == vars(theirs)


def test_export() -> None:
    model = LanguageModel(CONFIG, backend="sdpa").eval()
    length = torch.export.Dim("length", min=128, max=4096)
    tokens = batch(200, False)[0][0]
    # Linear asks whether its input has one row; for export that is no reason to be static
    program = torch.export.export(
        model,
        (tokens,),
        dynamic_shapes=({1: length},),
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    for T in (130, 333):
        tokens = batch(T, False)[0][0]
        torch.testing.assert_close(program.module()(tokens), model(tokens))
