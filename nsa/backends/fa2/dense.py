"""The ``fa2-dense`` backend: FlashAttention-2 on regular ``[B, T]`` batches."""

from __future__ import annotations

from nsa.backends.fa2.flags import delegated, unavailable
from nsa.backends.fa2.steps import Steps
from nsa.settings import Settings

__all__ = ["bind", "delegated", "unavailable"]


def bind(settings: Settings) -> Steps:
    """The steps, on the provider that the settings name."""
    return Steps(settings.fa2_provider)
