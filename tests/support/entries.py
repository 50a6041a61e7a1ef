"""The public entry points as functions of one problem, for tests of what they accept and refuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa import NSAConfig, NSAError, NSAttention, ShapeError, nsa_attention, select_blocks
from nsa.testing import Inputs, make_inputs

CONFIG = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    value_dim=6,
    compress_block=4,
    compress_stride=2,
    select_block=6,
    num_selected=4,
    num_local=1,
    window=7,
)
DIM = 12
REGULAR = make_inputs(CONFIG, length=11, batch=2)
PACKED = make_inputs(CONFIG, lengths=(5, 0, 6))


def refused(message: str, error: type[Exception] = ShapeError) -> AbstractContextManager[object]:
    """Expects an error of the library whose text begins with ``message``."""
    assert issubclass(error, NSAError)
    return pytest.raises(error, match=f"^{re.escape(message)}")


def attention(inputs: Inputs, backend: str | None = None) -> Tensor:
    return nsa_attention(
        inputs.q,
        inputs.compressed,
        inputs.selected,
        inputs.window,
        inputs.gates,
        inputs.config,
        cu_seqlens=inputs.cu_seqlens,
        max_seqlen=inputs.max_seqlen,
        block_idx=inputs.block_idx,
        backend=backend,
    )


def selection(inputs: Inputs, backend: str | None = None) -> Tensor:
    return select_blocks(
        inputs.q,
        inputs.compressed.k,
        inputs.config,
        cu_seqlens=inputs.cu_seqlens,
        max_seqlen=inputs.max_seqlen,
        backend=backend,
    )


def layer(inputs: Inputs, backend: str | None = None) -> Tensor:
    """The layer over input of the same batch and length."""
    x = torch.zeros(*inputs.q.shape[:2], DIM)
    module = NSAttention(DIM, inputs.config, backend=backend)
    return module(x, cu_seqlens=inputs.cu_seqlens, max_seqlen=inputs.max_seqlen)


ENTRIES = [attention, selection, layer]
every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda f: f.__name__)
Entry = Callable[..., Tensor]


def changed(inputs: Inputs, name: str, change: Callable[[Tensor], Tensor]) -> Inputs:
    leaves = [x.detach() for x in inputs.leaves()]
    index = Inputs.NAMES.index(name)
    leaves[index] = change(leaves[index])
    return inputs.with_leaves(tuple(leaves))


def packed(cu: object, longest: object = None, dtype: torch.dtype = torch.int32) -> Inputs:
    cu_seqlens = cu if isinstance(cu, Tensor) else torch.tensor(cu, dtype=dtype)
    return replace(PACKED, cu_seqlens=cu_seqlens, max_seqlen=longest)
