"""The cache of a model: its layers, the lengths of its sequences, and what can be done to them.

B sequences, P pages of L tokens, K key/value heads, n listed blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nsa.cache.layer import LayerCache, WriteRows
from nsa.cache.pages import Copies, Pages
from nsa.config import NSAConfig
from nsa.core.rope import Angles
from nsa.core.validate import as_device, check_config
from nsa.errors import CacheError, is_int, require, require_known, show

MAX_STEP = 8
"""New tokens of a sequence that go through one step; more are a chunk."""


class _Step(NamedTuple):
    """What one call of the model adds."""

    starts: list[int]
    ends: list[int]
    uniform: int | None
    """New tokens of every sequence that is there, if as many and no more than ``MAX_STEP``."""


class NSACache:
    """Keys and values of a batch of sequences, of each branch what it needs: the window's last w,
    the compressed blocks, and in pages all that selection may want.

    Args:
        config: of the layers that use it.
        num_layers: how many do.
        batch_size: sequences, B.
        max_length: tokens of one sequence at most.
        device, dtype: of the keys and values; queries must have the same.
        pages: pages of a pool that all sequences share; None gives every sequence room for
            ``max_length`` tokens from the start.
        page_size: tokens of a page, a multiple of ``select_block``; None is one block.
        max_crop: how many tokens can always be taken back (:meth:`crop`).
        selected_dtype: "e4m3" keeps the selected branch's keys and values as e4m3 with a scale for
            each token and head: half of bf16's bytes, and results that differ by e4m3's rounding.

    A sequence is known by its place in the batch. Lengths are known on the host; a step reads
    nothing back from the device. All operations leave the cache as it was if they raise.
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
        pages: int | None = None,
        page_size: int | None = None,
        max_crop: int = MAX_STEP,
        selected_dtype: str | None = None,
    ) -> None:
        check_config(config)
        size = config.select_block if page_size is None else page_size
        for name, value in (
            ("num_layers", num_layers),
            ("batch_size", batch_size),
            ("max_length", max_length),
            ("page_size", size),
        ):
            require(is_int(value) and 1 <= value < 2**31, name, "an int >= 1", value)
        require(is_int(max_crop) and max_crop >= 0, "max_crop", "an int >= 0", max_crop)
        require(
            pages is None or (is_int(pages) and pages >= 1), "pages", "None or an int >= 1", pages
        )
        block = config.select_block
        require(size % block == 0, "page_size", f"a multiple of select_block={block}", size)
        if selected_dtype is not None:
            require_known("selected_dtype", selected_dtype, ["e4m3"])
        self.config, self.max_length, self.max_crop = config, max_length, max_crop
        self.selected_dtype = selected_dtype
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        self.device = as_device(torch.get_default_device() if device is None else device)
        self._spare = spare = MAX_STEP + max_crop
        """Rows that a ring has besides those that a token needs."""
        self.window_rows = config.window + spare
        self.tail_rows = config.compress_block + spare
        self.list_rows = -(-spare // config.select_share) + 1 if config.select_share > 1 else 0
        self.blocks = config.num_compressed(max_length)
        self._lengths: list[int | None] = [0] * batch_size
        self._highest = [0] * batch_size
        """The most tokens each sequence has had, or was about to have when a step failed: what its
        rings hold ends there."""
        self._step: _Step | None = None
        self._static = False
        self.angles: Angles | None = None
        self.write_rows: WriteRows | None = None
        """What the first layer of a step works out for all of them."""
        with torch.inference_mode(False), torch.no_grad():
            self.position = torch.zeros(batch_size, dtype=torch.int32, device=self.device)
            """int32 ``[B]``, tokens of each sequence: where the next one goes."""
            self._present = torch.ones_like(self.position)
            """int32 ``[B]``, 0 for a sequence that was freed: it stays at position 0."""
            per_sequence = -(-max_length // size)
            self.pages = Pages(batch_size, per_sequence, size, pages, self.device)
            self.layers = [LayerCache(self, number) for number in range(num_layers)]

    @classmethod
    def for_model(cls, model: nn.Module, **options: Any) -> NSACache:
        """A cache for the NSA layers of a model, on its device and in its dtype.

        Args:
            model: has ``NSAttention`` layers of one configuration.
            options: as of the class: ``batch_size``, ``max_length``, and what else is wanted.
        """
        found = [module.config for module in model.modules() if hasattr(module, "compress_k")]
        configs = {config for config in found if isinstance(config, NSAConfig)}
        if len(configs) != 1:
            raise CacheError(
                f"expected a model with NSA layers of one configuration, got {len(configs)}"
            )
        parameter = next(model.parameters())
        options = {"device": parameter.device, "dtype": parameter.dtype, **options}
        return cls(configs.pop(), num_layers=len(found), **options)

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
        tensors = [x for layer in self.layers for x in (*layer.by_sequence(), *layer.by_page())]
        counters = (self.position, self._present, self.pages.table)
        return sum(x.nbytes for x in (*tensors, *counters))

    # A step, from its first layer to its last

    def begin(self, tokens: int, counts: Sequence[int] | None = None) -> _Step:
        """Make room for new tokens of every sequence; what runs a model calls it.

        Args:
            tokens: columns of the input.
            counts: how many of them, from the left, each sequence has; None: all.

        Raises:
            CacheError: there is no room, or ``counts`` does not fit.
        """
        if self._static:  # what a graph captures is the device's work; the host's is done
            step = self.step()
            if tokens != step.uniform or counts is not None:
                raise CacheError(f"expected capturing({tokens}), got capturing({step.uniform})")
            return step
        B = self.batch_size
        if counts is not None and not (
            len(counts) == B and all(is_int(c) and 0 <= c <= tokens for c in counts)
        ):
            raise CacheError(
                f"counts: expected {B} ints from 0 to {tokens}, one a sequence, got {show(counts)}"
            )
        starts = [length or 0 for length in self._lengths]
        ends = []
        for b, length in enumerate(self._lengths):
            count = tokens if counts is None else counts[b]
            if length is None and counts is not None and count:
                raise CacheError(f"sequence {b}: expected one that was not freed; reset it first")
            end = 0 if length is None else length + count
            if end > self.max_length:
                raise CacheError(
                    f"sequence {b}: expected at most max_length={self.max_length} tokens, got {end}"
                )
            ends.append(end)
            if end > (length or 0) and not self._reachable(b, length or 0):
                raise CacheError(
                    f"sequence {b}: a call that failed has overwritten what the window needs; "
                    "expected reset first"
                )
        if all(length is None for length in self._lengths):
            raise CacheError("expected a sequence that was not freed, got none; reset one first")
        self._copy(self.pages.reserve(starts, ends))
        uniform = (
            tokens
            if tokens <= MAX_STEP and (counts is None or all(count == tokens for count in counts))
            else None
        )
        for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if end > start:
                self._highest[b] = max(self._highest[b], end) if start else end
        self._step = _Step(starts, ends, uniform)
        return self._step

    def step(self) -> _Step:
        """The step that is under way."""
        if self._step is None:
            raise CacheError("expected the cache's first layer to run first")
        return self._step

    def commit(self) -> None:
        """The last layer has run: the new tokens belong to their sequences."""
        step = self.step()
        if not self._static:
            self._keep(step)
        if step.uniform is not None:
            self.position.add_(self._present, alpha=step.uniform)
        else:
            self._write_positions()

    def _keep(self, step: _Step) -> None:
        """The host's part of :meth:`commit`."""
        for b, end in enumerate(step.ends):
            if self._lengths[b] is not None:
                self._lengths[b] = end
        self._step = None

    # A step in a CUDA graph

    @contextmanager
    def capturing(self, tokens: int = 1) -> Iterator[None]:
        """While a graph of one step is captured: shapes are those of ``max_length``, and the step
        adds nothing. What is run in place of captured leaves no trace either, for warming up.

        Args:
            tokens: of every sequence that a replay adds.
        """
        self.begin(tokens)
        self._static = True
        try:
            yield
        finally:
            self._static, self._step = False, None
            self._write_positions()

    def advance(self, tokens: int = 1) -> None:
        """Make room for what a replay is about to add; call it before each one.

        The graph counts the device's positions itself. Freeing, resetting and cropping sequences
        between replays is allowed, and so is what keeps the batch as large as it is.

        Raises:
            CacheError: there is no room; nothing has changed.
        """
        self._keep(self.begin(tokens))

    def completes_blocks(self, tokens: int) -> bool:
        """Whether a step completes a compressed block, as far as the host may know."""
        if self._static:
            return True
        step, whole = self.step(), self.config.num_compressed
        return any(whole(e) > whole(s) for s, e in zip(step.starts, step.ends, strict=True))

    def reach(self, tokens: int) -> tuple[int, int]:
        """Compressed blocks, and pages, of the longest sequence; of ``max_length`` in a graph."""
        if self._static:
            return self.blocks, self.pages.per_sequence
        longest = max(self.step().ends)
        return self.config.num_compressed(longest), -(-longest // self.pages.size)

    # What can be done to sequences

    def crop(self, lengths: int | Sequence[int]) -> None:
        """Take tokens back: keep the first ``lengths`` of each sequence (an int: of all).

        Any length goes as far as nothing was overwritten, ``max_crop`` back from the longest it
        has been in any case, and 0.
        """
        B = self.batch_size
        wanted = [lengths] * B if isinstance(lengths, int) else list(lengths)
        if len(wanted) != B or not all(is_int(x) for x in wanted):
            raise CacheError(f"lengths: expected an int or {B} of them, got {show(lengths)}")
        for b, (want, length) in enumerate(zip(wanted, self._lengths, strict=True)):
            if length is None:
                if isinstance(lengths, int):
                    continue
                raise CacheError(f"sequence {b}: expected one that was not freed")
            if not 0 <= want <= length:
                raise CacheError(f"sequence {b}: expected a length in 0 … {length}, got {want}")
            if want < length and not self._reachable(b, want):
                raise CacheError(
                    f"sequence {b}: expected at least {self._highest[b] - self._spare} tokens to "
                    "stay, since what the window and φ need of earlier ones is gone, got "
                    f"{want}: give the cache a larger max_crop (it has {self.max_crop})"
                )
        for b, want in enumerate(wanted):
            if self._lengths[b] is not None:
                self._lengths[b] = want
                if want == 0:
                    self._highest[b] = 0
                self.pages.truncate(b, want)
        self._write_positions()

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """Begin sequences anew, freed ones too; None: all."""
        chosen = self._rows(rows)
        for b in chosen:
            self.pages.truncate(b, 0)
            self._lengths[b], self._highest[b] = 0, 0
        self._write_positions()

    def free(self, rows: Iterable[int] | None = None) -> None:
        """Give back the pages of sequences; what steps compute in their places means nothing until
        they are reset. None: all."""
        chosen = self._rows(rows)
        for b in chosen:
            self._alive(b)
        for b in chosen:
            self.pages.truncate(b, 0)
            self._lengths[b], self._highest[b] = None, 0
        self._write_positions()

    def select(self, rows: Sequence[int]) -> None:
        """Make sequence i what sequence ``rows[i]`` is now: reorders, repeats or drops; the batch
        has ``len(rows)`` then. Pages of a pool are shared, and copied when one of them is written
        to; the rest is copied. In a batch of the same size every tensor stays where it is."""
        chosen = self._rows(rows)
        require(bool(chosen), "rows", "one sequence or more", rows)
        for b in chosen:
            self._alive(b)
        same = len(chosen) == self.batch_size
        if chosen == list(range(self.batch_size)):
            return
        copies = self.pages.select(chosen, [length or 0 for length in self._lengths])
        index = torch.tensor(chosen, device=self.device)
        for layer in self.layers:
            moved = [x.index_select(0, index) for x in layer.by_sequence()]
            if same:
                for x, new in zip(layer.by_sequence(), moved, strict=True):
                    x.copy_(new)
                self._copy_pages(layer.by_page(), layer.by_page(), copies)
            else:
                pool = layer.by_page()
                if self.pages.fixed:
                    pool = [x.new_zeros(self.pages.count + 1, *x.shape[1:]) for x in pool]
                    self._copy_pages(layer.by_page(), pool, copies)
                layer.replace(moved, pool)
        self._lengths = [self._lengths[b] for b in chosen]
        self._highest = [self._highest[b] for b in chosen]
        if not same:
            self.position = self.position.index_select(0, index)
            self._present = torch.ones_like(self.position)
        self._write_positions()

    reorder = select
    """The name that beam search has for it."""

    def fork(self, row: int) -> int:
        """Add a sequence that begins as a copy of one; returns its place. Pages of a pool are
        shared until one of the two writes to them."""
        (b,) = self._rows([row])
        self._alive(b)
        freed = [i for i, length in enumerate(self._lengths) if length is None]
        for i in freed:  # they keep their places, and take nobody's pages
            self._lengths[i] = 0
        try:
            self.select([*range(self.batch_size), b])
        finally:
            for i in freed:
                self._lengths[i] = None
            self._write_positions()
        return self.batch_size - 1

    def extend(self, max_length: int) -> None:
        """Make room for sequences of so many tokens, at least as many as now. Tensors are replaced:
        no graph that was captured before may be replayed."""
        good = is_int(max_length) and self.max_length <= max_length < 2**31
        require(good, "max_length", f"an int >= {self.max_length}", max_length)
        pages = self.pages
        longer = NSACache(
            self.config,
            num_layers=len(self.layers),
            batch_size=self.batch_size,
            max_length=max_length,
            device=self.device,
            dtype=self.dtype,
            pages=None if pages.fixed else pages.count,
            page_size=pages.size,
            max_crop=self.max_crop,
            selected_dtype=self.selected_dtype,
        )
        longer.pages.restore(pages.rows)
        copies = Copies([], [])
        for old, new in zip(pages.rows, longer.pages.rows, strict=True):
            copies.sources.extend(old)
            copies.targets.extend(new[: len(old)])
        for layer, target in zip(self.layers, longer.layers, strict=True):
            for kept, x in zip(layer.by_sequence(), target.by_sequence(), strict=True):
                x[:, : kept.shape[1]] = kept
            self._copy_pages(layer.by_page(), target.by_page(), copies)
            layer.replace(target.by_sequence(), target.by_page())
        self.pages, self.max_length, self.blocks = longer.pages, max_length, longer.blocks

    def to(self, device: torch.device | str) -> NSACache:
        """Move every tensor to a device; returns the cache itself."""
        self.device = as_device(device)
        self.position, self._present = (x.to(self.device) for x in (self.position, self._present))
        self.pages.table = self.pages.table.to(self.device)
        for layer in self.layers:
            moved = [x.to(self.device) for x in layer.by_sequence()]
            layer.replace(moved, [x.to(self.device) for x in layer.by_page()])
        return self

    # What is kept of it elsewhere

    def snapshot(self) -> dict[str, Any]:
        """A copy of everything, of plain types: ``torch.save`` keeps it, and ``torch.load`` reads
        it with ``weights_only=True``. :meth:`restore` makes a cache of it."""
        pages = self.pages
        return {
            "config": self.config.key,
            "num_layers": len(self.layers),
            "max_length": self.max_length,
            "max_crop": self.max_crop,
            "selected_dtype": self.selected_dtype,
            "page_size": pages.size,
            "pages": None if pages.fixed else pages.count,
            "lengths": list(self._lengths),
            "highest": list(self._highest),
            "rows": [list(row) for row in pages.rows],
            "tensors": [
                [x.clone() for x in (*layer.by_sequence(), *layer.by_page())]
                for layer in self.layers
            ],
        }

    @classmethod
    def restore(
        cls, snapshot: Mapping[str, Any], device: torch.device | str | None = None
    ) -> NSACache:
        """The cache that :meth:`snapshot` was taken of, on its device or another."""
        try:
            tensors = snapshot["tensors"]
            cache = cls(
                NSAConfig.from_key(snapshot["config"]),
                num_layers=snapshot["num_layers"],
                batch_size=len(snapshot["lengths"]),
                max_length=snapshot["max_length"],
                device=tensors[0][0].device if device is None else device,
                dtype=tensors[0][0].dtype,
                pages=snapshot["pages"],
                page_size=snapshot["page_size"],
                max_crop=snapshot["max_crop"],
                selected_dtype=snapshot["selected_dtype"],
            )
            cache.pages.restore(snapshot["rows"])
            for layer, saved in zip(cache.layers, tensors, strict=True):
                for x, kept in zip((*layer.by_sequence(), *layer.by_page()), saved, strict=True):
                    x.copy_(kept)
            cache._lengths = list(snapshot["lengths"])
            cache._highest = list(snapshot["highest"])
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CacheError(f"expected a snapshot of an NSACache, got another: {error}") from error
        cache._write_positions()
        return cache

    def _reachable(self, b: int, length: int) -> bool:
        """Whether rings still have what a token after the first ``length`` needs."""
        highest = self._highest[b]
        everything = highest <= min(self.window_rows, self.tail_rows)
        return length == 0 or everything or length >= highest - self._spare

    def _write_positions(self) -> None:
        lengths = [length or 0 for length in self._lengths]
        self.position.copy_(torch.tensor(lengths, dtype=torch.int32))
        present = [length is not None for length in self._lengths]
        self._present.copy_(torch.tensor(present, dtype=torch.int32))

    def _rows(self, rows: Iterable[int] | None) -> list[int]:
        B = self.batch_size
        if rows is None:
            return list(range(B))
        chosen = list(rows.tolist() if isinstance(rows, Tensor) else rows)
        if not all(is_int(b) and 0 <= b < B for b in chosen):
            raise CacheError(f"rows: expected sequences from 0 to {B - 1}, got {show(chosen)}")
        return chosen

    def _alive(self, b: int) -> None:
        if self._lengths[b] is None:
            raise CacheError(f"sequence {b}: expected one that was not freed; reset it first")

    def _copy(self, copies: Copies) -> None:
        for layer in self.layers:
            self._copy_pages(layer.by_page(), layer.by_page(), copies)

    @staticmethod
    def _copy_pages(source: list[Tensor], target: list[Tensor], copies: Copies) -> None:
        if copies.sources:
            for old, new in zip(source, target, strict=True):
                new[copies.targets] = old[copies.sources]
