"""A new backend is one module and one row: here this module, and a row that a test adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from nsa import NSAttention, Settings, SettingsError, reference, resolve, use_settings
from nsa.backends import TABLE, dispatch
from nsa.backends.protocol import Problem
from nsa.registry import Row
from nsa.testing import attention_parity, make_inputs, random_blocks, selection_faults
from tests.support.entries import CONFIG, DIM

ROW = Row(module=__name__, summary="the oracle's steps under another name", packed=False, rank=-1)


# The module: four steps, and what it cannot run.

compressed_attention = reference.compressed_attention
selected_attention = reference.selected_attention
window_attention = reference.window_attention


def select_blocks(q: Tensor, *args: object, lse: Tensor | None = None, **options: object) -> Tensor:
    return reference.select_blocks(q, *args, **options)  # type: ignore[arg-type]


def unavailable(problem: Problem, settings: Settings) -> str | None:
    return "mine takes no float64" if problem.dtype == torch.float64 else None


# The row


@pytest.fixture(autouse=True)
def _mine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    dispatch._resolve.cache_clear()
    monkeypatch.setitem(TABLE, "mine", ROW)
    monkeypatch.setattr(dispatch, "BOUND", {})
    yield
    dispatch._resolve.cache_clear()


def chosen(backend: str | None, *, packed: bool = False, dtype: torch.dtype = torch.float32) -> str:
    options = {"length": 9, "packed": packed, "needs_grad": True, "backend": backend}
    return resolve(CONFIG, device="cpu", dtype=dtype, **options).backend  # type: ignore[arg-type]


def test_it_runs_by_name() -> None:
    inputs = make_inputs(CONFIG, length=21, batch=2)
    inputs = dataclasses.replace(inputs, block_idx=random_blocks(inputs, 3))
    assert [row for row in attention_parity("mine", inputs) if not row.ok] == []
    assert selection_faults("mine", inputs) == []


def test_a_layer_runs_it_and_says_so() -> None:
    layer = NSAttention(DIM, CONFIG, backend="mine")
    layer(torch.randn(1, 11, DIM)).sum().backward()
    assert layer.resolution is not None
    assert set(layer.resolution.per_branch.values()) == {"mine"}


def test_settings_and_the_environment_know_it() -> None:
    assert Settings.from_environ({"NSA_BACKEND": "mine"}).backend == "mine"
    with use_settings(backend="mine"):
        assert chosen(None) == "mine"
    with pytest.raises(SettingsError, match="did you mean 'mine'"):
        Settings(backend="mein")


def test_auto_obeys_its_rank_and_what_it_cannot_run() -> None:
    assert chosen("auto") == "mine"
    assert chosen("auto", packed=True) == "sdpa"
    assert chosen("auto", dtype=torch.float64) == "sdpa"


def test_without_its_row_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TABLE, "mine")
    with pytest.raises(SettingsError, match="known"):
        chosen("mine")
