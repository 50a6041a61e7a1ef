"""Every backend against the oracle, over the shapes that Hypothesis draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from nsa import BackendUnavailable
from nsa.testing import attention_parity, selection_faults
from nsa.testing.strategies import Case, cases
from tests.support.backends import fa2_by_math, refuses_packed, targets


def check(backend: str, case: Case, dtype: torch.dtype, device: str) -> None:
    inputs = case.inputs(dtype, device)
    with fa2_by_math(device):
        if case.lengths is not None and refuses_packed(backend):
            with pytest.raises(BackendUnavailable, match="takes regular batches"):
                attention_parity(backend, inputs)
            return
        faults = [
            f"{row.name}: error {row.error:.3e} > bound {row.bound:.3e}"
            for row in attention_parity(backend, inputs)
            if not row.ok
        ]
        faults += selection_faults(backend, inputs)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(("backend", "device", "dtype"), targets())
@given(case=cases())
def test_parity(backend: str, device: str, dtype: torch.dtype, case: Case) -> None:
    check(backend, case, dtype, device)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "device", "dtype"), targets())
@given(case=cases(max_length=400))
def test_parity_large(backend: str, device: str, dtype: torch.dtype, case: Case) -> None:
    check(backend, case, dtype, device)
