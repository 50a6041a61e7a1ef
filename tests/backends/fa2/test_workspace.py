"""The varlen workspace: kept and grown, never saved, one per device and stream."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from nsa import NSAConfig, SettingsError, nsa_attention, use_settings
from nsa.backends.fa2 import selected as fa2_selected
from nsa.backends.fa2.selected import pack
from nsa.backends.shared.block_tiles import runs
from nsa.backends.shared.workspace import (
    FRESH,
    Kept,
    Space,
    Store,
    kept_workspaces,
    release_workspaces,
)
from nsa.testing import Inputs, make_inputs, random_blocks

CONFIG = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    compress_block=4,
    compress_stride=2,
    select_block=6,
    num_selected=4,
    num_local=1,
    window=7,
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def by_math() -> Iterator[None]:
    release_workspaces()
    with use_settings(fa2_provider="math"):
        yield
    release_workspaces()


def problem(*lengths: int, seed: int = 0) -> Inputs:
    inputs = make_inputs(CONFIG, lengths=lengths, seed=seed)
    return replace(inputs, block_idx=random_blocks(inputs, 4, seed))


def attend(x: Inputs, q: Tensor | None = None) -> Tensor:
    return nsa_attention(
        x.q if q is None else q,
        x.compressed,
        x.selected,
        x.window,
        x.gates,
        CONFIG,
        cu_seqlens=x.cu_seqlens,
        max_seqlen=x.max_seqlen,
        block_idx=x.block_idx,
        backend="fa2-varlen",
    )


def step(x: Inputs) -> tuple[Tensor, ...]:
    out = attend(x)
    return out, *torch.autograd.grad(out, x.leaves(), x.dout)


def only() -> Kept:
    (space,) = kept_workspaces().values()
    return space


class Allocations(TorchDispatchMode):
    """Which operators returned memory that none of their arguments had."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        known = {x.untyped_storage().data_ptr() for x in leaves if isinstance(x, Tensor)}
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.names.append(str(func))
        return result


def packed_runs(x: Inputs, space: Space, mode: Allocations | None = None) -> None:
    """All that a forward packs: blocks, tiles, queries, keys and values of every run."""
    q, k, v = (y.detach() for y in (x.q, *x.selected))
    assert x.block_idx is not None
    packing = pack(q, k, v, x.block_idx, CONFIG, x.cu_seqlens, 0, space)
    rows = q.reshape(-1, 16)
    if mode is not None:
        mode.names.clear()  # numbering the blocks is done once, before the chunks
    for here, tiles in packing.chunks(2):
        for run in runs(tiles):
            cut = slice(run.start * packing.m, run.stop * packing.m)
            packing.take("q", rows[here], tiles.rows[cut])
            packing.take("k", packing.k_blocks, tiles.block[run], "keys")
            packing.take("v", packing.v_blocks, tiles.block[run], "keys")
            packing.room("parts", tiles.total * packing.m + 1, 2, 8, dtype=q.dtype)


def test_packing_allocates_nothing_once_it_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fa2_selected, "CHUNK_TOKENS", 10)
    monkeypatch.setattr(fa2_selected, "CHUNK_ELEMENTS", 1)
    x, space = problem(31, 0, 17), Kept()
    packed_runs(x, space)
    with Allocations() as mode:
        packed_runs(x, space, mode)
    # a CPU counts the tiles in use, which a GPU does not wait for
    assert set(mode.names) <= {"aten.lt.Scalar", "aten.sum.default"}
    with Allocations() as mode:
        packed_runs(x, FRESH, mode)
    assert len(mode.names) > 20


def test_a_steady_state_grows_nothing() -> None:
    x = problem(31, 0, 17)
    step(x)
    space = only()
    grown, held = space.grown, space.nbytes
    for _ in range(3):
        step(x)
    assert only() is space
    assert (space.grown, space.nbytes) == (grown, held)
    step(problem(90))
    assert space.grown > grown
    assert space.nbytes > held


def test_it_is_sized_beforehand() -> None:
    with use_settings(prealloc_varlen_n=5000, prealloc_varlen_k=7000):
        step(problem(20))
        space = only()
        grown = space.grown
        assert space.most["rows"] < 5000
        assert space.most["keys"] < 7000
        assert space._buffers["k", torch.float32].numel() == 7000 * CONFIG.head_dim
        assert space._buffers["q", torch.float32].numel() == 5000 * 2 * CONFIG.head_dim
        step(problem(60))
    growing = space.grown - grown  # the lists of tiles, and keys and values in blocks
    with use_settings(prealloc_varlen_n=1, prealloc_varlen_k=1):
        release_workspaces()
        step(problem(20))
        space = only()
        grown = space.grown
        step(problem(60))
    assert growing < space.grown - grown


def test_more_than_there_is_names_the_flag() -> None:
    with pytest.raises(SettingsError, match=r"^NSA_PREALLOC_VARLEN_K: expected what fits"):
        Kept(keys=2**31 - 1).take("k", (20, 2**20), torch.float32, CPU, "keys")


def test_growing_says_what_to_set(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="nsa"):
        step(problem(20))
    most = only().most
    assert "varlen workspace on cpu" in caplog.text
    assert f"NSA_PREALLOC_VARLEN_N={most['rows']}" in caplog.text
    assert f"NSA_PREALLOC_VARLEN_K={most['keys']}" in caplog.text


def test_it_is_not_saved_for_backward() -> None:
    x = problem(31, 17)
    out = attend(x)
    mine = {y.untyped_storage().data_ptr() for y in only()._buffers.values()}
    seen, todo = 0, [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is None:
            continue
        todo += [parent for parent, _ in node.next_functions]
        for saved in getattr(node, "saved_tensors", ()):
            if saved is not None:
                seen += 1
                assert saved.untyped_storage().data_ptr() not in mine
    assert seen > 5


def test_a_backward_repacks() -> None:
    """Other problems in between leave the first one's gradients as they were."""
    x, y = problem(31, 17), problem(5, 44, seed=1)
    want = step(x)
    out = attend(x)
    step(y)
    got = torch.autograd.grad(out, x.leaves(), x.dout)
    assert all(torch.equal(a, b) for a, b in zip(got, want[1:], strict=True))


def test_activation_checkpointing() -> None:
    x, y = problem(31, 17), problem(31, 17, seed=1)

    def two_layers(q: Tensor) -> Tensor:
        return attend(y, attend(x, q))

    want = torch.autograd.grad(two_layers(x.q), x.leaves(), x.dout)
    out = checkpoint(two_layers, x.q, use_reentrant=False)
    got = torch.autograd.grad(out, x.leaves(), x.dout)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_threads_do_not_share(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = problem(31, 17), problem(9, 39, seed=1)
    want = step(x), step(y)
    release_workspaces()
    results: dict[int, tuple[Tensor, ...]] = {}

    def work(number: int, inputs: Inputs) -> None:
        with use_settings(fa2_provider="math"):
            for _ in range(3):
                results[number] = step(inputs)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate((x, y))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept_workspaces()) == 2
    for number, expected in enumerate(want):
        assert all(torch.equal(a, b) for a, b in zip(results[number], expected, strict=True))


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_any_mode_may_come_next(first: Callable[[], AbstractContextManager[None]]) -> None:
    x = problem(31, 17)
    want = step(x)
    release_workspaces()
    with first():
        assert torch.equal(attend(x), want[0])
    assert all(torch.equal(a, b) for a, b in zip(step(x), want, strict=True))
    with torch.inference_mode():
        assert torch.equal(attend(x), want[0])


def test_fa2_dense_keeps_nothing() -> None:
    inputs = make_inputs(CONFIG, length=40)
    nsa_attention(
        inputs.q,
        inputs.compressed,
        inputs.selected,
        inputs.window,
        inputs.gates,
        CONFIG,
        backend="fa2-dense",
    )
    assert kept_workspaces() == {}


def test_a_capture_gets_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa.backends.shared.workspace._capturing", lambda device: True)
    with Store(kept=True).lease(CPU) as space:
        assert space is FRESH
    assert kept_workspaces() == {}
