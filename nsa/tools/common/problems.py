"""The problems that ``diagnose`` asks the backends to run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nsa.backends.protocol import Problem
from nsa.config import NSAConfig
from nsa.testing.inputs import Inputs, make_inputs, random_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One problem, regular or packed."""

    config: NSAConfig
    lengths: tuple[int, ...]
    """Tokens of the packed sequences; their sum is the regular batch's length."""
    device: torch.device
    dtype: torch.dtype
    packed: bool

    def __str__(self) -> str:
        return f"{self.kind} on {self.device.type}"

    @property
    def kind(self) -> str:
        """What kind of input it is, in words."""
        return f"{'packed' if self.packed else 'regular'} {short(self.dtype)}"

    @property
    def problem(self) -> Problem:
        return Problem(
            config=self.config,
            device=self.device,
            dtype=self.dtype,
            length=max(self.lengths) if self.packed else sum(self.lengths),
            packed=self.packed,
            needs_grad=True,
        )

    def inputs(self) -> Inputs:
        """Random inputs of the problem, with a list of blocks."""
        inputs = make_inputs(
            self.config,
            length=None if self.packed else sum(self.lengths),
            lengths=self.lengths if self.packed else None,
            dtype=self.dtype,
            device=self.device,
        )
        return replace(inputs, block_idx=random_blocks(inputs, self.config.num_selected))


def small_trials(device: torch.device) -> list[Trial]:
    """What every backend is held to the oracle on."""
    return _trials(NSAConfig.preset("tiny"), (131, 0, 70), device)


def typical_trials(device: torch.device) -> list[Trial]:
    """What the choice among the backends is shown for."""
    return _trials(NSAConfig.preset("small"), (1024, 0, 1000, 24), device)


def _trials(config: NSAConfig, lengths: tuple[int, ...], device: torch.device) -> list[Trial]:
    return [
        Trial(config=config, lengths=lengths, device=device, dtype=dtype, packed=packed)
        for dtype in _dtypes(device)
        for packed in (False, True)
    ]


def _dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """The one that models are trained in on such a device comes first."""
    if device.type == "cpu":
        return (torch.float32,)
    half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return (half, torch.float32)


def short(dtype: torch.dtype) -> str:
    """As in "float32"."""
    return str(dtype).removeprefix("torch.")
