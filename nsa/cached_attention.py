"""Attention of new tokens over a cache: a step of a few, or a chunk of any number.

A step is one call of the backend's decoder for sequences of any lengths. A chunk goes through the
four steps of training, whose queries begin at a position, for all sequences of one length at once;
the keys and values are the cache's.

B sequences, T new tokens, H query heads, K key/value heads, V value size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.attention import combine, no_autocast
from nsa.backends.dispatch import Resolution
from nsa.backends.protocol import Decoder
from nsa.cache.layer import Compressor, LayerCache
from nsa.config import KV, NSAConfig
from nsa.errors import CacheError


class Projected(NamedTuple):
    """What a layer's branches read of some tokens."""

    q: Tensor
    """``[B, T, H, D]``, after RoPE."""
    tokens: KV
    """What φ compresses: k ``[B, T, K, D]``, v ``[B, T, K, V]``, as of the other two."""
    selected: KV
    window: KV
    gates: Tensor
    """``[B, T, H, 3]``, activated."""

    def part(self, rows: list[int], count: int) -> Projected:
        """The first tokens of some sequences."""

        def cut(x: Tensor) -> Tensor:
            return x[rows, :count]

        tokens, selected, window = (
            KV(cut(k), cut(v)) for k, v in (self.tokens, self.selected, self.window)
        )
        return Projected(cut(self.q), tokens, selected, window, cut(self.gates))


def check_cache(layer: object, x: Tensor, config: NSAConfig) -> LayerCache:
    """Refuse a cache that is none, or that is not for this layer or input ``[B, T, dim]``."""
    if not isinstance(layer, LayerCache):
        raise CacheError(
            f"cache: expected a layer of an NSACache (cache.layers[i]), got {type(layer).__name__}"
        )
    if torch.is_grad_enabled():
        raise CacheError(
            "cache: expected torch.no_grad() or torch.inference_mode() around the call"
        )
    cache = layer.cache
    if cache.config != config:
        raise CacheError("cache: expected one of the layer's configuration, got another's")
    for what, expected, got in (
        ("of as many sequences", cache.batch_size, x.shape[0]),
        ("on the device", cache.device, x.device),
    ):
        if expected != got:
            raise CacheError(f"cache: expected input {what} as it has, {expected}, got {got}")
    return layer


def attend(
    layer: LayerCache,
    new: Projected,
    counts: list[int] | None,
    chosen: Resolution,
    decoder: Decoder | None,
    phi: Compressor,
) -> Tensor:
    """Write the new tokens into the cache and attend from them.

    Args:
        layer: of the cache.
        new: of every sequence.
        counts: how many of the new tokens, from the left, each sequence has; None: all.
        chosen: what runs a chunk.
        decoder: what runs a step; None: it goes the way of a chunk.
        phi: compresses.

    Returns:
        ``[B, T, H, V]``; rows past a sequence's count mean nothing.
    """
    cache, T = layer.cache, new.q.shape[1]
    if new.q.dtype != cache.dtype:
        raise CacheError(f"cache: expected queries of its dtype {cache.dtype}, got {new.q.dtype}")
    step = cache.begin(T, counts) if layer.number == 0 else cache.step()
    if step.uniform is not None and decoder is not None:
        out = _step(layer, new, decoder, phi)
    else:
        out = _chunks(layer, new, step.starts, step.ends, chosen, phi)
    if layer.number == len(cache.layers) - 1:
        cache.commit()
    return out


def _step(layer: LayerCache, new: Projected, decoder: Decoder, phi: Compressor) -> Tensor:
    layer.write_step(new.tokens, new.selected, new.window, phi)
    with no_autocast(new.q.device):
        out, layer.listed = decoder.decode_attention(layer.inputs(new.q, new.gates), layer.config)
    layer.keep_lists(layer.listed)
    return out


def _chunks(
    layer: LayerCache,
    new: Projected,
    starts: list[int],
    ends: list[int],
    chosen: Resolution,
    phi: Compressor,
) -> Tensor:
    B, T, H, _ = new.q.shape
    config = layer.config
    out = new.q.new_zeros(B, T, H, config.dv)
    shape = (B, T, config.num_kv_heads, config.num_selected)
    layer.listed = torch.full(shape, -1, dtype=torch.int32, device=new.q.device)
    groups: dict[tuple[int, int], list[int]] = {}
    for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if end > start:
            groups.setdefault((start, end), []).append(b)
    for (start, end), rows in groups.items():
        every = len(rows) == B and end - start == T
        part = new if every else new.part(rows, end - start)
        made, block_idx = _chunk(layer, part, rows, start, chosen, phi)
        out[rows, : end - start] = made
        layer.listed[rows, : end - start] = block_idx
    return out


def _chunk(
    layer: LayerCache,
    new: Projected,
    rows: list[int],
    start: int,
    chosen: Resolution,
    phi: Compressor,
) -> tuple[Tensor, Tensor]:
    config, count = layer.config, new.q.shape[1]
    end, before = start + count, layer.earlier_window(rows, start)
    window = KV(*(torch.cat(pair, 1) for pair in zip(before, new.window, strict=True)))
    layer.write_chunk(rows, start, new.tokens, new.selected, new.window, phi)
    q, compressed = new.q, layer.compressed_until(rows, end)
    with no_autocast(q.device):
        out_cmp, lse = chosen.step("compressed").compressed_attention(
            q, *compressed, config, q_start=start
        )
        block_idx = _lists(layer, q, compressed.k, lse, rows, start, chosen)
        out_slc, _ = chosen.step("selected").selected_attention(
            q, *layer.selected_until(rows, end), block_idx, config, q_start=start
        )
        out_win, _ = chosen.step("window").window_attention(
            q, *window, config, q_start=before.k.shape[1]
        )
        return combine(new.gates, out_cmp, out_slc, out_win), block_idx


def _lists(
    layer: LayerCache,
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    rows: list[int],
    start: int,
    chosen: Resolution,
) -> Tensor:
    """int32 ``[len(rows), T, K, n]``; with ``select_share`` the first queries may read the list of
    one that came before."""
    config, T = layer.config, q.shape[1]
    m = config.select_share
    early = min(T, -start % m)
    parts = []
    if early:
        kept = layer.lists[rows, start // m % layer.lists.shape[1]]
        parts.append(kept[:, None].expand(-1, early, -1, -1))
    if early < T:
        found = chosen.step("select").select_blocks(
            q[:, early:], k_cmp, config, q_start=start + early, lse=lse[:, early:]
        )
        parts.append(F.pad(found, (0, config.num_selected - found.shape[-1]), value=-1))
    lists = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    if m > 1:
        t = torch.arange(max(0, T - m * (layer.lists.shape[1] - 1)), T, device=q.device)
        slot = (start + t) // m % layer.lists.shape[1]
        layer.lists[torch.tensor(rows, device=q.device)[:, None], slot] = lists[:, t]
    return lists
