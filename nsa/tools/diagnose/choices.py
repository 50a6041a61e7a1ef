"""The backend of every branch under the settings in force, and whose FlashAttention-2 it is."""

from __future__ import annotations

from dataclasses import dataclass

from nsa.backends import Resolution
from nsa.backends.dispatch import delegated
from nsa.backends.fa2.providers import describe
from nsa.errors import BackendUnavailable
from nsa.registry import TABLE
from nsa.settings import Settings
from nsa.tools.common.problems import Trial, short


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchChoice:
    """The backend of one branch."""

    branch: str
    backend: str
    fa2: bool
    """Whether FlashAttention-2's kernels are to compute it."""
    provider: str | None
    """FA-2's provider and its version; None for other backends."""
    why: str
    """Why the backend chosen delegates the branch to this one; else empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The backends of one kind of input."""

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
    """Decide as a call of the library would; a refusal is a choice without a backend."""
    name = None
    branches: tuple[BranchChoice, ...] = ()
    try:
        resolution = trial.resolve(backend, settings)
        name, reason = resolution.backend, resolution.reason
        branches = _branches(resolution, trial, settings)
    except BackendUnavailable as error:
        reason = str(error)
    return Choice(
        kind=trial.kind,
        packed=trial.packed,
        dtype=short(trial.dtype),
        length=trial.problem.length,
        backend=name,
        reason=reason,
        branches=branches,
    )


def _branches(resolution: Resolution, trial: Trial, settings: Settings) -> tuple[BranchChoice, ...]:
    reasons = delegated(resolution.backend, trial.problem, settings)
    if not TABLE[resolution.backend].selects:
        reasons = {"select": "FA-2 has no such step", **reasons}
    provider = settings.fa2_provider
    return tuple(
        BranchChoice(
            branch=branch,
            backend=backend,
            fa2=TABLE[backend].fa2 and provider != "math",
            provider=describe(provider, trial.device) if TABLE[backend].fa2 else None,
            why=reasons[branch] if backend != resolution.backend else "",
        )
        for branch, backend in resolution.per_branch.items()
    )
