"""Where the tokens of a batch are: what the model's arguments say, found once for all its layers.

B rows, T columns.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from nsa.core.packing import packed_tokens
from nsa.errors import ConfigError, ShapeError, is_int, show
from nsa.padding import Padding

FLASH_ONLY = ("sliding_window", "softcap", "s_aux")
"""What flash attention would obey, and layers do not."""
LAYER_TYPE = "nsa"
"""What a converted layer is called in a model's ``layer_types``."""


class Packed(NamedTuple):
    """Sequences one after the other, for a call without a cache."""

    cu_seqlens: Tensor
    """int32 ``[n_seq + 1]``"""
    max_seqlen: int | None
    indices: Tensor | None
    """int64 ``[total]``, where each token is among the B * T; None: all are tokens."""

    def pack(self, x: Tensor) -> Tensor:
        """``[B, T, dim]`` to ``[1, total, dim]``."""
        flat = x.flatten(0, 1)
        return (flat if self.indices is None else flat[self.indices.to(x.device)])[None]

    def unpack(self, y: Tensor, B: int, T: int) -> Tensor:
        """The way back, with zeros where no token is."""
        flat = y[0]
        if self.indices is not None:
            out = flat.new_zeros(B * T, flat.shape[-1])
            flat = out.index_copy(0, self.indices.to(y.device), flat)
        return flat.view(B, T, -1)


class Aligned(NamedTuple):
    """The new tokens of each sequence of a cache."""

    columns: int
    """T"""
    first: list[int]
    """The column of each row's first token."""
    counts: list[int]
    """How many stand side by side from there on."""

    def align(self, x: Tensor) -> Tensor:
        """``[B, T, dim]`` to ``[B, max(1, *counts), dim]``, each row from the left."""
        row, column = self._index(x)
        return x[row, column.clamp_max(self.columns - 1)]

    def restore(self, y: Tensor) -> Tensor:
        """The way back, with zeros where no token is."""
        row, column = self._index(y)
        out = y.new_zeros(y.shape[0], self.columns, y.shape[-1])
        counts = torch.tensor(self.counts, device=y.device)
        there = torch.arange(y.shape[1], device=y.device) < counts[:, None]
        rows, columns = row.expand_as(column)[there], column[there]
        out[rows, columns] = y[there]
        return out

    def crop(self, columns: int) -> Aligned:
        """What the first columns have."""
        counts = [
            min(count, max(0, columns - first))
            for first, count in zip(self.first, self.counts, strict=True)
        ]
        return Aligned(columns, self.first, counts)

    def select(self, rows: list[int]) -> Aligned:
        """What some rows have."""
        first, counts = ([part[row] for row in rows] for part in (self.first, self.counts))
        return Aligned(self.columns, first, counts)

    def _index(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.tensor(self.first, device=x.device)[:, None]
        row = torch.arange(len(self.first), device=x.device)[:, None]
        return row, first + torch.arange(max(1, *self.counts), device=x.device)


def describe_batch(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """Replace the arguments of a decoder that say where tokens are by ``nsa_batch``; a forward
    pre-hook of transformers models without their heads.

    Raises:
        ShapeError: a mask that is not ``[B, T]``, or has a hole, or packed input with a cache.
    """
    if args:
        names = inspect.signature(module.forward).parameters
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    if kwargs.get("output_attentions"):
        raise ConfigError(
            "output_attentions: expected False, got True: a layer has no matrix of attention; "
            "nsa.inspection reports what it reads"
        )
    for name in FLASH_ONLY:
        if kwargs.get(name) is not None:
            raise ConfigError(
                f"{name}: expected None for a converted model, got {show(kwargs[name])}; window "
                "and scale are of its nsa_config"
            )
    given = kwargs.get("inputs_embeds")
    x = kwargs.get("input_ids") if given is None else given
    if not isinstance(x, Tensor):  # the model says so
        return (), kwargs
    cache, mask = kwargs.get("cache", kwargs.get("past_key_values")), kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ShapeError(
            f"attention_mask: expected None or [B, T] of ones and, for padding, zeros, got {got}"
        )
    packed = _packed(x, kwargs, mask) if cache is None else None
    if cache is None and kwargs.get("use_cache") is None:
        # training has no use for a cache, and flattened sequences are not the rows of one
        flat = packed is not None and packed.indices is None
        wanted = cast(Any, module).config.use_cache
        kwargs["use_cache"] = wanted and not (flat or torch.is_grad_enabled())
    cached = cache is not None or kwargs["use_cache"]
    batch = _aligned(x, kwargs, mask) if cached else packed
    if kwargs.get("position_ids") is None:
        kwargs["position_ids"] = _positions(x, batch, mask, cache)
    kwargs["nsa_batch"] = batch
    kwargs["attention_mask"] = {LAYER_TYPE: None}  # some models look up a mask by the layer's type
    return (), kwargs


def _packed(x: Tensor, kwargs: dict[str, Any], mask: Tensor | None) -> Packed | None:
    """Sequences that are shorter than rows: flattened, or padded."""
    B, T = x.shape[:2]
    cu_seqlens, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    of_keys = kwargs.get("cu_seq_lens_k")
    if of_keys is not None and (cu_seqlens is None or of_keys.shape != cu_seqlens.shape):
        got = "none" if cu_seqlens is None else f"others, {list(cu_seqlens.shape)}"
        raise ShapeError(
            f"cu_seq_lens_k: expected the same offsets as cu_seq_lens_q, got {got} there; keys are "
            "the queries' own"
        )
    if cu_seqlens is not None:
        if B != 1:
            raise ShapeError(f"cu_seq_lens_q: expected one row of packed sequences, got {B}")
        longest = kwargs.get("max_length_q")
        return Packed(cu_seqlens.int(), longest if is_int(longest) else None, None)
    if mask is not None:
        if mask.shape != (B, T):
            raise ShapeError(f"attention_mask: expected {[B, T]}, got {list(mask.shape)}")
        padding = Padding(mask)
        if min(padding.lengths, default=T) == T:
            return None
        indices = padding.mask.flatten().nonzero().squeeze(1)
        return Packed(padding.cu_seqlens, padding.max_seqlen, indices)
    if positions is None or positions.ndim != 2:
        return None
    jumps = (positions.diff(dim=1) != 1).expand(B, -1).nonzero().tolist()
    if not jumps:
        return None
    starts = sorted([b * T for b in range(B)] + [b * T + t + 1 for b, t in jumps])
    ends = [*starts[1:], B * T]
    longest = max(end - start for start, end in zip(starts, ends, strict=True))
    return Packed(torch.tensor([0, *ends], dtype=torch.int32, device=x.device), longest, None)


def _aligned(x: Tensor, kwargs: dict[str, Any], mask: Tensor | None) -> Aligned | None:
    """Rows of which not every column is a token."""
    B, T = x.shape[:2]
    if kwargs.get("cu_seq_lens_q") is not None:
        raise ShapeError("cu_seq_lens_q: expected None with a cache; pass use_cache=False")
    if mask is None:
        return None
    if mask.shape[0] != B or mask.shape[1] < T:
        raise ShapeError(f"attention_mask: expected {[B, T]} or wider, got {list(mask.shape)}")
    padding = Padding(mask[:, mask.shape[1] - T :])
    if min(padding.lengths, default=T) == T:
        return None
    return Aligned(T, padding.mask.int().argmax(1).tolist(), padding.lengths)


def _positions(
    x: Tensor, batch: Packed | Aligned | None, mask: Tensor | None, cache: Any
) -> Tensor | None:
    """Of each token in its own sequence, int64 ``[B, T]``; None where columns say as much.

    The model itself would count columns. To the dense model it is the same, to φ it is not.
    """
    B, T = x.shape[:2]
    if isinstance(batch, Packed) and batch.indices is None:
        return packed_tokens(batch.cu_seqlens, B * T).position.view(B, T).long()
    layers = [] if cache is None else cache.layers
    ours = (layer for layer in layers if getattr(layer, "_layer_type", None) == LAYER_TYPE)
    before = getattr(next(ours, None), "lengths", None)
    if batch is None and (before is None or set(before) == {cache.get_seq_length()}):
        return None
    new = torch.ones_like(x[..., 0] if x.ndim == 3 else x) if mask is None else mask[:, -T:]
    positions = ((new != 0).cumsum(1) - 1).clamp_min(0)
    return (
        positions if before is None else positions + torch.tensor(before, device=x.device)[:, None]
    )
