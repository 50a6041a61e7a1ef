"""What the language model looks like: one frozen, checked dataclass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from nsa.config import NSAConfig, nearest
from nsa.errors import ConfigError

Attention = Literal["nsa", "dense"]


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
        if self.hidden_dim is None:
            _require_positive_int("dim", self.dim)
            rounded = 64 * max(1, round(self.dim * 8 / 3 / 64))
            object.__setattr__(self, "hidden_dim", rounded)
        for name in ("dim", "num_layers", "hidden_dim", "vocab_size"):
            _require_positive_int(name, getattr(self, name))
        if not isinstance(self.nsa, NSAConfig):
            raise ConfigError(f"nsa: expected an NSAConfig, got {self.nsa!r}")
        require_known("attention", self.attention, get_args(Attention))
        if not isinstance(self.tied_embeddings, bool):
            raise ConfigError(
                f"tied_embeddings: expected True or False, got {self.tied_embeddings!r}"
            )
        eps: object = self.norm_eps
        if not isinstance(eps, float) or not 0 < eps < math.inf:
            raise ConfigError(f"norm_eps: expected a finite float > 0, got {eps!r}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ModelConfig:
        """Name a model, ``changes`` applied: "small" (GPT-2's size) or "tiny" (for a CPU)."""
        require_known("preset", name, tuple(PRESETS))
        _refuse_unknown(cls, changes)
        return cls(**{**PRESETS[name], "nsa": NSAConfig.preset(name), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold, the NSA configuration nested."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Invert :meth:`to_dict`; unknown or missing names raise ConfigError."""
        _refuse_unknown(cls, values)
        missing = [name for name in ("dim", "num_layers", "nsa") if name not in values]
        if missing:
            raise ConfigError(f"expected a value for {missing[0]!r}, got none")
        if not isinstance(values["nsa"], Mapping):
            raise ConfigError(f"nsa: expected a table of values, got {values['nsa']!r}")
        _refuse_unknown(NSAConfig, values["nsa"])
        return cls(**{**values, "nsa": NSAConfig(**values["nsa"])})

    def replace(self, **changes: Any) -> ModelConfig:
        """Copy with ``changes`` applied and checked."""
        _refuse_unknown(type(self), changes)
        if "dim" in changes and "hidden_dim" not in changes:
            changes["hidden_dim"] = None  # follows the new width, not the old one
        return replace(self, **changes)


PRESETS: dict[str, dict[str, Any]] = {
    "small": {"dim": 768, "num_layers": 12},
    "tiny": {"dim": 128, "num_layers": 4},
}


def require_known(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a value that is none of the known ones, and name the nearest."""
    if value not in known:
        raise ConfigError(
            f"{name}: expected one of the known names, got {value!r}; {nearest(value, known)}"
        )


def _refuse_unknown(cls: type, values: Mapping[str, Any]) -> None:
    names = tuple(field.name for field in fields(cls))
    unknown = [name for name in values if name not in names]
    if unknown:
        raise ConfigError(
            f"expected names of {cls.__name__}, got {unknown[0]!r}; {nearest(unknown[0], names)}"
        )


def _require_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: expected an int >= 1, got {value!r}")
