"""The copies of the compressed blocks' tokens in Triton's interpreter, against PyTorch's."""

from __future__ import annotations

import os
from itertools import accumulate

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from nsa import NSAConfig
from nsa.core.block_tokens import kernels, op
from tests.triton_interpreter import triton_fixes

triton_fixes.apply()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("T", "block", "stride"), [(4, 4, 2), (45, 4, 2), (46, 6, 2), (33, 3, 3), (70, 32, 16)]
)
def test_both_ways(T: int, block: int, stride: int, dtype: torch.dtype) -> None:
    """Also from a view whose heads and tokens stand apart."""
    generator = torch.Generator().manual_seed(T)
    x = torch.randn(2, T, 5, 6, generator=generator).to(dtype)[:, :, 1:4]
    config = NSAConfig(compress_block=block, compress_stride=stride, select_block=block)
    blocks = kernels.gather(x, block, stride, config.num_compressed(T))
    assert torch.equal(blocks, op._gather(x, None, config.key))
    grad = torch.randn(blocks.shape, generator=generator).to(dtype)
    want = op._scatter(grad, None, T, config.key)
    torch.testing.assert_close(kernels.scatter(grad, T, stride), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "lengths",
    [(45,), (0, 9, 0, 0, 3, 33, 0), (1, 2, 3, 11), (4,) * 37, (7, 0, 64, 5, 31)],
    ids=str,
)
@pytest.mark.parametrize(("block", "stride"), [(4, 2), (6, 2), (3, 3), (32, 16)])
def test_both_ways_packed(
    lengths: tuple[int, ...], block: int, stride: int, dtype: torch.dtype
) -> None:
    """Rows that are no block hold the same, and pass nothing on."""
    T = sum(lengths)
    generator = torch.Generator().manual_seed(T)
    x = torch.randn(1, T, 5, 6, generator=generator).to(dtype)[:, :, 1:4]
    config = NSAConfig(compress_block=block, compress_stride=stride, select_block=block)
    cu_seqlens = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32)
    packing = op._packing(cu_seqlens, config)
    blocks = kernels.gather(x, block, stride, T // stride, packing)
    assert torch.equal(blocks, op._gather(x, cu_seqlens, config.key))
    grad = torch.randn(blocks.shape, generator=generator).to(dtype)
    want = op._scatter(grad, cu_seqlens, T, config.key)
    assert torch.equal(kernels.scatter(grad, T, stride, packing), want)
