"""What the language model looks like: one frozen, checked dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from nsa.config import NSAConfig
from nsa.errors import ConfigError, is_finite, is_int, require, require_fields, require_known

Attention = Literal["nsa", "dense"]

_MOST = {"dim": 2**24, "num_layers": 10_000, "hidden_dim": 2**26, "vocab_size": 2**24}
"""The largest sizes: bytes of a matrix are counted in int64, and layers are made in a minute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes of a :class:`nsa.models.LanguageModel`.

    Raises :class:`nsa.ConfigError` when a value is out of range.
    """

    dim: int
    """Width of the residual stream."""
    num_layers: int
    """Blocks, each one attention and one SwiGLU."""
    nsa: NSAConfig
    """Heads and geometry of the attention; dense attention takes its heads, head sizes, scale and
    RoPE from here too."""
    attention: Attention = "nsa"
    """"nsa", or "dense": causal attention with one shared K/V projection, for comparison."""
    hidden_dim: int | None = None
    """Width of the SwiGLU; by default 8/3 of ``dim``, rounded to a multiple of 64."""
    vocab_size: int = 256
    """Token ids; 256 for bytes."""
    tied_embeddings: bool = True
    """Whether the output head is the embedding matrix."""
    norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "hidden_dim", "vocab_size"):
            value = getattr(self, name)
            if name == "hidden_dim" and value is None:  # dim is checked by now
                value = 64 * max(1, round(self.dim * 8 / 3 / 64))
                object.__setattr__(self, name, value)
            require(is_int(value) and value >= 1, name, "an int >= 1", value)
            require(value <= _MOST[name], name, f"at most {_MOST[name]}", value)
        require(isinstance(self.nsa, NSAConfig), "nsa", "an NSAConfig", self.nsa)
        require_known("attention", self.attention, get_args(Attention))
        if self.attention == "dense":  # torch's kernels mask before they scale
            scale = self.nsa.softmax_scale
            require(scale > 0, "nsa.scale", "a number > 0 with attention='dense'", scale)
        tied, eps = self.tied_embeddings, self.norm_eps
        require(isinstance(tied, bool), "tied_embeddings", "True or False", tied)
        positive = isinstance(eps, float) and is_finite(eps) and eps > 0
        require(positive, "norm_eps", "a finite float > 0", eps)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ModelConfig:
        """Name a model, ``changes`` applied: "small" (GPT-2's size) or "tiny" (for a CPU)."""
        require_known("preset", name, tuple(PRESETS))
        require_fields(cls, changes)
        return cls(**{**PRESETS[name], "nsa": NSAConfig.preset(name), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold, the NSA configuration nested."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Invert :meth:`to_dict`; unknown or missing names raise ConfigError."""
        require(isinstance(values, Mapping), "values", "a table of values", values)
        require_fields(cls, values)
        missing = [name for name in ("dim", "num_layers", "nsa") if name not in values]
        if missing:
            raise ConfigError(f"expected a value for {missing[0]!r}, got none")
        nsa = values["nsa"]
        require(isinstance(nsa, Mapping), "nsa", "a table of values", nsa)
        require_fields(NSAConfig, nsa)
        return cls(**{**values, "nsa": NSAConfig(**nsa)})

    def replace(self, **changes: Any) -> ModelConfig:
        """Copy with ``changes`` applied and checked."""
        require_fields(type(self), changes)
        if "dim" in changes and "hidden_dim" not in changes:
            changes["hidden_dim"] = None  # follows the new width, not the old one
        return replace(self, **changes)


PRESETS: dict[str, dict[str, Any]] = {
    "small": {"dim": 768, "num_layers": 12},
    "tiny": {"dim": 128, "num_layers": 4},
}
