"""The launches that ``bench --tune`` times, in Triton's interpreter: they run, can be rehearsed,
and compute the same with other tiles."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from nsa import NSAConfig
from nsa.backends.compiled.selected import tiles as selected
from nsa.core.operators import BUILDING
from nsa.tools.bench.cases import Data, make_data
from nsa.tools.bench.tune.problem import tables
from nsa.tools.bench.tune.search import Bench, Found, fault, search
from nsa.tools.common.problems import Trial
from tests.triton_interpreter import triton_fixes

triton_fixes.apply()

CONFIG = NSAConfig(
    num_heads=4,
    num_kv_heads=1,
    head_dim=16,
    compress_block=4,
    compress_stride=2,
    select_block=8,
    num_selected=4,
    window=12,
    rope_theta=None,
)


def data(length: int = 20) -> Data:
    cpu = torch.device("cpu")
    trial = Trial(config=CONFIG, device=cpu, dtype=torch.bfloat16, lengths=(length,), packed=False)
    return make_data(trial)


def test_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Today's tiles and others, with dq beside dk and dv as well."""
    monkeypatch.setattr(selected, "WITH_DQ_FROM", 1)
    launches = [launch for table in tables(data()) for launch in table.launches]
    assert [launch.name for launch in launches] == [
        "window and compressed, forward",
        "window and compressed, dq",
        "window and compressed, dk and dv",
        "selection",
        "selected, forward",
        "selected, dq",
        "selected, dk and dv with dq",
    ]
    for launch in launches:
        today = launch.candidates[0]
        other = next(x for x in launch.candidates if x.tiles != today.tiles)
        want = launch.call(today.tiles)
        assert fault(launch.call(other.tiles), want) == ""
        assert all(x.isfinite().any() for x in want)
        token = BUILDING.set(True)
        try:
            launch.rehearse(other.tiles)
        finally:
            BUILDING.reset(token)


def test_a_search_over_a_table() -> None:
    _, table, _ = tables(data())
    short = [replace(x, candidates=x.candidates[:1] + x.candidates[-1:]) for x in table.launches]
    found = [Found(launch) for launch in short]
    search(
        found, Bench(lambda jobs: iter([""] * len(jobs)), lambda call, times: 1.0), lambda x: None
    )
    assert all(one.complete and len(one.trials) == 2 for one in found)
    assert all(trial.note == "" for one in found for trial in one.trials)
