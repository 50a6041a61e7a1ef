"""Input that context parallelism refuses, on every rank in the same words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from nsa import (
    BackendUnavailable,
    NSACache,
    NSAConfig,
    NSAError,
    NSAttention,
    ShapeError,
    inspection,
    nsa_attention,
    select_blocks,
    use_settings,
)
from nsa.distributed import Layout, context_parallel
from nsa.models.dense import DenseAttention
from nsa.testing import make_inputs
from tests.support.layers import CONFIG, make_layer
from tests.support.processes import run_ranks

T = 24


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def told(call: Callable[[], object]) -> str:
    try:
        call()
    except NSAError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals() -> dict[str, str]:
    rank, layer = dist.get_rank(), make_layer(backend="sdpa")
    layout = Layout.contiguous(T)
    x = torch.randn(1, layout.rows, layer.dim, dtype=torch.float64)
    found = {}

    def attend(name: str, call: Callable[[], object], where: Layout = layout) -> None:
        with context_parallel(where):
            found[name] = told(call)

    attend("cu_seqlens", lambda: layer(x, cu_seqlens=torch.tensor([0, T // 2]).int()))
    half = torch.ones(layout.rows, 1, CONFIG.head_dim // 2, dtype=torch.float64)
    attend("angles", lambda: layer(x, angles=(half, half)))
    cache = NSACache(CONFIG, num_layers=1, batch_size=1, max_length=T, dtype=torch.float64)
    with torch.no_grad():
        attend("cache", lambda: layer(x, cache=cache.layers[0]))
    with inspection.record(layer):
        attend("record", lambda: layer(x))
    attend("rows", lambda: layer(x[:, 1:]))
    on_meta = NSAttention(layer.dim, CONFIG, device="meta")
    attend("meta", lambda: on_meta(x.to("meta", torch.float32)))
    attend("unshard", lambda: layout.unshard(x.to("meta")))
    other = replace(CONFIG, window=CONFIG.window + rank)
    attend("config", lambda: make_layer(other, backend="sdpa")(x))
    segments = [[(0, 12)], [(12, T)]]
    mixed = Layout(segments if rank == 0 else segments[::-1], T)
    attend("layout", lambda: make_layer(backend="sdpa")(x), mixed)
    unlike = make_layer(backend="sdpa")
    unlike.recompute = rank == 0
    attend("recompute", lambda: unlike(x))
    frozen = make_layer(backend="sdpa")
    with torch.no_grad():
        attend("evaluation", lambda: frozen(x))
    for name, part in frozen.named_parameters():
        part.requires_grad_(rank == 0 or name.startswith("compress_"))
    attend("frozen", lambda: frozen(x))  # compared again, now that a backward pass may follow
    found["size"] = told(lambda: Layout([[(0, T)]], T))
    with use_settings(check=True):  # compared at every call
        layer = make_layer(backend="sdpa")
    attend("first", lambda: layer(x))
    attend("later", lambda: layer(x), mixed)
    return found


def test_what_is_refused() -> None:
    first, second = run_ranks(refusals, 2)
    assert first == second
    stand = "expected None under context_parallel, whose layout says where rows stand, got"
    meta = "x: expected values that ranks can send each other, got the meta device, which has none"
    alike = "expected the same on all ranks of context_parallel, got"
    assert first.pop("layout").startswith(f"ConfigError: layout: {alike} '((0, 24), (((0, 12),),")
    assert first.pop("later").startswith(f"ConfigError: layout: {alike} '((0, 24), (((0, 12),),")
    assert first == {
        "cu_seqlens": f"ShapeError: cu_seqlens: {stand} Tensor",
        "angles": f"ShapeError: angles: {stand} tuple",
        "cache": "ShapeError: cache: expected None under context_parallel, got one",
        "record": "ShapeError: context_parallel: expected a layer that nsa.inspection does not "
        "watch, got one that it does; record in one process",
        "rows": "ShapeError: x: expected [B, 12, …] of this layout, got [1, 11, 12]",
        "meta": f"ShapeError: {meta}",
        "unshard": f"ShapeError: {meta}",
        "config": f"ConfigError: config.window: {alike} 7 on rank 0 and 8 on rank 1",
        "recompute": f"ConfigError: recompute: {alike} True on rank 0 and False on rank 1",
        "evaluation": "nothing",
        "frozen": f"ConfigError: gradients of: {alike} ['tokens', 'φ', 'selected', 'window'] on "
        "rank 0 and ['φ'] on rank 1",
        "size": "ShapeError: segments: expected those of 2 ranks, as the group has, got those of 1",
        "first": "nothing",
    }


@pytest.mark.parametrize(
    ("backend", "tokens", "why"),
    [
        ("reference", T, "reference takes whole sequences, got the shards of context_parallel"),
        ("fa2-dense", [T], "fa2-dense takes regular batches, got cu_seqlens: use fa2-varlen"),
    ],
)
@pytest.mark.usefixtures("one_rank")
def test_a_backend_that_cannot_is_refused(backend: str, tokens: int | list[int], why: str) -> None:
    layer, layout = make_layer(backend=backend), Layout.contiguous(tokens)
    x = torch.randn(1, layout.rows, layer.dim, dtype=torch.float64)
    with context_parallel(layout), pytest.raises(BackendUnavailable) as error:
        layer(x)
    text = f"backend='{backend}' asks for {backend}, which cannot run this: {why}; backends that "
    assert str(error.value).startswith(f"{text}can: sdpa")


@pytest.mark.usefixtures("one_rank")
def test_functions_which_see_one_rank_are_refused() -> None:
    x = make_inputs(CONFIG, length=T)
    with context_parallel(Layout.contiguous(T)):
        with pytest.raises(ShapeError, match="nsa_attention: expected no context_parallel, of who"):
            x.attend(nsa_attention, backend="sdpa")
        with pytest.raises(ShapeError, match="select_blocks: expected no context_parallel, of who"):
            select_blocks(x.q, x.compressed.k, CONFIG)


def test_a_layout_first_used_for_inference_serves_training() -> None:
    layout = Layout.contiguous([5, 3], size=1)
    with torch.inference_mode():
        layout.positions(torch.device("cpu"))
    assert not layout.positions(torch.device("cpu")).is_inference()


@pytest.mark.usefixtures("one_rank")
def test_dense_attention_is_refused() -> None:
    layer = DenseAttention(32, NSAConfig.preset("tiny"))
    text = "expected attention='nsa' under context_parallel, got dense attention, which sees"
    with context_parallel(Layout.contiguous(T)), pytest.raises(ShapeError, match=text):
        layer(torch.zeros(1, T, 32))


def test_what_is_no_layout_is_refused() -> None:
    with pytest.raises(ShapeError, match="layout: expected a Layout, got 4"), context_parallel(4):
        pass  # type: ignore[arg-type]


def test_a_layout_for_arithmetic_sends_nothing() -> None:
    text = "layout: expected the ranks of a process group, got a layout for arithmetic alone; make"
    for layout in (Layout.contiguous(T, size=2), Layout([[(0, T)]], T, rank=0)):
        with pytest.raises(ShapeError, match=text), context_parallel(layout):
            pass
        with pytest.raises(ShapeError, match=text):
            layout.unshard(torch.zeros(1, layout.rows))


def test_a_layout_needs_processes() -> None:
    text = "group: expected torch.distributed to be initialized (torchrun, init_process_group), got"
    for make in (Layout.contiguous, Layout.head_tail, partial(Layout, [[(0, T)]])):
        with pytest.raises(ShapeError, match=re.escape(text)):
            make(T)  # type: ignore[operator]


@pytest.mark.usefixtures("one_rank")
def test_what_is_no_process_group_is_refused() -> None:
    text = "group: expected a process group that this process is in, or None, got {}; a DeviceMesh"
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("cp",))
    for given, shown in ((mesh, repr(mesh)), ("cp", "'cp'"), (-100, "-100")):
        for make in (Layout.contiguous, Layout.head_tail, partial(Layout, [[(0, T)]])):
            with pytest.raises(ShapeError, match=re.escape(text.format(shown))):
                make(T, group=given)  # type: ignore[operator]
    assert Layout.contiguous(T, group=mesh["cp"].get_group()).size == 1


@pytest.mark.usefixtures("one_rank")
def test_one_inside_another_is_refused() -> None:
    """Layers that are run again in a backward pass outside the inner one would take the outer."""
    layer, layout = make_layer(backend="sdpa"), Layout.contiguous(T)
    with context_parallel(layout):
        text = "context_parallel: expected none in force, got one inside another; end the outer one"
        with pytest.raises(ShapeError, match=text), context_parallel(Layout.contiguous(T // 2)):
            pass
        with pytest.raises(ShapeError, match="of this layout"):  # the outer one is still in force
            layer(torch.zeros(1, T // 2, layer.dim, dtype=torch.float64))


@pytest.mark.usefixtures("one_rank")
def test_nothing_stays_in_force() -> None:
    """Layers outside the ``with`` are as they were, whatever happened inside."""
    layer = make_layer(backend="sdpa")
    x = torch.randn(1, T, layer.dim, dtype=torch.float64)
    want = layer(x)
    with pytest.raises(KeyError), context_parallel(Layout.contiguous(T)):
        raise KeyError
    assert torch.equal(layer(x), want)
