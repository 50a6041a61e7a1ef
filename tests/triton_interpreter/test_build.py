"""A rehearsal of a layer launches what its first call will launch: the same kernels, for the same
types, constants and alignments."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from triton.runtime.interpreter import InterpretedFunction

from nsa import NSAttention, attention, module, nsa_attention
from nsa.backends.compiled.selected.tiles import FAR_SINCE
from nsa.core import angles
from nsa.core.block_tokens import kernels as block_tokens
from nsa.core.operators import BUILDING
from nsa.core.split_heads import kernels as split_heads
from nsa.testing import make_inputs
from tests.support.kernel_code import kernel_modules
from tests.support.layers import CONFIG, DIM
from tests.triton_interpreter import triton_fixes

triton_fixes.apply()

SMALL = replace(CONFIG, head_dim=16, value_dim=None, num_heads=2, num_kv_heads=1, window=16)
CONFIGS = {
    "paper": SMALL,
    "shared": replace(SMALL, independent_kv=False, compression="mean", rope_theta=None),
}
IN_TORCH = ("nsa_block_tokens_gather", "nsa_block_tokens_scatter", "nsa_rope_table")
"""What a CPU leaves to PyTorch."""


def _kind(value: Any, *, special: bool) -> Any:
    """What Triton's JIT looks at of an argument."""
    if isinstance(value, tuple):
        return tuple(_kind(x, special=special) for x in value)
    if isinstance(value, Tensor):
        return value.dtype
    if isinstance(value, int) and not isinstance(value, bool):
        return (special and value == 1, special and value % 16 == 0)
    return type(value) if isinstance(value, float) else value


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> set[tuple[Any, ...]]:
    """Written down, and made unless they are rehearsed."""
    found: set[tuple[Any, ...]] = set()

    class Noted:
        def __init__(self, kernel: InterpretedFunction) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                names, fixed = self.kernel.arg_names, self.kernel.kwargs["do_not_specialize"] or ()
                values = dict(zip(names, args, strict=False))
                kinds = {n: _kind(x, special=n not in fixed) for n, x in values.items()}
                constants = {n: x for n, x in kwargs.items() if n not in values}
                found.add((self.kernel.__name__, str(kinds), str(constants)))
                self.kernel[grid](*args, **kwargs)

            return launch

    for where in (*kernel_modules(), angles, block_tokens, split_heads):
        for name, value in vars(where).copy().items():
            if isinstance(value, InterpretedFunction) and name.startswith("nsa_"):
                monkeypatch.setattr(where, name, Noted(value))
    return found


def rehearse_at_once(key: object, device: torch.device, rehearsal: Callable[[], None]) -> None:
    token = BUILDING.set(True)
    try:
        rehearsal()
    finally:
        BUILDING.reset(token)


@pytest.mark.parametrize(
    ("name", "packed", "grad"),
    [
        ("paper", False, True),
        ("paper", True, True),
        ("shared", True, True),
        ("paper", False, False),
    ],
)
def test_of_a_layer(
    name: str,
    packed: bool,
    grad: bool,
    launches: set[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = NSAttention(DIM, CONFIGS[name], backend="compiled")
    x = torch.randn(1, 20, DIM)
    cu_seqlens = torch.tensor([0, 7, 20], dtype=torch.int32) if packed else None
    monkeypatch.setattr(module, "build_once", rehearse_at_once)
    with torch.set_grad_enabled(grad):
        with monkeypatch.context() as on_a_gpu:
            on_a_gpu.setattr(module, "launches_soon", lambda x: True)
            layer.build_kernels(x, cu_seqlens)
        rehearsed = launches.copy()
        launches.clear()
        out = layer(x, cu_seqlens=cu_seqlens)
        if grad:
            out.sum().backward()
    launches, rehearsed = (
        {x for x in found if x[0] not in IN_TORCH} for found in (launches, rehearsed)
    )
    assert len(launches) > (10 if grad else 5)
    assert launches == rehearsed


@pytest.mark.parametrize(("group", "size"), [(8, 128), (4, 48), (1, 48)])
def test_one_of_a_power_of_two_stands_for_longer_sequences(
    group: int, size: int, launches: set[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small groups have far blocks from some position on; core.build takes lengths of as many bits
    for alike."""
    config = replace(SMALL, num_heads=2 * group, num_kv_heads=2, head_dim=size)
    layer = NSAttention(DIM, config, backend="compiled", dtype=torch.bfloat16)
    monkeypatch.setattr(module, "build_once", rehearse_at_once)
    monkeypatch.setattr(module, "launches_soon", lambda x: True)
    found = []
    for length in (FAR_SINCE, FAR_SINCE + 1003, 2 * FAR_SINCE - 1):
        launches.clear()
        layer.build_kernels(torch.empty(1, length, DIM, dtype=torch.bfloat16))
        found.append(launches.copy())
    assert any(name == "nsa_selected_fwd_far" for name, *_ in found[0])
    assert found[0] == found[1] == found[2]


def test_of_a_function(launches: set[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """With gates of another dtype, lists that are given, and tensors that are views."""
    x = make_inputs(SMALL, length=20, dtype=torch.float32)
    monkeypatch.setattr(attention, "build_once", rehearse_at_once)
    monkeypatch.setattr(attention, "launches_soon", lambda x: not x.is_meta)
    rehearsed: list[set[tuple[Any, ...]]] = []
    real = attention.rehearse

    def rehearse(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        rehearsed.append(launches.copy())
        launches.clear()

    monkeypatch.setattr(attention, "rehearse", rehearse)
    out = nsa_attention(x.q, x.compressed, x.selected, x.window, x.gates, SMALL, backend="compiled")
    out.sum().backward()
    assert rehearsed == [launches]
    assert all(leaf.grad is not None for leaf in x.leaves())
