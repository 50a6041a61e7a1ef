"""One list for m consecutive queries: that of the first of them (``select_share``)."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.core.packing import packed_tokens


def first_sharers(
    T: int, config: NSAConfig, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """int64 ``[T]``, the row of the query whose list each query reads.

    The first row stands at a multiple of m in its sequence.
    """
    row = torch.arange(T, device=device)
    position = row if cu_seqlens is None else packed_tokens(cu_seqlens, T).position
    return row - position % config.select_share
