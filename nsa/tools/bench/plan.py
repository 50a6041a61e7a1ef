"""What one run of ``bench`` measures, as its flags say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from nsa.config import NSAConfig
from nsa.tools.bench.cases import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that one run measures."""

    backends: tuple[str, ...]
    """Those asked for, which must run; empty: all that can, except the oracle."""
    branches: tuple[str, ...]
    passes: tuple[str, ...]
    dense: bool
    """Whether dense causal attention is measured as well."""
    lengths: tuple[int, ...]
    configs: tuple[NSAConfig, ...]
    dtypes: tuple[torch.dtype, ...]
    batch: int
    sequences: int
    """Packed sequences of a batch; 0: regular."""
    device: torch.device
    provider: str | None
    """Where FA-2 comes from; None leaves that to the settings."""
    seconds: float
    runs: int
    jsonl: Path | None
    plot: Path | None
    find_min_len: bool

    def shapes(self) -> Iterator[Shape]:
        """Every problem, those of one table after each other."""
        for dtype in self.dtypes:
            for config in self.configs:
                for length in self.lengths:
                    yield Shape(
                        config=config,
                        device=self.device,
                        dtype=dtype,
                        length=length,
                        batch=self.batch,
                        sequences=self.sequences,
                    )
