"""How the next token is drawn.

Shapes: B batch, C vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.errors import is_finite, is_int, require

_DRAWN_AHEAD = 64
"""Numbers of a sequence that go to the device at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """How tokens are drawn.

    Raises :class:`nsa.ConfigError` when a value is out of range.
    """

    max_new_tokens: int = 400
    """Tokens at most, which are bytes here."""
    temperature: float = 0.8
    """Divisor of the logits; 0 takes the likeliest token (the first of equals)."""
    top_k: int | None = None
    """Sample among this many of the likeliest tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens whose shares add up to this."""
    min_p: float | None = None
    """Sample among tokens that are at least this share as likely as the likeliest."""
    seed: int = 0
    """Seed of the draws: the same gives the same text on the same machine."""

    def __post_init__(self) -> None:
        for name, expected, holds in (
            ("max_new_tokens", "an int >= 0", lambda x: is_int(x) and x >= 0),
            ("temperature", "a finite number >= 0", lambda x: is_finite(x) and x >= 0),
            ("top_k", "an int >= 1", lambda x: x is None or (is_int(x) and x >= 1)),
            ("top_p", "a number in (0, 1]", _is_share),
            ("min_p", "a number in (0, 1]", _is_share),
            ("seed", "an int in [0, 2**63)", lambda x: is_int(x) and 0 <= x < 2**63),
        ):
            value, flag = getattr(self, name), "--" + name.replace("_", "-")
            require(holds(value), flag, expected, value)


def _is_share(x: object) -> bool:
    return x is None or (is_finite(x) and 0 < x <= 1)  # type: ignore[operator]


class Draws:
    """Uniform random numbers for every sequence of a batch.

    Sequence i has those of the seed ``seed + i``, so that it is drawn as it would be alone with
    that seed, whatever else is in the batch.
    """

    def __init__(self, seed: int, count: int, device: torch.device) -> None:
        seeds = ((seed + row) % 2**63 for row in range(count))
        self._generators = [torch.Generator().manual_seed(x) for x in seeds]
        self._device = device
        self._table = torch.empty(0, count)
        self._next = 0

    def __call__(self) -> Tensor:
        """The next number of each sequence: float64 ``[B]`` in [0, 1)."""
        if self._next == len(self._table):
            drawn = [
                torch.rand(_DRAWN_AHEAD, generator=generator, dtype=torch.float64)
                for generator in self._generators
            ]
            self._table, self._next = torch.stack(drawn, 1).to(self._device), 0
        self._next += 1
        return self._table[self._next - 1]


def sample(logits: Tensor, config: GenerationConfig, uniform: Tensor) -> Tensor:
    """Draw the next token of each sequence, on the device.

    Args:
        logits: ``[B, C]``.
        config: ``top_p`` and ``min_p`` count the shares among the ``top_k``.
        uniform: float64 ``[B]`` in [0, 1): the draw.

    Returns:
        int64 ``[B]``; −1 where the logits are not finite.
    """
    logits = logits.double()
    most = logits.amax(-1, keepdim=True)
    if config.temperature == 0:
        token = logits.argmax(-1)
    else:
        # Sorted stably: equal logits keep their order, and nothing depends on topk's.
        # No difference is infinite: a tiny temperature is the limit of zero.
        scaled = (logits - most) / config.temperature
        ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
        shares = ordered[:, : config.top_k].softmax(-1)
        kept = shares
        if config.top_p is not None:
            before = shares.cumsum(-1) - shares
            kept = kept.masked_fill(before >= config.top_p, 0.0)
        if config.min_p is not None:
            kept = kept.masked_fill(shares < config.min_p * shares[:, :1], 0.0)
        until = kept.cumsum(-1)
        place = (until <= uniform[:, None] * until[:, -1:]).sum(-1, keepdim=True)
        last = (kept > 0).sum(-1, keepdim=True) - 1
        token = order.gather(-1, place.minimum(last).clamp_min_(0))[:, 0]
    return token.where(most[:, 0].isfinite(), -1)
