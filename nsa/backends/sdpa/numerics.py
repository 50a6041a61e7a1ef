"""Numbers and sizes shared by the chunked steps of the ``sdpa`` backend."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.core.dtypes import accumulation_dtype

CPU_CHUNK_ELEMENTS = 2**18
"""Scores in flight on a CPU: 1 MiB of fp32, so that a chunk stays in the second-level cache."""
CUDA_CHUNK_ELEMENTS = 2**26
"""Scores in flight on a GPU: 256 MiB of fp32, enough to fill it, little beside the model."""


def chunk_elements(device: torch.device) -> int:
    """How many scores one chunk may hold on this device."""
    return CPU_CHUNK_ELEMENTS if device.type == "cpu" else CUDA_CHUNK_ELEMENTS


def operand_dtype(x: Tensor) -> torch.dtype:
    """What matrix products read: half types stay as they are only where a GPU sums them in fp32."""
    return x.dtype if x.is_cuda else accumulation_dtype(x.dtype)


def bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Batched product with sums and result in the accumulation dtype.

    ``out`` is a buffer to write to, which spares a CPU fresh pages; a GPU's allocator keeps its
    own.
    """
    if a.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)


def heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, S, K, D]`` -> ``[B*K, S, D]`` in the given dtype, with one copy at most."""
    return x.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).flatten(0, 1)
