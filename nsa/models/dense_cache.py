"""Keys and values of dense attention while a batch of sequences is decoded.

What :class:`nsa.NSACache` is for NSA, as far as generation needs it: one tensor for all keys of a
layer, made once.

B sequences, S new tokens of each, X tokens that there is room for, H query heads, K key/value
heads, G heads per group, D key size, V value size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from nsa.config import KV, NSAConfig
from nsa.core.rope import Angles, rope_angles
from nsa.errors import CacheError, is_int, require, show


class DenseCache:
    """Keys and values of every token, for the dense layers of a model.

    Args:
        config: of the layers: heads, head sizes, scale.
        num_layers: how many they are.
        batch_size: sequences, B.
        max_length: tokens of one sequence at most, X.
        device, dtype: of the keys and values; queries must have the same.
    """

    def __init__(
        self,
        config: NSAConfig,
        *,
        num_layers: int,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            require(is_int(value) and 1 <= value < 2**31, name, "an int >= 1", value)
        self.config, self.max_length = config, max_length
        self._lengths: list[int | None] = [0] * batch_size
        self._step: tuple[list[int], list[int]] | None = None
        self._static = False
        self.rope: Angles | None = None
        """What the first layer of a step works out for all of them."""

        def zeros(size: int) -> Tensor:
            shape = (batch_size, config.num_kv_heads, max_length, size)
            return torch.zeros(shape, device=device, dtype=dtype)

        with torch.inference_mode(False), torch.no_grad():
            self.layers = [
                DenseLayer(self, number, KV(zeros(config.head_dim), zeros(config.dv)))
                for number in range(num_layers)
            ]
            kept = self.layers[0].kept.k
            self.device, self.dtype = kept.device, kept.dtype
            self.position = torch.zeros(batch_size, dtype=torch.int32, device=self.device)
            """int32 ``[B]``, tokens of each sequence: where the next one goes."""
            self._present = torch.ones_like(self.position)
            """int32 ``[B]``, 0 for a sequence that was freed."""

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self._lengths)

    @property
    def lengths(self) -> list[int | None]:
        """Tokens of each sequence; None for one that was freed."""
        return list(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        kept = [x for layer in self.layers for x in layer.kept]
        return sum(x.nbytes for x in (*kept, self.position, self._present))

    def begin(self, tokens: int, counts: Sequence[int] | None = None) -> None:
        """Check that there is room; see :meth:`nsa.NSACache.begin`."""
        if self._static:
            return
        B = self.batch_size
        new = [tokens] * B if counts is None else list(counts)
        if len(new) != B or not all(is_int(c) and 0 <= c <= tokens for c in new):
            raise CacheError(
                f"counts: expected {B} ints from 0 to {tokens}, one a sequence, got {show(counts)}"
            )
        starts = [length or 0 for length in self._lengths]
        ends = [
            start if length is None else start + count
            for length, start, count in zip(self._lengths, starts, new, strict=True)
        ]
        if max(ends) > self.max_length:
            raise CacheError(
                f"expected at most max_length={self.max_length} tokens of a sequence, got "
                f"{max(ends)}"
            )
        self._step = starts, ends

    def step(self) -> tuple[list[int], list[int]]:
        """Lengths before and after the call that is under way."""
        if self._step is None:
            raise CacheError("expected the cache's first layer to run first")
        return self._step

    def commit(self, uniform: int | None) -> None:
        """The last layer has run; ``uniform``: as many new tokens for all, if so."""
        if not self._static:
            self._keep()
        if uniform is None:
            self._write_positions()
        else:
            self.position.add_(self._present, alpha=uniform)

    @contextmanager
    def capturing(self, tokens: int = 1) -> Iterator[None]:
        """See :meth:`nsa.NSACache.capturing`."""
        self.begin(tokens)
        self._static = True
        try:
            yield
        finally:
            self._static, self._step = False, None
            self._write_positions()

    def advance(self, tokens: int = 1) -> None:
        """See :meth:`nsa.NSACache.advance`."""
        self.begin(tokens)
        self._keep()

    @property
    def reach(self) -> int:
        """Tokens of the longest sequence; ``max_length`` in a graph."""
        return self.max_length if self._static else max(self.step()[1])

    @property
    def aligned(self) -> bool:
        """Whether all sequences end where the longest does, as far as shapes may say so."""
        return not self._static and len(set(self.step()[1])) == 1

    def free(self, rows: Iterable[int]) -> None:
        """Let sequences end; what steps compute in their places means nothing."""
        for b in rows:
            self._lengths[b] = None
        self._write_positions()

    def _keep(self) -> None:
        _, ends = self.step()
        for b, end in enumerate(ends):
            if self._lengths[b] is not None:
                self._lengths[b] = end
        self._step = None

    def _write_positions(self) -> None:
        self.position.copy_(torch.tensor([x or 0 for x in self._lengths], dtype=torch.int32))
        present = [x is not None for x in self._lengths]
        self._present.copy_(torch.tensor(present, dtype=torch.int32))


class DenseLayer:
    """One layer's keys ``[B, K, X, D]`` and values ``[B, K, X, V]``."""

    def __init__(self, cache: DenseCache, number: int, kept: KV) -> None:
        self.cache, self.number, self.kept = cache, number, kept

    def attend(self, q: Tensor, k: Tensor, v: Tensor, counts: list[int] | None) -> Tensor:
        """Add new keys ``[B, S, K, D]`` and values, and attend: q ``[B, S, H, D]`` -> ``[B, S, H,
        V]``; rows past a sequence's count mean nothing."""
        cache, S = self.cache, q.shape[1]
        if q.dtype != cache.dtype:
            raise CacheError(f"cache: expected queries of its dtype {cache.dtype}, got {q.dtype}")
        if self.number == 0:
            cache.begin(S, counts)
        same = counts is None or all(count == S for count in counts)
        new = KV(k, v)
        out = self._step(q, new) if same and S == 1 else self._chunks(q, new)
        if self.number == len(cache.layers) - 1:
            cache.commit(S if same else None)
        return out

    def angles(self, T: int, dtype: torch.dtype) -> Angles | None:
        """Of RoPE, for the next tokens ``[B, T]``; None without it."""
        cache, config = self.cache, self.cache.config
        if config.rope_theta is not None and self.number == 0:
            positions = cache.position[:, None] + torch.arange(T, device=cache.device)
            cache.rope = rope_angles(positions, config.head_dim, config.rope_theta, dtype)
        return cache.rope

    def _step(self, q: Tensor, new: KV) -> Tensor:
        """One token of each sequence, whatever their lengths."""
        cache, config = self.cache, self.cache.config
        position = cache.position.long()
        row = torch.arange(len(position), device=position.device)
        for kept, x in zip(self.kept, new, strict=True):
            kept[row, :, position] = x[:, 0]
        k, v = (x[:, :, : cache.reach] for x in self.kept)
        scale = config.softmax_scale
        if cache.aligned:  # nothing to mask: the kernel that splits long keys
            q_BH1D = q.transpose(1, 2)
            out = F.scaled_dot_product_attention(
                q_BH1D, k, v, scale=scale, enable_gqa=config.group > 1
            )
            return out.transpose(1, 2)
        # the heads of a group as rows of one query: keys are read once, and never repeated
        q_BKGD = q[:, 0].unflatten(1, (config.num_kv_heads, config.group))
        token = torch.arange(k.shape[2], device=position.device)
        seen = (token <= position[:, None])[:, None, None]
        out = F.scaled_dot_product_attention(q_BKGD, k, v, attn_mask=seen, scale=scale)
        return out.flatten(1, 2)[:, None]

    def _chunks(self, q: Tensor, new: KV) -> Tensor:
        """Any number of tokens, for the sequences of one length at a time."""
        from torch.nn.attention.bias import causal_lower_right  # brings in torch's compiler

        starts, ends = self.cache.step()
        config = self.cache.config
        out = q.new_zeros(*q.shape[:3], config.dv)
        groups: dict[tuple[int, int], list[int]] = {}
        for b, bounds in enumerate(zip(starts, ends, strict=True)):
            groups.setdefault(bounds, []).append(b)
        for (start, end), rows in groups.items():
            if start == end:
                continue
            some = slice(None) if len(rows) == len(starts) else rows  # of all, views
            for kept, x in zip(self.kept, new, strict=True):
                kept[some, :, start:end] = x[some, : end - start].transpose(1, 2)
            k, v = (x[some, :, :end] for x in self.kept)
            q_BHSD = q[some, : end - start].transpose(1, 2)
            made = F.scaled_dot_product_attention(
                q_BHSD,
                k,
                v,
                attn_mask=causal_lower_right(end - start, end),
                scale=config.softmax_scale,
                enable_gqa=config.group > 1,
            )
            out[some, : end - start] = made.transpose(1, 2)
        return out
