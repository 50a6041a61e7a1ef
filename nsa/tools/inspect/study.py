"""Everything that ``inspect`` finds out about a checkpoint on a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.errors import ConfigError, DataError, require
from nsa.inspection import (
    KNOCK_OUTS,
    AttentionReport,
    Recording,
    complaints,
    knock_outs,
    layer_reports,
    record,
)
from nsa.tools.common.models import Trained
from nsa.training.data import SEPARATOR

_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionLoss:
    """The loss of the bytes at positions ``start`` to ``end``, the last left out."""

    start: int
    end: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What ``--json`` writes; losses are nats per byte."""

    checkpoint: str
    step: int
    text: str
    device: str
    backend: str
    """What ran, and why."""
    model: dict[str, Any]
    """Its configuration."""
    loss: float
    loss_by_position: tuple[PositionLoss, ...]
    knock_outs: dict[str, float] | None
    """The loss by what was done to the model; "none" is the model as it is."""
    attention: AttentionReport
    complaints: tuple[str, ...]
    """What is likely to have gone wrong in training."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold, numbers to five digits."""
        return _rounded(asdict(self))


def require_nsa(trained: Trained) -> None:
    """Refuse a model that has nothing to look at.

    Raises:
        ConfigError: dense attention, or tokens that are no bytes.
    """
    model = trained.config.model
    if model.attention != "nsa":
        raise ConfigError(
            f"{trained.path}: expected a model with attention='nsa', got attention="
            f"{model.attention!r}, which reads everything; inspect shows what NSA selects"
        )
    require(model.vocab_size >= _BYTES, "vocab_size", "at least 256, bytes", model.vocab_size)


def read_sequences(
    path: Path, trained: Trained, *, length: int | None, sequences: int
) -> list[tuple[Tensor, Tensor]]:
    """Cut sequences from a text: tokens and the bytes that follow them, int64 ``[1, T]`` each.

    Args:
        length: T; None is the length that the model was trained on. A shorter text is one sequence.
        sequences: how many at most, end to end from the beginning of the text.

    Raises:
        DataError: the text cannot be read, or has less than one selection block.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"--text: cannot read {path}: {error.strerror}") from error
    if not data:
        raise DataError(f"--text: expected text in {path}, got an empty file")
    block = trained.config.model.nsa.select_block
    length = trained.config.train.seq_len if length is None else length
    length = min(length, len(data))
    if length < block:
        what = "--length" if len(data) >= block else "--text"
        raise DataError(
            f"{what}: expected at least one selection block, {block} bytes (select_block), got "
            f"{length} of {path}"
        )
    bytes_ = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).astype(np.int64))
    found = []
    for start in range(0, min(sequences, len(data) // length) * length, length):
        targets = bytes_[start : start + length]
        tokens = torch.cat([torch.tensor([SEPARATOR[0]]), targets[:-1]])
        found.append((tokens[None], targets[None]))
    return found


class Examiner:
    """Runs a model on sequences, step by step, so that progress can be shown.

    Args:
        trained: the model.
        sequences: from :func:`read_sequences`.
        text: where they are from.
        with_knock_outs: whether to measure those.
        seed: of the random lists.
    """

    def __init__(
        self,
        trained: Trained,
        sequences: list[tuple[Tensor, Tensor]],
        text: Path,
        *,
        with_knock_outs: bool = True,
        seed: int = 0,
    ) -> None:
        self.trained, self.sequences, self.text = trained, sequences, text
        self.with_knock_outs, self.seed = with_knock_outs, seed
        self.device = next(trained.model.parameters()).device
        self.recording = Recording()
        layers = trained.config.model.num_layers
        self.steps = 1 + layers + (len(KNOCK_OUTS) if with_knock_outs else 0)
        """How often ``step`` is called."""

    @torch.no_grad()
    def study(self, step: Callable[[str], None]) -> Study:
        """Run everything; ``step`` is told what has been done."""
        model = self.trained.model
        with record(model) as self.recording:
            losses = torch.stack(list(self._losses())).mean(0)
        step("forward")
        layers = []
        for layer in layer_reports(self.recording):
            layers.append(layer)
            step(layer.layer)
        found: dict[str, float] | None = None
        if self.with_knock_outs:
            found = {}
            for name, loss in knock_outs(model, self._loss, seed=self.seed):
                found[name] = loss
                step(name)
        lengths = tuple(tokens.shape[1] for tokens, _ in self.sequences)
        return Study(
            checkpoint=str(self.trained.path),
            step=self.trained.step,
            text=str(self.text),
            device=str(self.device),
            backend=str(model.resolution),
            model=self.trained.config.model.to_dict(),
            loss=losses.mean().item(),
            loss_by_position=loss_by_position(losses),
            knock_outs=found,
            attention=AttentionReport(sequences=lengths, layers=tuple(layers)),
            complaints=tuple(complaints([layer.brief() for layer in layers])),
        )

    def _loss(self) -> float:
        return torch.stack(list(self._losses())).mean().item()

    def _losses(self) -> Iterator[Tensor]:
        """Yield the loss of every byte of a sequence, ``[T]`` in fp32."""
        half = self.device.type == "cuda" and self.trained.config.train.precision == "bf16"
        for tokens, targets in self.sequences:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                logits = self.trained.model(tokens.to(self.device))
            yield F.cross_entropy(logits[0].float(), targets[0].to(self.device), reduction="none")


def loss_by_position(losses: Tensor) -> tuple[PositionLoss, ...]:
    """Average a loss ``[T]`` over positions 0, 1, 2-3, 4-7 … in bins that double."""
    ends = [0, *(2**i for i in range(math.ceil(math.log2(len(losses))))), len(losses)]
    return tuple(
        PositionLoss(start=start, end=end, loss=losses[start:end].mean().item())
        for start, end in pairwise(ends)
    )


def save_lists(path: Path, recording: Recording) -> None:
    """Write every block list to an ``.npz`` file: an int32 array ``[B, T, K, n]`` by layer, the
    sequences along B."""
    arrays: dict[str, Any] = {
        layer: torch.cat([call.block_idx for call in recording.of(layer)]).cpu().numpy()
        for layer in recording.layers
    }
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {str(key): _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value
