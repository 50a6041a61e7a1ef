"""The formulas of memory: what a layer keeps, to the byte, and the peak, within 10%."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa import ConfigError, NSAConfig, NSAttention
from nsa.memory import attention_peak, layer_memory, num_parameters
from tests.support.allocations import taken_on_cpu

HEADS = NSAConfig(num_heads=8, num_kv_heads=2, head_dim=32)
CASES: dict[str, tuple[dict[str, Any], int, int, torch.dtype]] = {
    "fp32": ({}, 1, 1024, torch.float32),
    "bf16, a batch": ({}, 3, 500, torch.bfloat16),
    "Dk is not Dv": ({"head_dim": 48, "value_dim": 32}, 1, 800, torch.float32),
    "padded heads, linear": (
        {"head_dim": 24, "num_kv_heads": 8, "compression": "linear"},
        *(1, 700, torch.float32),
    ),
    "shared, mean, no RoPE": (
        {"independent_kv": False, "compression": "mean", "rope_theta": None},
        *(1, 900, torch.float64),
    ),
    "one key head, few rows": ({"num_kv_heads": 1, "gate": "softmax"}, 1, 200, torch.float32),
}
DIM = 256


def problem(layer: NSAttention, B: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = layer.q_proj.weight
    where: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    return torch.randn(B, T, layer.dim, **where).requires_grad_(), torch.randn(
        B, T, layer.dim, **where
    )


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", CASES)
def test_sdpa_on_a_cpu(case: str, recompute: bool) -> None:
    changes, B, T, dtype = CASES[case]
    config = replace(HEADS, **changes)
    layer = NSAttention(DIM, config, backend="sdpa", dtype=dtype, recompute=recompute)
    x, dout = problem(layer, B, T)
    memory = layer_memory(
        config, DIM, batch=B, length=T, dtype=dtype, backend="sdpa", recompute=recompute
    )
    assert memory.saved == taken_on_cpu(lambda: layer(x)).left - dout.nbytes
    peak = taken_on_cpu(lambda: layer(x).backward(dout)).peak
    # weight gradients, which are not there before the first step, are small beside the rest
    assert abs(memory.peak - peak) <= 0.1 * peak, (memory.phases, peak)


@pytest.mark.parametrize("case", CASES)
def test_parameters(case: str) -> None:
    config = replace(HEADS, **CASES[case][0])
    layer = NSAttention(DIM, config, device="meta")
    assert num_parameters(config, DIM) == sum(p.numel() for p in layer.parameters())


def test_recomputing_keeps_less_than_half() -> None:
    sizes = [
        layer_memory(
            NSAConfig(),
            4096,
            batch=1,
            length=65536,
            dtype=torch.bfloat16,
            backend="compiled",
            recompute=recompute,
        ).saved
        for recompute in (False, True)
    ]
    assert sizes[1] < 0.5 * sizes[0], sizes


def test_whole_calls_that_an_h100_ran() -> None:
    """Every length of docs/figures/h100.jsonl, which the bench wrote with the allocator's peak."""
    file = Path(__file__).resolve().parents[2] / "docs" / "figures" / "h100.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row.get("backend") == "compiled"]
    assert len(rows) >= 7
    for row in rows:
        assert (row["heads"], row["dtype"], row["branch"]) == ("64/4:128", "bfloat16", "all+select")
        peak = attention_peak(
            NSAConfig(), batch=row["batch"], length=row["length"], dtype=torch.bfloat16
        )
        assert abs(peak - row["peak_bytes"]) <= 0.1 * row["peak_bytes"], (row["length"], peak)


@pytest.mark.parametrize(
    ("share", "length", "gib"),
    [
        *((1, 65536, 5.73), (4, 65536, 5.65), (16, 65536, 5.62)),
        *((1, 262144, 22.91), (4, 262144, 22.59), (16, 262144, 22.47)),
    ],
)
def test_calls_on_shared_lists_that_an_h100_ran(share: int, length: int, gib: float) -> None:
    """The peaks of docs/measurements.md: lists that queries share are indexed once."""
    config = NSAConfig(select_share=share)
    peak = attention_peak(config, batch=1, length=length, dtype=torch.bfloat16) / 2**30
    assert 0.985 <= peak / gib <= 0.995, peak


def test_a_backend_without_formulas() -> None:
    with pytest.raises(ConfigError, match="backend: expected one of the known names, got 'fa2'"):
        layer_memory(HEADS, DIM, batch=1, length=64, dtype=torch.float32, backend="fa2")


GPU_CASES = {
    "64/4:128": (NSAConfig(), 2048, 1, 16384),
    "12/2:64": (NSAConfig.preset("small"), 768, 8, 4096),
    "192/128": (NSAConfig.preset("paper"), 2048, 1, 8192),
}


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", GPU_CASES)
def test_compiled_on_a_gpu(case: str, recompute: bool, monkeypatch) -> None:
    from nsa.core import compile as core_compile

    monkeypatch.setattr(core_compile, "COMPILER", "inductor")
    config, dim, B, T = GPU_CASES[case]
    made: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "backend": "compiled"}
    layer = NSAttention(dim, config, recompute=recompute, **made)
    x, dout = problem(layer, B, T)
    for _ in range(2):  # compiled, tuned, cuBLAS's workspace made
        layer(x).backward(dout)
        layer.zero_grad()
        x.grad = None
    memory = layer_memory(
        config, dim, batch=B, length=T, dtype=x.dtype, backend="compiled", recompute=recompute
    )
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = layer(x)
    saved = torch.cuda.memory_allocated() - before - out.nbytes
    out.backward(dout)
    peak = torch.cuda.max_memory_allocated() - before
    seen = f"saved {saved:,} of {memory.saved:,}; peak {peak:,} of {dict(memory.phases)}"
    print(case, seen)
    assert abs(memory.saved - saved) <= 0.1 * saved, seen
    assert abs(memory.peak - peak) <= 0.1 * peak, seen
