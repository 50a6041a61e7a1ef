"""The library's cache as layers of a transformers cache.

``DynamicCache(config=model.config)`` and ``StaticCache`` make these for a converted model, as
``generate`` does; each keeps an :class:`nsa.NSACache` of its one layer. transformers counts
columns, the padding of a batch included; an NSACache counts the tokens of each row.

B rows, T columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from nsa.cache import LayerCache, NSACache
from nsa.config import NSAConfig
from nsa.core.dtypes import autocast_dtype
from nsa.errors import CacheError
from nsa.integrations.transformers.batch import LAYER_TYPE, Aligned

ROOM = 256
"""Tokens that a cache which grows has room for beyond the first call's, at least."""


class NewTokens(NamedTuple):
    """What a layer adds to its cache."""

    config: NSAConfig
    """The layer's."""
    attend: Callable[[LayerCache], Tensor]
    """Adds them and attends from them."""
    aligned: Aligned | None
    """Where they are among the columns; None: everywhere."""


class NSACacheLayer(CacheLayerMixin):
    """One layer's keys and values, in a cache that grows as it must."""

    _layer_type = LAYER_TYPE  # transformers makes layers of this type for a model's configuration
    is_croppable = True
    is_sliding = False
    supports_early_init = False
    max_crop: ClassVar[int] = 128
    """Columns that :meth:`crop` can always remove: assisted decoding removes what it guessed."""

    def __init__(self, **kwargs: Any) -> None:
        CacheLayerMixin.__init__(self)
        self._cache: NSACache | None = None
        self._home: torch.device | None = None
        self._calls: list[tuple[int, Aligned | None]] = []
        """How many columns each call added, and where tokens were in them."""

    @property
    def nsa_cache(self) -> NSACache:
        """What holds the tensors; it has one layer."""
        if self._cache is None:
            raise CacheError("cache: expected a layer that a model has used, got an empty one")
        return self._cache

    @property
    def lengths(self) -> list[int] | None:
        """Tokens of each row; None before the first call."""
        return None if self._cache is None else [length or 0 for length in self._cache.lengths]

    @property
    def batch_size(self) -> int:
        """B; an AttributeError before the first call, as transformers expects."""
        if self._cache is None:
            raise AttributeError("batch_size")
        return self._cache.batch_size

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Refuse: what a layer keeps depends on the configuration that :meth:`update` brings."""
        raise CacheError("cache: expected its NSA layer to begin it, by the first forward")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens and attend from them.

        Args:
            key_states, value_states: the layer's input ``[B, T, dim]``, twice.
            args: a :class:`NewTokens`.

        Returns:
            The layer's output ``[B, T, dim]``, twice.
        """
        new = args[0] if args else None
        if not isinstance(new, NewTokens):
            raise CacheError(
                "cache: expected a call by an NSA layer, got one by another attention; give the "
                "model that is not converted a cache of its own"
            )
        x, aligned = key_states, new.aligned
        columns = x.shape[1] if aligned is None else aligned.columns
        self._make_room(x, new.config, x.shape[1])
        out = new.attend(self.nsa_cache.layers[0])
        if aligned is None and self._calls and self._calls[-1][1] is None:
            self._calls[-1] = (self._calls[-1][0] + columns, None)
        else:
            self._calls.append((columns, aligned))
        return out, out

    def _make_room(self, x: Tensor, config: NSAConfig, tokens: int) -> None:
        if self._cache is None:
            self._cache = NSACache(
                config,
                num_layers=1,
                batch_size=x.shape[0],
                max_length=self._first_length(tokens),
                device=x.device,
                dtype=autocast_dtype(x.device) or x.dtype,
                max_crop=self.max_crop,
            )
            self._home, self.is_initialized = x.device, True
        needed = max(self.lengths or [0]) + tokens
        if needed > self._cache.max_length:
            self._grow(self._cache, needed)

    def _first_length(self, tokens: int) -> int:
        return tokens + max(ROOM, tokens // 4)

    def _grow(self, cache: NSACache, needed: int) -> None:
        cache.extend(max(needed, cache.max_length * 3 // 2))

    def get_seq_length(self) -> int:
        """Columns so far."""
        return sum(columns for columns, _ in self._calls)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask has, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Columns at most; −1: any number."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns.

        Raises:
            CacheError: a positive number, or more than :attr:`max_crop` can bring back.
        """
        if tokens_to_remove > 0:
            raise CacheError(
                f"crop: expected minus the columns to remove, got {tokens_to_remove}; "
                f"crop({tokens_to_remove} - cache.get_seq_length()) keeps the first ones"
            )
        if tokens_to_remove == 0 or self._cache is None:
            return
        left = max(0, self.get_seq_length() + tokens_to_remove)
        calls, lengths = [], [0] * self._cache.batch_size
        for columns, aligned in self._calls:
            kept = min(columns, left)
            left -= kept
            if kept:
                calls.append((kept, None if aligned is None else aligned.crop(kept)))
            for b in range(len(lengths)):
                lengths[b] += kept if aligned is None else aligned.crop(kept).counts[b]
        self._cache.crop(lengths)
        self._calls = calls

    def reset(self) -> None:
        """Forget everything."""
        self._cache, self._calls, self.is_initialized = None, [], False

    def offload(self) -> None:
        """Move it to the CPU."""
        if self._cache is not None:
            self._cache.to("cpu")

    def prefetch(self) -> None:
        """Move it to its layer's device."""
        if self._cache is not None and self._home is not None:
            self._cache.to(self._home)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row ``beam_idx[i]`` is now."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The same, for as many rows as there are indices."""
        if self._cache is None:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(1)
        rows = [row % self._cache.batch_size for row in indices.tolist()]
        self._cache.select(rows)
        self._calls = [(n, None if part is None else part.select(rows)) for n, part in self._calls]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make each row ``repeats`` rows, side by side."""
        if self._cache is not None:
            rows = torch.arange(self._cache.batch_size)
            self.batch_select_indices(rows.repeat_interleave(repeats))


class NSAStaticCacheLayer(NSACacheLayer, StaticLayer):
    """The same with room for a number of tokens from the start, and for no more."""

    is_compileable = False  # lengths are kept on the host

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        NSACacheLayer.__init__(self)
        self.max_cache_len = max_cache_len

    def _first_length(self, tokens: int) -> int:
        return self.max_cache_len

    def _grow(self, cache: NSACache, needed: int) -> None:
        """Leave it to the cache to say that there is no room."""

    def get_max_length(self) -> int:
        """Columns at most."""
        return self.max_cache_len

    def reset(self) -> None:
        """Forget everything; the tensors stay."""
        if self._cache is not None:
            self._cache.reset()
        self._calls = []
