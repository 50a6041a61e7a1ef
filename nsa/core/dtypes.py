"""Which dtypes numbers are kept in."""

from __future__ import annotations

import torch
from torch import Tensor

NEG_INF = float("-inf")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast lowers to on a device; None where it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def accumulation_dtype(x: Tensor | torch.dtype) -> torch.dtype:
    """Statistics, sums and log-sum-exps are fp32, fp64 for fp64 input."""
    dtype = x if isinstance(x, torch.dtype) else x.dtype
    return torch.float64 if dtype == torch.float64 else torch.float32
