"""Every backend against the oracle, over the shapes that Hypothesis draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from nsa.testing import attention_parity, selection_faults
from nsa.testing.strategies import Case, cases
from tests.backends import DTYPES, targets


def check(backend: str, case: Case, dtype: torch.dtype, device: str) -> None:
    inputs = case.inputs(dtype, device)
    faults = [
        f"{row.name}: error {row.error:.3e} > bound {row.bound:.3e}"
        for row in attention_parity(backend, inputs)
        if not row.ok
    ]
    faults += selection_faults(backend, inputs)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "device"), targets())
@given(case=cases())
def test_parity(backend: str, device: str, dtype: torch.dtype, case: Case) -> None:
    check(backend, case, dtype, device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "device"), targets())
@given(case=cases(max_length=400))
def test_parity_large(backend: str, device: str, dtype: torch.dtype, case: Case) -> None:
    check(backend, case, dtype, device)
