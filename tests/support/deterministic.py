"""Torch's deterministic mode for the length of a block, and runs that must agree to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from nsa import nsa_attention, select_blocks
from nsa.testing import Inputs


@contextmanager
def deterministic(mode: bool = True, *, warn_only: bool = False) -> Iterator[None]:
    """``torch.use_deterministic_algorithms``."""
    before = torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def results(x: Inputs, backend: str) -> dict[str, Tensor]:
    """The selection, the output and every gradient."""
    leaves = [y.detach().requires_grad_() for y in x.leaves()]
    x = x.with_leaves(tuple(leaves))
    packing = {"cu_seqlens": x.cu_seqlens, "max_seqlen": x.max_seqlen}
    block_idx = select_blocks(x.q, x.compressed.k, x.config, **packing, backend=backend)
    out = x.attend(nsa_attention, backend=backend)
    names = (f"d{name}" for name in Inputs.NAMES)
    gradients = torch.autograd.grad(out, leaves, x.dout)
    found = {"block_idx": block_idx, "out": out.detach()}
    return found | dict(zip(names, gradients, strict=True))


def unequal(first: dict[str, Tensor], *others: dict[str, Tensor]) -> list[str]:
    """What is not the same to the bit in all of them."""
    return [
        name
        for name, x in first.items()
        if not all(torch.equal(_bits(x), _bits(other[name])) for other in others)
    ]


def _bits(x: Tensor) -> Tensor:
    """As integers: 0 is not -0 then, and what is no number is equal to itself."""
    if not x.is_floating_point():
        return x
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def row(x: Inputs, b: int) -> Inputs:
    """One row of a fixed-length batch, alone."""
    here = slice(b, b + 1)
    lists = None if x.block_idx is None else x.block_idx[here]
    x = x.with_leaves(tuple(y[here] for y in x.leaves()))
    return replace(x, dout=x.dout[here], block_idx=lists)


def row_of(found: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    """The same of :func:`results`."""
    return {name: x[b : b + 1] for name, x in found.items()}
