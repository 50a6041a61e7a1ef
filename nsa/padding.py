"""Padded batches: from a mask to packed sequences, positions and left-aligned prompts.

Blocks and positions count from a sequence's first token, so that padding in front must be taken
away: packed, or moved behind, a row gives exactly what it gives alone.

B sequences, T columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.errors import ShapeError, show


class Padding:
    """Where the tokens of a padded batch are.

    Args:
        mask: ``[B, T]``, true or 1 for tokens; those of a row stand side by side, with padding
            before or behind (transformers' ``attention_mask``). It is read back from the device
            once.

    Raises:
        ShapeError: a mask of another shape, or with a hole in it.

    >>> padding = Padding(attention_mask)
    >>> y = layer(padding.pack(x), cu_seqlens=padding.cu_seqlens, max_seqlen=padding.max_seqlen)
    >>> y = padding.unpack(y)  # [B, T, dim], zeros in the padding
    """

    def __init__(self, mask: Tensor) -> None:
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.layout != torch.strided:
            got = list(mask.shape) if isinstance(mask, Tensor) else show(mask)
            raise ShapeError(f"mask: expected a tensor [B, T], got {got}")
        self.mask = mask != 0
        """bool ``[B, T]``"""
        counts = self.mask.sum(1, dtype=torch.int32)
        before = self.mask.cumsum(1)
        self.positions = (before - 1).clamp_min(0)
        """int64 ``[B, T]``, of each token in its own sequence."""
        ends = counts.cumsum(0, dtype=torch.int32)
        self.cu_seqlens = torch.cat([ends.new_zeros(1), ends])
        """int32 ``[B + 1]``"""
        edges = (self.mask[:, 1:] & ~self.mask[:, :-1]).sum(1) + self.mask[:, :1].sum(1)
        seen = torch.stack([counts.long(), edges.long()]).tolist()
        if any(count > 1 for count in seen[1]):
            row = next(b for b, count in enumerate(seen[1]) if count > 1)
            raise ShapeError(
                f"mask: expected the tokens of a row side by side, got a hole in {row}"
            )
        self.lengths: list[int] = seen[0]
        """Tokens of each row: ``counts=`` of a call with a cache."""

    @property
    def max_seqlen(self) -> int:
        """The most tokens of a row."""
        return max(self.lengths, default=0)

    def pack(self, x: Tensor) -> Tensor:
        """``[B, T, …]`` to ``[1, total, …]``, one row's tokens after the other's."""
        return self._fitting(x)[self.mask][None]

    def unpack(self, y: Tensor) -> Tensor:
        """The way back, with zeros in the padding."""
        total = sum(self.lengths)
        if y.shape[:2] != (1, total):
            raise ShapeError(f"expected [1, {total}, …], got {list(y.shape)}")
        out = y.new_zeros(*self.mask.shape, *y.shape[2:])
        return out.masked_scatter(_like(self.mask, out), y)

    def align_left(self, x: Tensor) -> Tensor:
        """``[B, T, …]`` to ``[B, max_seqlen, …]``, each row from the left, for a cache; what stands
        behind its tokens means nothing."""
        first = self.mask.int().argmax(1) if self.mask.shape[1] else self.mask.sum(1)
        column = torch.arange(self.max_seqlen, device=x.device)
        index = (first[:, None] + column).clamp_max(max(0, self.mask.shape[1] - 1))
        rows = torch.arange(len(index), device=x.device)[:, None]
        return self._fitting(x)[rows, index]

    def _fitting(self, x: Tensor) -> Tensor:
        if x.shape[:2] != self.mask.shape:
            raise ShapeError(
                f"expected [{', '.join(map(str, self.mask.shape))}, …], got {list(x.shape)}"
            )
        return x


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.view(*mask.shape, *(1,) * (x.ndim - 2)).expand_as(x)
