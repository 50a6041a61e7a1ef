"""What runs here: the backend of every branch, and whose FlashAttention-2 that is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nsa.backends import Resolution, resolve
from nsa.backends.dispatch import delegated
from nsa.backends.fa2.providers import describe
from nsa.errors import BackendUnavailable
from nsa.settings import Settings
from nsa.tools.common.problems import Trial, short


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchChoice:
    """What runs one branch."""

    branch: str
    backend: str
    fa2: bool
    """Whether FlashAttention-2's kernels are to compute it."""
    provider: str | None
    """FA-2's provider and its version; None for other backends."""
    why: str
    """Why the backend chosen leaves the branch to this one; else empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What runs one kind of input."""

    kind: str
    packed: bool
    dtype: str
    length: int
    """Tokens of the longest sequence."""
    backend: str | None
    """None: it is refused."""
    reason: str
    """Why this backend, or why none."""
    branches: tuple[BranchChoice, ...]


def choose(trial: Trial, backend: str | None, settings: Settings) -> Choice:
    """What a call runs, or the refusal."""
    refused = Choice(
        kind=trial.kind,
        packed=trial.packed,
        dtype=short(trial.dtype),
        length=trial.problem.length,
        backend=None,
        reason="",
        branches=(),
    )
    try:
        resolution = resolved(trial, backend)
    except BackendUnavailable as error:
        return replace(refused, reason=str(error))
    return replace(
        refused,
        backend=resolution.backend,
        reason=resolution.reason,
        branches=_branches(resolution, trial, settings),
    )


def resolved(trial: Trial, backend: str | None) -> Resolution:
    """What the library decides for a trial; raises as it does."""
    problem = trial.problem
    return resolve(
        problem.config,
        device=problem.device,
        dtype=problem.dtype,
        length=problem.length,
        packed=problem.packed,
        needs_grad=problem.needs_grad,
        backend=backend,
    )


def _branches(resolution: Resolution, trial: Trial, settings: Settings) -> tuple[BranchChoice, ...]:
    left = delegated(resolution.backend, trial.problem, settings)
    if resolution.backend.startswith("fa2-"):
        left = {"select": "FA-2 has no such step", **left}
    found = []
    for branch, backend in resolution.per_branch.items():
        fa2 = backend.startswith("fa2-")
        found.append(
            BranchChoice(
                branch=branch,
                backend=backend,
                fa2=fa2 and settings.fa2_provider != "math",
                provider=describe(settings.fa2_provider, trial.device) if fa2 else None,
                why=left[branch] if backend != resolution.backend else "",
            )
        )
    return tuple(found)
