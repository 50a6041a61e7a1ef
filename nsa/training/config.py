"""How to train: the checked configuration of one run, its presets, and what two runs differ in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from nsa.config import nearest
from nsa.errors import ConfigError
from nsa.models import ModelConfig

PRECISIONS = ("fp32", "bf16")
COMPILE_MODES = ("none", "blocks", "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything but the model; lengths are in bytes, which are this model's tokens.

    Raises :class:`nsa.ConfigError` when a value is out of range.
    """

    data: str
    """"stdlib", or an absolute path."""
    device: str
    """A torch device."""
    precision: str
    """"bf16": autocast; "fp32": none."""
    backend: str | None
    """The NSA backend asked for; None lets the settings decide."""
    seq_len: int
    batch_size: int
    """Sequences in one forward pass."""
    steps: int
    """Optimizer steps of the whole run."""
    lr: float
    """Learning rate after the warm-up."""
    warmup: int
    """Steps of linear warm-up."""
    accumulate: int = 1
    """Forward passes in one optimizer step."""
    min_lr: float = 0.1
    """What the cosine ends at, as a share of ``lr``."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    activation_checkpointing: bool = False
    compile: str = "none"
    """"model": the loss as one graph; "blocks": each block, with one code for all; "none"."""
    seed: int = 0
    eval_every: int
    """Steps between validations."""
    eval_windows: int
    """Sequences in one validation."""
    save_every: int
    """Steps between checkpoints."""
    log_every: int
    """Steps between lines of metrics."""
    keep: int = 2
    """Checkpoints kept."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int":
                value = getattr(self, field.name)
                least = 0 if field.name in ("seed", "warmup") else 1
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise ConfigError(
                        f"{flag(field.name)}: expected an int >= {least}, got {value!r}"
                    )
        for name, expected, holds in (
            ("lr", "> 0", lambda x: x > 0),
            ("min_lr", "in [0, 1]", lambda x: 0 <= x <= 1),
            ("weight_decay", ">= 0", lambda x: x >= 0),
            ("beta1", "in [0, 1)", lambda x: 0 <= x < 1),
            ("beta2", "in [0, 1)", lambda x: 0 <= x < 1),
            ("grad_clip", "> 0", lambda x: x > 0),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not holds(value):
                raise ConfigError(f"{flag(name)}: expected a number {expected}, got {value!r}")
        for name, known in (("precision", PRECISIONS), ("compile", COMPILE_MODES)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f"{flag(name)}: expected one of the known names, got {value!r}; "
                    f"{nearest(value, known)}"
                )

    def learning_rate(self, step: int) -> float:
        """The rate of step ``step``, counted from 0: linear warm-up, then half a cosine."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.lr * (self.min_lr + (1 - self.min_lr) * cosine)


PRESETS: dict[str, dict[str, Any]] = {
    # About two minutes on two CPU cores.
    "tiny": {
        "seq_len": 256,
        "batch_size": 8,
        "steps": 300,
        "lr": 3e-3,
        "warmup": 30,
        "eval_every": 100,
        "eval_windows": 128,
        "save_every": 100,
        "log_every": 10,
    },
    "small": {
        "seq_len": 2048,
        "batch_size": 8,
        "steps": 300,
        "lr": 1e-3,
        "warmup": 30,
        "eval_every": 100,
        "eval_windows": 128,
        "save_every": 100,
        "log_every": 10,
    },
}

_FREE = frozenset(
    {"data", "device", "eval_every", "eval_windows", "save_every", "log_every", "keep"}
)
"""May change when a run goes on: none of them touches what is computed (the bytes of the data are
compared themselves)."""

_ROUNDING = frozenset({"compile"})
"""May change when a run goes on, and changes rounding: whoever goes on says so."""

_ADDED_LATER = {"compile": "none"}
"""Settings that older runs do not have, and what those runs did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run: the model and how it is trained."""

    model: ModelConfig
    train: TrainConfig

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {"model": self.model.to_dict(), "train": asdict(self.train)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: a part, a name or a value is missing, unknown or out of range.
        """
        for part in ("model", "train"):
            if not isinstance(values.get(part), Mapping):
                raise ConfigError(f"{part}: expected a table of values, got {values.get(part)!r}")
        train = {**_ADDED_LATER, **values["train"]}
        names = {field.name for field in fields(TrainConfig)}
        for name in sorted(names ^ set(train)):
            known = "none" if name in names else "an unknown name"
            raise ConfigError(f"train: expected a value for each setting, got {known} for {name!r}")
        return cls(model=ModelConfig.from_dict(values["model"]), train=TrainConfig(**train))

    def differences(self, other: RunConfig) -> list[str]:
        """``name mine -> other's`` of every field that changes what is computed."""
        return self._differences(other, lambda name: name not in _FREE | _ROUNDING)

    def rounding_differences(self, other: RunConfig) -> list[str]:
        """The same of every field that changes the last bits of it alone."""
        return self._differences(other, lambda name: name in _ROUNDING)

    def _differences(self, other: RunConfig, counts: Callable[[str], bool]) -> list[str]:
        mine, theirs = _flatten(self.to_dict()), _flatten(other.to_dict())
        return [
            f"{name.rpartition('.')[2]} {mine[name]} -> {theirs[name]}"
            for name in mine
            if mine[name] != theirs[name] and counts(name.removeprefix("train."))
        ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")
