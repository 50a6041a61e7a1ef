"""What one layer keeps of every sequence: rings, compressed blocks and pages.

The window's keys and values, and the tokens that φ has yet to read, stand in rings: token t in row
``t % R``. Both reach back further than a step needs, so that a few tokens can be taken back.

B sequences, S new tokens of each, N compressed blocks, P pages of L tokens, R rows of a ring, K
key/value heads, D key size, V value size, n listed blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nsa.config import KV, NSAConfig
from nsa.core.inputs import DecodeInputs
from nsa.core.rope import Angles, rope_angles
from nsa.selection.fp8 import dequantize, quantize

if TYPE_CHECKING:
    from nsa.cache.cache import NSACache

Compressor = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""φ of keys and of values: ``[B, T, K, D]`` and ``[B, T, K, V]`` -> as many blocks as are whole."""


class WriteRows(NamedTuple):
    """Where a step's tokens stand, the same in every layer."""

    row: Tensor
    """int64 ``[B, 1]``, the sequence."""
    window: Tensor
    """int64 ``[B, S]``, of the window's ring."""
    tail: Tensor
    """int64 ``[B, S]``, of the ring that φ reads."""
    page: Tensor
    """int64 ``[B, S]``"""
    offset: Tensor
    """int64 ``[B, S]``, of a page."""
    blocks: tuple[Tensor, Tensor] | None
    """Of the compressed blocks that may be whole now: int64 ``[B, X]``, where they go, and ``[B, X,
    l]``, where their tokens stand in the ring; None: there is none."""


class LayerCache:
    """The tensors of one layer. :class:`nsa.NSACache` makes and moves them; ``NSAttention`` takes
    one as ``cache=``.

    Args:
        cache: what it belongs to: geometry, lengths and pages.
        number: which of its layers it is.
    """

    def __init__(self, cache: NSACache, number: int) -> None:
        self.cache, self.number = cache, number
        config, B, K = cache.config, cache.batch_size, cache.config.num_kv_heads

        def zeros(*shape: int) -> KV:
            def of_size(size: int) -> Tensor:
                return torch.zeros(*shape, K, size, dtype=cache.dtype, device=cache.device)

            return KV(of_size(config.head_dim), of_size(config.dv))

        self.compressed = zeros(B, cache.blocks + 1)
        """k ``[B, N + 1, K, D]``, v ``[B, N + 1, K, V]``; the last row takes what is nobody's."""
        self.window = zeros(B, cache.window_rows)
        """``[B, R, K, D]`` and ``[B, R, K, V]``"""
        self.tail = zeros(B, cache.tail_rows)
        """The same, of the tokens that φ reads."""
        self.pages = zeros(cache.pages.count + 1, cache.pages.size)
        """``[P + 1, L, K, D]`` and ``[P + 1, L, K, V]``; the last page is nobody's."""
        self.scales: KV | None = None
        """fp32 ``[P + 1, L, K]`` twice, where pages hold e4m3."""
        if cache.selected_dtype == "e4m3":
            self.scales = KV(*(x[..., 0].float() for x in self.pages))
            self.pages = KV(*(x.to(torch.float8_e4m3fn) for x in self.pages))
        groups = cache.list_rows
        self.lists = torch.full(
            (B, groups, K, config.num_selected), -1, dtype=torch.int32, device=cache.device
        )
        """With ``select_share``: the list of each group of queries, in a ring of groups."""
        self.listed: Tensor | None = None
        """int32 ``[B, S, K, n]``, what the last step read."""

    @property
    def config(self) -> NSAConfig:
        """The layer's."""
        return self.cache.config

    def by_sequence(self) -> list[Tensor]:
        """The tensors that have a row for every sequence."""
        return [*self.compressed, *self.window, *self.tail, self.lists]

    def by_page(self) -> list[Tensor]:
        """The tensors that have a row for every page; e4m3 as bytes, which can be moved."""
        pages = [x.view(torch.uint8) if self.scales else x for x in self.pages]
        return [*pages, *(self.scales or ())]

    def replace(self, by_sequence: Sequence[Tensor], by_page: Sequence[Tensor]) -> None:
        """Put others in the places of :meth:`by_sequence` and :meth:`by_page`."""
        ck, cv, wk, wv, tk, tv, self.lists = by_sequence
        self.compressed, self.window, self.tail = KV(ck, cv), KV(wk, wv), KV(tk, tv)
        pages, scales = by_page[:2], by_page[2:]
        self.pages = KV(*(x.view(torch.float8_e4m3fn) if scales else x for x in pages))
        self.scales = KV(*scales) if scales else None

    def _write_pages(self, page: Tensor, row: Tensor, selected: KV) -> None:
        """Put keys and values ``[…, K, D]`` into rows of pages."""
        if self.scales is None:
            for pool, x in zip(self.pages, selected, strict=True):
                pool[page, row] = x
            return
        for pool, scales, x in zip(self.pages, self.scales, selected, strict=True):
            rounded, scale = quantize(x)
            pool.view(torch.uint8)[page, row] = rounded.view(torch.uint8)
            scales[page, row] = scale

    # One step: as many new tokens for every sequence, whatever their lengths

    def write_step(self, tokens: KV, selected: KV, window: KV, compress: Compressor) -> None:
        """Put a step's keys and values ``[B, S, K, …]`` where they belong, and compress the blocks
        that it completes. The device's positions are read on the device alone."""
        if self.number == 0:
            self.cache.write_rows = self._write_rows(selected.k.shape[1])
        to = self.cache.write_rows
        assert to is not None
        for ring, new, slot_BS in (
            (self.window, window, to.window),
            (self.tail, tokens, to.tail),
        ):
            for kept, x in zip(ring, new, strict=True):
                kept[to.row, slot_BS] = x
        self._write_pages(to.page, to.offset, selected)
        if to.blocks is None:
            return
        there, slot = to.blocks
        blocks = [kept[to.row[..., None], slot].flatten(0, 1) for kept in self.tail]
        for kept, x in zip(self.compressed, compress(*blocks), strict=True):
            kept[to.row, there] = x.view(*there.shape, *x.shape[2:]).to(kept.dtype)

    def _write_rows(self, S: int) -> WriteRows:
        cache, config = self.cache, self.config
        t_BS = cache.position.long()[:, None] + torch.arange(S, device=cache.device)
        L = cache.pages.size
        place = (t_BS // L).clamp_max(cache.pages.table.shape[1] - 1)
        blocks = None
        if cache.completes_blocks(S):
            before = _whole_blocks(t_BS[:, 0], config)
            after = _whole_blocks(t_BS[:, -1] + 1, config)
            most = -(-S // config.compress_stride)
            block = before[:, None] + torch.arange(most, device=cache.device)
            t = torch.arange(config.compress_block, device=cache.device)
            t = block[..., None] * config.compress_stride + t
            there = block.where(block < after[:, None], self.compressed.k.shape[1] - 1)
            blocks = there, t % cache.tail_rows
        return WriteRows(
            torch.arange(cache.batch_size, device=cache.device)[:, None],
            t_BS % cache.window_rows,
            t_BS % cache.tail_rows,
            cache.pages.table.gather(1, place).long(),
            t_BS % L,
            blocks,
        )

    def angles(self, T: int, dtype: torch.dtype) -> Angles | None:
        """Of RoPE, for the next tokens ``[B, T]``; None without it."""
        cache, theta = self.cache, self.config.rope_theta
        if theta is None:
            return None
        if self.number == 0:
            positions = cache.position[:, None] + torch.arange(T, device=cache.device)
            cache.angles = rope_angles(positions, self.config.head_dim, theta, dtype)
        return cache.angles

    def inputs(self, q: Tensor, gates: Tensor) -> DecodeInputs:
        """What a step reads; :meth:`write_step` has been. As far as lengths are known on the host,
        nothing longer than the longest sequence is handed on."""
        cache = self.cache
        blocks, pages = cache.reach(q.shape[1])
        return DecodeInputs(
            q,
            cache.position,
            gates,
            KV(*(x[:, :blocks] for x in self.compressed)),
            self.pages,
            cache.pages.table[:, :pages],
            self.window,
            selected_scale=self.scales,
            list_before=self.list_before() if self.config.select_share > 1 else None,
        )

    def list_before(self) -> Tensor:
        """int32 ``[B, K, n]``, the list of the group that each sequence's next query stands in."""
        group = self.cache.position.long() // self.config.select_share % self.lists.shape[1]
        return self.lists[torch.arange(len(group), device=group.device), group]

    def keep_lists(self, block_idx: Tensor) -> None:
        """With ``select_share``, remember the lists of the groups that a step's queries stand in;
        block_idx ``[B, S, K, n]``."""
        m = self.config.select_share
        if m == 1:
            return
        B, S, K, n = block_idx.shape
        t_BS = self.cache.position.long()[:, None] + torch.arange(S, device=block_idx.device)
        row_B1 = torch.arange(B, device=block_idx.device)[:, None]
        self.lists[row_B1, t_BS // m % self.lists.shape[1], :, :n] = block_idx

    # A chunk: any number of new tokens, for sequences of one length

    def earlier_window(self, rows: Sequence[int], start: int) -> KV:
        """The window's tokens before position ``start`` that its query still sees, in order."""
        first = max(0, start - self.config.window + 1)
        return _from_ring(self.window, rows, first, start)

    def write_chunk(
        self,
        rows: Sequence[int],
        start: int,
        tokens: KV,
        selected: KV,
        window: KV,
        compress: Compressor,
    ) -> None:
        """Put the keys and values ``[len(rows), C, K, …]`` of tokens from ``start`` on where they
        belong, and compress the blocks that are whole now."""
        config, device = self.config, self.cache.device
        row = torch.tensor(rows, device=device)[:, None]
        end = start + selected.k.shape[1]
        done = config.num_compressed(start)
        whole = config.num_compressed(end)
        if whole > done:
            first = done * config.compress_stride  # at most start: blocks overlap or touch
            early = _from_ring(self.tail, rows, first, start)
            made = compress(*(torch.cat(pair, 1) for pair in zip(early, tokens, strict=True)))
            for kept, new in zip(self.compressed, made, strict=True):
                kept[rows, done:whole] = new.to(kept.dtype)
        for ring, new_kv in ((self.window, window), (self.tail, tokens)):
            R = ring.k.shape[1]
            t = torch.arange(max(start, end - R), end, device=device)
            for kept, new in zip(ring, new_kv, strict=True):
                kept[row, t % R] = new[:, t[0] - start :]
        L = self.cache.pages.size
        t = torch.arange(start, end, device=device)
        page = self.cache.pages.table[rows].long()[:, t // L]
        self._write_pages(page, t % L, selected)

    def compressed_until(self, rows: Sequence[int], end: int) -> KV:
        """The blocks that are whole in the first ``end`` tokens."""
        N = self.config.num_compressed(end)
        if list(rows) == list(range(self.cache.batch_size)):
            return KV(*(x[:, :N] for x in self.compressed))
        return KV(*(x[rows, :N] for x in self.compressed))

    def selected_until(self, rows: Sequence[int], end: int) -> KV:
        """The first ``end`` tokens of the selected branch, from the pages: a view where every
        sequence has pages of its own, else a copy."""
        pages = self.cache.pages
        if pages.fixed and self.scales is None and list(rows) == list(range(len(pages.rows))):
            B, M = pages.table.shape
            return KV(*(x[: B * M].unflatten(0, (B, M)).flatten(1, 2)[:, :end] for x in self.pages))
        table = pages.table[rows, : -(-end // pages.size)].long()
        found = [x[table].flatten(1, 2)[:, :end] for x in self.by_page()]
        if self.scales is None:
            return KV(*found)
        k, v, k_scale, v_scale = found
        dtype = self.cache.dtype
        return KV(dequantize(k, k_scale, dtype), dequantize(v, v_scale, dtype))


def _whole_blocks(length: Tensor, config: NSAConfig) -> Tensor:
    """Compressed blocks of sequences of so many tokens."""
    last = length - config.compress_block
    return (last.div(config.compress_stride, rounding_mode="floor") + 1).clamp_min(0)


def _from_ring(ring: KV, rows: Sequence[int], first: int, end: int) -> KV:
    t = torch.arange(first, end, device=ring.k.device)
    row = torch.tensor(rows, device=t.device)[:, None]
    return KV(*(x[row, t % x.shape[1]] for x in ring))
