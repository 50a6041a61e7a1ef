"""The problems that ``diagnose`` and ``bench`` give the backends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from nsa.backends import Resolution, resolve
from nsa.backends.protocol import Backend, Problem
from nsa.config import NSAConfig
from nsa.settings import Settings
from nsa.testing.inputs import Inputs, make_inputs, random_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One problem, regular or packed."""

    config: NSAConfig
    device: torch.device
    dtype: torch.dtype
    lengths: tuple[int, ...]
    """Tokens of each sequence; those of a regular batch are equal."""
    packed: bool

    def __str__(self) -> str:
        return f"{self.kind} on {self.device.type}"

    @property
    def kind(self) -> str:
        """What kind of input it is, in words."""
        return f"{'packed' if self.packed else 'regular'} {short(self.dtype)}"

    @property
    def batch(self) -> int:
        """Rows of q; packed sequences share one."""
        return 1 if self.packed else len(self.lengths)

    @property
    def length(self) -> int:
        """T, the tokens of a row; of all sequences together where they are packed."""
        return sum(self.lengths) if self.packed else self.lengths[0]

    @property
    def problem(self) -> Problem:
        longest = max(self.lengths)
        return Problem(self.config, self.device, self.dtype, longest, self.packed, needs_grad=True)

    def with_length(self, length: int) -> Trial:
        """The same batch of another T.

        Packed sequences are as 1 : 2 : 3 : …, since equal ones are rare.
        """
        n = len(self.lengths)
        if not self.packed:
            return replace(self, lengths=(length,) * n)
        ends = [length * i * (i + 1) // (n * (n + 1)) for i in range(n + 1)]
        return replace(self, lengths=tuple(end - start for start, end in pairwise(ends)))

    def resolve(self, backend: str | None, settings: Settings | None = None) -> Resolution:
        """What the library decides to run each step on.

        Raises:
            BackendUnavailable: the backend cannot run this.
        """
        return resolve(**self.problem._asdict(), backend=backend, settings=settings)

    def bare_inputs(self, *, native: bool = False) -> Inputs:
        """Random inputs without a list of blocks; see :func:`nsa.testing.make_inputs`."""
        size: dict[str, Any] = {"length": self.length, "batch": self.batch}
        if self.packed:
            size = {"lengths": self.lengths}
        return make_inputs(self.config, **size, dtype=self.dtype, device=self.device, native=native)

    def inputs(self) -> Inputs:
        """The same with a list of blocks, random as well."""
        inputs = self.bare_inputs()
        return replace(inputs, block_idx=random_blocks(inputs, self.config.num_selected))


def small_trials(device: torch.device) -> list[Trial]:
    """What every backend is held to the oracle on."""
    return _trials(NSAConfig.preset("tiny"), (131, 0, 70), device)


def typical_trials(device: torch.device) -> list[Trial]:
    """What the choice among the backends is shown for."""
    return _trials(NSAConfig.preset("small"), (1024, 0, 1000, 24), device)


def _trials(config: NSAConfig, lengths: tuple[int, ...], device: torch.device) -> list[Trial]:
    """Packed sequences, and one as long as all of them, in every dtype."""
    return [
        Trial(
            config=config,
            device=device,
            dtype=dtype,
            lengths=lengths if packed else (sum(lengths),),
            packed=packed,
        )
        for dtype in _dtypes(device)
        for packed in (False, True)
    ]


def _dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """The one that models are trained in on such a device comes first."""
    if device.type == "cpu":
        return (torch.float32,)
    half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return (half, torch.float32)


def run_branch(steps: Backend, branch: str, inputs: Inputs, **options: Any) -> Any:
    """Run one step of a backend forward; ``options`` are further arguments of the step."""
    options |= {"cu_seqlens": inputs.cu_seqlens, "max_seqlen": inputs.max_seqlen}
    if branch == "select":
        q, k = inputs.q.detach(), inputs.compressed.k.detach()
        return steps.select_blocks(q, k, inputs.config, **options)
    step = getattr(steps, f"{branch}_attention")
    blocks = (inputs.block_idx,) if branch == "selected" else ()
    return step(inputs.q, *getattr(inputs, branch), *blocks, inputs.config, **options)


def short(dtype: torch.dtype) -> str:
    """As in "float32"."""
    return str(dtype).removeprefix("torch.")
