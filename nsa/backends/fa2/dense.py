"""The ``fa2-dense`` backend: FlashAttention-2 on regular ``[B, T]`` batches."""

from __future__ import annotations

from nsa.backends.fa2.op import why_not
from nsa.backends.fa2.steps import Steps
from nsa.backends.protocol import Problem
from nsa.settings import Settings


def unavailable(problem: Problem, settings: Settings) -> str | None:
    """Why this backend cannot run the problem, or None."""
    if problem.packed:
        return "fa2-dense takes regular batches, got cu_seqlens: use fa2-varlen"
    return why_not(problem, settings)


def bind(settings: Settings) -> Steps:
    """The steps, on the provider that the settings name."""
    return Steps(settings.fa2_provider)
