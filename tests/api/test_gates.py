"""The table of gates: what a row says of its values is true, and reaches the backend."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from nsa import NSAttention, module
from nsa.compression import PHI
from nsa.config import Compression, Gate
from nsa.gates import GATES, GateRow
from tests.support.layers import CONFIG, DIM


def test_the_tables_have_what_the_configuration_names() -> None:
    assert tuple(GATES) == get_args(Gate)
    assert tuple(PHI) == get_args(Compression)


@pytest.mark.parametrize("name", GATES)
def test_a_row_says_whether_its_values_are_in_the_unit_interval(name: str) -> None:
    logits = torch.randn(2, 50, 4, 3) * 100
    gates = GATES[name].activate(logits)
    assert gates.shape == logits.shape
    inside = bool(((gates >= 0) & (gates <= 1)).all())
    assert inside or not GATES[name].in_unit_interval


@pytest.mark.parametrize("inside", [True, False])
def test_a_new_gate_is_one_row(monkeypatch: pytest.MonkeyPatch, inside: bool) -> None:
    """A gate above one is computed as such; kernels are told what its row says."""
    told: list[bool] = []
    run = module.run

    def watched(*args: object, gates_in_unit_interval: bool, **options: object) -> torch.Tensor:
        told.append(gates_in_unit_interval)
        return run(*args, gates_in_unit_interval=gates_in_unit_interval, **options)  # type: ignore[arg-type]

    layer = NSAttention(DIM, CONFIG, backend="sdpa")
    x = torch.randn(1, 20, DIM)
    once = layer(x)
    doubled = GateRow(lambda logits: 2 * logits.sigmoid(), in_unit_interval=inside)
    monkeypatch.setattr(module, "GATES", {**GATES, CONFIG.gate: doubled})
    monkeypatch.setattr(module, "run", watched)
    torch.testing.assert_close(layer(x), 2 * once)
    assert told == [inside]


def test_the_gates_of_the_table_are_distinct() -> None:
    x = torch.randn(1, 20, DIM)
    torch.manual_seed(0)
    one = NSAttention(DIM, CONFIG, backend="sdpa")
    other = NSAttention(DIM, replace(CONFIG, gate="softmax"), backend="sdpa")
    other.load_state_dict(one.state_dict())
    assert not torch.allclose(one(x), other(x))
