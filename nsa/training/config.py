"""How to train: the checked configuration of one run, its presets, and what two runs differ in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from nsa.errors import ConfigError, is_finite, is_int, require, require_known
from nsa.models import ModelConfig
from nsa.training.data import Split

Precision = Literal["fp32", "bf16"]
CompileMode = Literal["none", "blocks", "model"]

_MOST = {"accumulate": 2**16}
"""The largest values, where they are no limits of int64: a step has to end."""
_KINDS: dict[Any, Any] = {"str": str, "str | None": str | None, "bool": bool}
"""Of the type of a field, what its value must be an instance of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything but the model; lengths are in bytes, which are this model's tokens.

    The docstrings are the help of the flags. Raises :class:`nsa.ConfigError` when a value is out of
    range.
    """

    data: str
    """Text file or folder; by default "stdlib", Python's own standard library."""
    split: Split = "bytes"
    """What a 20th of is for validation; "files", of whatever size, is what old runs did."""
    device: str
    """A torch device."""
    precision: Precision
    """"bf16": autocast, the default on CUDA; "fp32": none."""
    backend: str | None = None
    """The NSA backend requested; None lets the settings decide."""
    seq_len: int
    """Length of a sequence."""
    batch_size: int
    """Sequences in one forward pass, of all processes together."""
    steps: int
    """Optimizer steps of the whole run."""
    lr: float
    """Learning rate after the warm-up."""
    warmup: int
    """Steps of linear warm-up."""
    accumulate: int = 1
    """Forward passes in one optimizer step."""
    min_lr: float = 0.1
    """What the cosine ends at, as a share of --lr."""
    weight_decay: float = 0.1
    """Weight decay of matrices (AdamW)."""
    beta1: float = 0.9
    """Decay of the mean gradient (AdamW)."""
    beta2: float = 0.95
    """Decay of the mean squared gradient (AdamW)."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    recompute: bool = False
    """Recompute NSA's compressed keys and values and branch outputs alone: less of both."""
    compile: CompileMode = "none"
    """What torch.compile sees: each block (one code for all), or model and loss as one graph."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    eval_every: int
    """Steps between validations."""
    eval_windows: int
    """Sequences in one validation."""
    save_every: int
    """Steps between checkpoints."""
    log_every: int
    """Steps between lines of metrics."""
    log_attention_every: int | None = None
    """Steps between lines on what attention reads, which warn of shut gates and of lists that no
    longer depend on the query; none by default."""
    keep: int = 2
    """Checkpoints kept."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" or (field.type == "int | None" and value is not None):
                least = 0 if field.name in ("seed", "warmup") else 1
                good = is_int(value) and value >= least
                require(good, flag(field.name), f"an int >= {least}", value)
                most = _MOST.get(field.name, 2**63 - 1)
                require(value <= most, flag(field.name), f"an int <= {most}", value)
            elif field.type in _KINDS:  # what a file holds may be of any type
                kind, value = _KINDS[field.type], getattr(self, field.name)
                require(isinstance(value, kind), flag(field.name), str(field.type), value)
        for name, expected, holds in (
            ("lr", "> 0", lambda x: x > 0),
            ("min_lr", "in [0, 1]", lambda x: 0 <= x <= 1),
            ("weight_decay", ">= 0", lambda x: x >= 0),
            ("beta1", "in [0, 1)", lambda x: 0 <= x < 1),
            ("beta2", "in [0, 1)", lambda x: 0 <= x < 1),
            ("grad_clip", "> 0", lambda x: x > 0),
        ):
            value = getattr(self, name)
            require(is_finite(value) and holds(value), flag(name), f"a number {expected}", value)
        require_known("--split", self.split, get_args(Split))
        require_known("--precision", self.precision, get_args(Precision))
        require_known("--compile", self.compile, get_args(CompileMode))

    def learning_rate(self, step: int) -> float:
        """Compute the rate of a step, counted from 0: linear warm-up, then half a cosine."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.lr * (self.min_lr + (1 - self.min_lr) * cosine)


_PACE = {
    "steps": 300,
    "warmup": 30,
    "eval_every": 100,
    "eval_windows": 128,
    "save_every": 100,
    "log_every": 10,
}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"seq_len": 256, "batch_size": 8, "lr": 3e-3, **_PACE},  # two minutes on two CPU cores
    "small": {"seq_len": 2048, "batch_size": 8, "lr": 1e-3, **_PACE},
}

_FREE = frozenset(
    {
        *("data", "device", "eval_every", "eval_windows", "save_every"),
        *("log_every", "log_attention_every", "keep"),
    }
)
"""May change when a run is resumed: none of them touches what is computed (the bytes of the data
are compared themselves)."""

_ROUNDING = frozenset({"compile"})
"""May change when a run is resumed, and changes rounding, which is then noted."""

_ADDED_LATER = {
    "compile": "none",
    "split": "files",
    "log_attention_every": None,
    "recompute": False,
}
"""Settings that older runs do not have, and what those runs did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run: the model and how it is trained.

    Raises :class:`nsa.ConfigError` when the two do not fit together.
    """

    model: ModelConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        backend = self.train.backend
        allowed = backend is None or self.model.attention != "dense"
        require(allowed, "--backend", "none with --attention dense", backend)
        every = self.train.log_attention_every
        allowed = every is None or self.model.attention != "dense"
        require(allowed, "--log-attention-every", "none with --attention dense", every)
        nsa, length = self.model.nsa, self.train.seq_len
        if nsa.select_regions is not None:  # a query must see all of a region that it ranks
            tokens = nsa.select_regions[0] * nsa.select_block
            limit = f"regions of at most --seq-len={length} tokens"
            require(tokens <= length, "--select-regions", limit, tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {"model": self.model.to_dict(), "train": asdict(self.train)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Invert :meth:`to_dict`.

        Raises:
            ConfigError: a part, a name or a value is missing, unknown or out of range.
        """
        for part in ("model", "train"):
            value = values.get(part)
            require(isinstance(value, Mapping), part, "a table of values", value)
        train = {**_ADDED_LATER, **values["train"]}
        names = {field.name for field in fields(TrainConfig)}
        for name in sorted(names ^ set(train)):
            known = "none" if name in names else "an unknown name"
            raise ConfigError(f"train: expected a value for each setting, got {known} for {name!r}")
        return cls(model=ModelConfig.from_dict(values["model"]), train=TrainConfig(**train))

    def differences(self, other: RunConfig, *, rounding: bool = False) -> list[str]:
        """List the fields that change what is computed, each as ``name mine -> other's``, or with
        ``rounding`` those that change only the last bits of it."""
        mine, theirs = self.flat(), other.flat()
        return [
            f"{name} {value} -> {theirs[name]}"
            for name, value in mine.items()
            if value != theirs[name] and name not in _FREE and (name in _ROUNDING) == rounding
        ]

    def flat(self) -> dict[str, Any]:
        """Every value by its name; no two parts share one."""
        model = self.model.to_dict()
        return {**model.pop("nsa"), **model, **asdict(self.train)}


def flag(name: str) -> str:
    """Name the command-line flag of a field."""
    return "--" + name.replace("_", "-")
