"""``compiled``, called eagerly: as many configurations in one process as anybody likes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa import NSAConfig, NSAttention, nsa_attention
from nsa.core import compile as core_compile
from nsa.testing import make_inputs

CONFIG = NSAConfig(
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    compress_block=4,
    compress_stride=2,
    select_block=4,
    num_selected=2,
    num_local=1,
    window=7,
    compression="mean",
)


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(core_compile, "COMPILER", "eager")
    torch._dynamo.reset()
    core_compile._compiled.cache_clear()
    yield
    core_compile._compiled.cache_clear()
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("number", [20, pytest.param(270, marks=pytest.mark.slow)])
def test_no_number_of_configurations_is_special(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past what one function may have, 256 for each code object, and what is kept."""
    if number < core_compile.RECOMPILE_LIMIT:
        monkeypatch.setattr(core_compile, "RECOMPILE_LIMIT", 8)

    def scaled(x: Tensor, config: NSAConfig) -> Tensor:
        return x * config.window

    call = core_compile.compile_glue(scaled, lambda x, config: config)
    x = torch.ones(3)
    for window in range(1, number):
        assert torch.equal(call(x, replace(CONFIG, window=window)), x * window)
    made = graphs()
    call(x, replace(CONFIG, window=window))  # the last is kept
    assert graphs() == made


def test_no_number_of_graphs_is_special(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit of one configuration torch warns, and its graphs are made anew."""
    monkeypatch.setattr(core_compile, "RECOMPILE_LIMIT", 2)

    def with_rank(x: Tensor) -> Tensor:
        return x * x.dim()

    call = core_compile.compile_glue(with_rank, lambda x: None)
    for rank in range(1, 8):
        x = torch.ones((2,) * rank)
        assert torch.equal(call(x), x * rank)
    made = graphs()
    call(x)
    assert graphs() == made


def test_what_makes_room_is_freed() -> None:
    def doubled(x: Tensor, key: int) -> Tensor:
        return 2 * x

    call = core_compile.compile_glue(doubled, lambda x, key: key)
    call(torch.ones(3), 0)
    graph = weakref.ref(core_compile._compiled(doubled, 0, "eager")._run)
    for key in range(1, core_compile.CONFIGURATIONS + 1):
        core_compile._compiled(doubled, key, "eager")
    gc.collect()
    assert graph() is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("of", ["function", "layer"])
def test_each_configuration_keeps_its_graphs(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_compile, "RECOMPILE_LIMIT", 1)
    x = make_inputs(CONFIG, dtype=torch.float32, length=20, batch=2)
    layer = NSAttention(8, CONFIG, backend="compiled")

    def call(config: NSAConfig, backend: str) -> Tensor:
        if of == "layer":
            layer.config, layer.backend = config, backend
            return layer(x.q.detach().flatten(2))
        return nsa_attention(
            x.q, x.compressed, x.selected, x.window, x.gates, config, backend=backend
        )

    configs = [replace(CONFIG, window=window) for window in (3, 5)]
    for config in configs:
        call(config, "compiled")
    with torch.compiler.set_stance("fail_on_recompile"):
        for config in configs:
            torch.testing.assert_close(call(config, "compiled"), call(config, "sdpa"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_sweep_of_windows() -> None:
    x = make_inputs(CONFIG, dtype=torch.float32, length=20, batch=2)
    for window in range(1, 70):
        config = replace(CONFIG, window=window)
        got, want = (
            nsa_attention(x.q, x.compressed, x.selected, x.window, x.gates, config, backend=name)
            for name in ("compiled", "sdpa")
        )
        torch.testing.assert_close(got, want)
