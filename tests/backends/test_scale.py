"""A softmax scale may have any sign: right, or refused where a kernel of others cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nsa import BackendUnavailable, NSAConfig, nsa_attention
from nsa.testing import attention_parity, make_inputs, selection_faults
from tests.support.backends import DTYPES, fa2_by_math
from tests.support.entries import CONFIG

SCALES = (-0.7, 0.0, -1e-37, 1e-37)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("lengths", [None, (40, 0, 24)], ids=["regular", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sdpa(dtype: torch.dtype, lengths: tuple[int, ...] | None, scale: float) -> None:
    config = replace(CONFIG, scale=scale)
    length = 64 if lengths is None else None
    inputs = make_inputs(config, length=length, lengths=lengths, dtype=dtype)
    assert not selection_faults("sdpa", inputs)
    inputs = replace(inputs, block_idx=blocks_of(config))
    assert not [row for row in attention_parity("sdpa", inputs) if not row.ok]


def blocks_of(config: NSAConfig) -> torch.Tensor:
    """The first two blocks of every query."""
    return torch.tensor([0, 1, -1], dtype=torch.int32).expand(1, 64, config.num_kv_heads, 3)


@pytest.mark.parametrize("backend", ["fa2-dense", "fa2-varlen"])
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_flash_attention_refuses(backend: str, scale: float) -> None:
    """It masks, and takes the maximum, before it scales."""
    inputs = make_inputs(replace(CONFIG, scale=scale), length=20)
    told = f"FlashAttention-2 takes a scale > 0, got {scale}; backends that can: reference, sdpa"
    with fa2_by_math("cpu"), pytest.raises(BackendUnavailable, match=told):
        inputs.attend(nsa_attention, backend=backend)
