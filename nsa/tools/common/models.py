"""The model of a checkpoint, for tools that run it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from nsa.errors import ConfigError
from nsa.models import LanguageModel
from nsa.training.checkpoint import load_checkpoint
from nsa.training.config import RunConfig
from nsa.training.memory import require_memory_to_load
from nsa.training.trainer import config_of, load_model


class Trained(NamedTuple):
    """A model as it was trained."""

    model: LanguageModel
    """In evaluation mode."""
    config: RunConfig
    path: Path
    """The checkpoint's folder."""
    step: int


def load_trained(path: Path, backend: str | None, device: torch.device) -> Trained:
    """Load the model of a run's folder or of one of its checkpoints.

    Raises:
        CheckpointError: there is none, or it is damaged or of another kind.
        ConfigError: a backend for a dense model.
    """
    checkpoint = load_checkpoint(path, ("model",))
    config = config_of(checkpoint)
    if config.model.attention == "dense" and backend is not None:
        raise ConfigError(f"--backend: expected none for a dense model, got {backend!r}")
    require_memory_to_load(config.model)
    model = LanguageModel(config.model, backend=backend, device=device)
    load_model(model, checkpoint)
    return Trained(model.eval(), config, checkpoint.path, checkpoint.step)
