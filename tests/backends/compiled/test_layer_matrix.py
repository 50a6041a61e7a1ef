"""Every option of the layer crossed with every other, through Inductor.

The bound is that of DESIGN's accuracy rule: the layer written out over the oracle, in the same
precision, may be a half or a third as far from the truth in fp64, with half a unit of roundoff.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from nsa import NSAConfig
from nsa.config import Compression, Gate
from nsa.core import compile as core_compile
from tests.support.layers import (
    CONFIG,
    LENGTHS,
    Problem,
    by_hand,
    by_part,
    gradients,
    make_layer,
    problem,
)

HALF = torch.bfloat16
MATRIX = [
    replace(
        CONFIG,
        num_selected=8,  # every block: rounding must not decide which are read
        compression=compression,
        gate=gate,
        independent_kv=independent_kv,
        rope_theta=rope_theta,
        value_dim=value_dim,
    )
    for compression, gate, independent_kv, rope_theta, value_dim in itertools.product(
        get_args(Compression), get_args(Gate), (True, False), (100.0, None), (6, None)
    )
]
MODES = ("eval autocast", "training autocast", "bf16", "packed", "shorter than a block")


def name_of(config: NSAConfig) -> str:
    keys = "independent" if config.independent_kv else "shared"
    rope = "rope" if config.rope_theta else "no rope"
    return f"{config.compression}-{config.gate}-{keys}-{rope}-{config.dv}"


def case_of(mode: str, device: str) -> Problem:
    """Input that is exact in bf16, fp32 unless the mode is bf16."""
    case = problem(LENGTHS if mode == "packed" else None, torch.float32, device)
    T = CONFIG.compress_block - 1 if mode == "shorter than a block" else case.x.shape[1]
    dtype = HALF if mode == "bf16" else torch.float32
    x, dout = ((y.detach()[:, :T] * 8).round() / 8 for y in (case.x, case.dout))
    return case._replace(x=x.to(dtype).requires_grad_(), dout=dout.to(dtype))


@pytest.fixture(autouse=True)
def _inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_compile, "COMPILER", "inductor")
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:(?s).*[Oo]nline softmax is disabled:UserWarning")  # Inductor's
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", MATRIX, ids=name_of)
@pytest.mark.parametrize(
    "device",
    [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)],
)
def test_the_layer_is_the_method(device: str, config: NSAConfig, mode: str) -> None:
    layer = make_layer(config, dtype=torch.float32, backend="compiled").to(device)
    case = case_of(mode, device)
    if mode == "bf16":
        layer = layer.to(HALF)
    training = mode != "eval autocast"

    def found(run: Callable[[], Tensor], *, autocast: bool) -> dict[str, Tensor]:
        with (
            torch.set_grad_enabled(training),
            torch.autocast(device, HALF, enabled=autocast and mode != "bf16"),
        ):
            out = run()
        every = {"out": out, **(gradients(layer, out, case) if training else {})}
        return by_part(every)

    got = found(lambda: layer(case.x, cu_seqlens=case.cu_seqlens), autocast=True)
    plain = found(lambda: by_hand(layer, case.x, case.cu_seqlens), autocast=True)
    assert layer.resolution is not None
    assert layer.resolution.backend == "compiled"
    layer = copy.deepcopy(layer).double()
    case = case._replace(x=case.x.detach().double().requires_grad_(), dout=case.dout.double())
    truth = found(lambda: by_hand(layer, case.x, case.cu_seqlens), autocast=False)
    for name, want in truth.items():
        factor = 2 if name == "out" else 3
        bound = factor * (plain[name] - want).norm() + torch.finfo(HALF).eps / 4 * want.norm()
        assert (got[name] - want).norm() <= bound, name
