"""Head sizes widened with zeros, which add nothing to a product."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pad_heads(*tensors: Tensor, multiple: int, equal: bool = False) -> tuple[Tensor, ...]:
    """Widen the last dimension of each to a multiple; ``equal``: of all to one size."""
    sizes = [-(-x.shape[-1] // multiple) * multiple for x in tensors]
    if equal:
        sizes = [max(sizes)] * len(sizes)
    return tuple(
        F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] != size else x
        for x, size in zip(tensors, sizes, strict=True)
    )
