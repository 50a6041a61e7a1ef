"""Sampling from a language model, one token after the other.

Shapes: C vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from torch import Tensor

from nsa.errors import ShapeError, is_finite, is_int, require, show
from nsa.models.language_model import LanguageModel


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
    seed: int = 0
    """Seed of the draws: the same gives the same text on the same machine."""

    def __post_init__(self) -> None:
        for name, expected, holds in (
            ("max_new_tokens", "an int >= 0", lambda x: is_int(x) and x >= 0),
            ("temperature", "a finite number >= 0", lambda x: is_finite(x) and x >= 0),
            ("top_k", "an int >= 1", lambda x: x is None or (is_int(x) and x >= 1)),
            (
                "top_p",
                "a number in (0, 1]",
                lambda x: x is None or (is_finite(x) and 0 < x <= 1),
            ),
            ("seed", "an int in [0, 2**63)", lambda x: is_int(x) and 0 <= x < 2**63),
        ):
            value, flag = getattr(self, name), "--" + name.replace("_", "-")
            require(holds(value), flag, expected, value)


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    config: GenerationConfig,
    *,
    context: int,
    stop: int | None = None,
) -> Iterator[int]:
    """Yield one token after the other, each from a full forward over those before it.

    Args:
        model: runs on its own device.
        prompt: at least one token.
        config: how tokens are drawn, and how many.
        context: tokens that the model looks back on at most: it knows no longer positions than it
            was trained on.
        stop: the token that ends the text; it is not yielded.
    """
    require(isinstance(config, GenerationConfig), "config", "a GenerationConfig", config)
    require(is_int(context) and context >= 1, "context", "an int >= 1", context)
    tokens = list(prompt) if isinstance(prompt, Sequence) else []
    if not (tokens and all(isinstance(x, SupportsIndex) and 0 <= int(x) < 2**63 for x in tokens)):
        raise ShapeError(f"prompt: expected one token or more, ints >= 0, got {show(prompt)}")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.max_new_tokens):
        logits_C = model(torch.tensor([tokens[-context:]], device=device))[0, -1]
        token = sample(logits_C.double().cpu(), config, generator)
        if token == stop:
            return
        tokens.append(token)
        yield token


def sample(
    logits_C: Tensor, config: GenerationConfig, generator: torch.Generator | None = None
) -> int:
    """Draw one token from logits on the CPU; ``top_p`` counts the shares among the ``top_k``."""
    if config.temperature == 0:
        return int(logits_C.argmax())
    logits_C = logits_C - logits_C.amax()  # what follows may divide by a number close to 0
    # Sorted stably: equal logits keep their order, and nothing depends on topk's.
    # No difference is infinite: a tiny temperature is the limit of zero.
    scaled_C = (logits_C - logits_C.max()) / config.temperature
    ordered, order = scaled_C.sort(descending=True, stable=True)
    shares = ordered[: config.top_k].softmax(0)
    if config.top_p is not None:
        before = shares.cumsum(0) - shares
        shares = shares[before < config.top_p]
    return int(order[torch.multinomial(shares, 1, generator=generator)])
