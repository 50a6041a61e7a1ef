"""Block lists under every option of selection are the oracle's, however rows are cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa import NSAConfig, reference, select_blocks
from nsa.testing import make_inputs

CONFIG = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    compress_block=4,
    compress_stride=2,
    select_block=4,
    num_selected=5,
    num_local=1,
    window=7,
)
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "regions": {"select_regions": (2, 2)},
    "wide regions": {"select_regions": (3, 1), "num_initial": 0},
    "one block a region": {"select_regions": (1, 3)},
    "fp8": {"score_dtype": "fp8"},
    "fp8, exact regions": {"score_dtype": "fp8", "select_regions": (2, 2)},
    "mass": {"select_mass": 0.6},
    "schedule": {"select_schedule": ((40, 3), (80, 4))},
    "long blocks": {"compress_block": 8, "select_block": 12, "select_regions": (2, 1)},
}


@pytest.mark.parametrize("elements", [64, 1000, 10**6])
@pytest.mark.parametrize("lengths", [None, (0, 37, 3, 90, 1, 20)], ids=["regular", "packed"])
@pytest.mark.parametrize("option", OPTIONS)
def test_lists_are_those_of_the_oracle(monkeypatch, option, lengths, elements):
    monkeypatch.setattr("nsa.backends.sdpa.numerics.CPU_CHUNK_ELEMENTS", elements)
    config = replace(CONFIG, **OPTIONS[option])
    shape: dict[str, Any] = {"length": 101, "batch": 2} if lengths is None else {"lengths": lengths}
    x = make_inputs(config, dtype=torch.float64, **shape)
    q, k = x.q.detach(), x.compressed.k.detach()
    packing = {"cu_seqlens": x.cu_seqlens, "max_seqlen": x.max_seqlen}
    found = select_blocks(q, k, config, backend="sdpa", **packing)
    assert torch.equal(found, reference.select_blocks(q, k, config, x.cu_seqlens))
