"""The table of backends, and the choice among them.

A backend asked for by name runs or raises :class:`nsa.BackendUnavailable`; only ``auto`` chooses,
and it logs its choice with the reason once. Branches of an FA-2 backend that a flag sends to
``sdpa`` are looked up here as well: backends do not import each other.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from types import MappingProxyType, ModuleType
from typing import Any, cast

import torch

from nsa.backends.fa2 import providers as fa2_providers
from nsa.backends.protocol import STEPS, Backend, Problem
from nsa.config import NSAConfig, nearest
from nsa.errors import BackendUnavailable, SettingsError
from nsa.settings import BACKENDS, Settings, current_settings

_LOG = logging.getLogger("nsa")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One backend of the table."""

    module: str | None
    """Where its steps are, imported when first used; None while it is not written."""
    summary: str


TABLE: Mapping[str, Row] = MappingProxyType(
    {
        "reference": Row(
            module="nsa.reference",
            summary="the oracle: dense masks, explicit softmax, quadratic",
        ),
        "sdpa": Row(
            module="nsa.backends.sdpa.steps",
            summary="pure PyTorch, vectorised and chunked, memory linear in T",
        ),
        "fa2-dense": Row(
            module="nsa.backends.fa2.dense",
            summary="FlashAttention-2 on regular batches",
        ),
        "fa2-varlen": Row(
            module="nsa.backends.fa2.varlen",
            summary="FlashAttention-2 on packed sequences",
        ),
        "compiled": Row(
            module="nsa.backends.compiled.steps",
            summary="Triton kernels, and torch.compile around them",
        ),
    }
)

# what ``auto`` may choose, the best first; never the oracle
_AUTO_ORDER = {
    "cuda": ("compiled", "fa2-dense", "fa2-varlen", "sdpa"),
    "cpu": ("sdpa",),
}


@dataclass(frozen=True, slots=True)
class Resolution:
    """What runs a problem, and why."""

    backend: str
    reason: str
    per_branch: Mapping[str, str]
    """Backend of each step: "compressed", "select", "selected", "window"."""

    def __str__(self) -> str:
        return f"{self.backend} ({self.reason})"

    def __reduce__(self) -> tuple[Any, ...]:
        # a read-only mapping cannot be pickled, and a layer that is copied takes this along
        return _restore, (self.backend, self.reason, dict(self.per_branch))


def _restore(backend: str, reason: str, per_branch: dict[str, str]) -> Resolution:
    return Resolution(backend, reason, MappingProxyType(per_branch))


def load(name: str, settings: Settings | None = None) -> Backend:
    """The steps of a backend of the table, under the settings given or those in force.

    An FA-2 backend has no ``select_blocks``: :attr:`Resolution.per_branch` says what selects.
    """
    module = _module(name)
    bind = getattr(module, "bind", None)
    if bind is None:
        return cast(Backend, module)
    return cast(Backend, bind(current_settings() if settings is None else settings))


def _module(name: str) -> ModuleType:
    module = TABLE[name].module
    assert module is not None, f"{name} has no module"
    return importlib.import_module(module)


def unavailable(name: str, problem: Problem, settings: Settings | None = None) -> str | None:
    """Why the backend cannot run the problem, or None if it can."""
    row = TABLE[name]
    if row.module is None:
        return f"{name} is not part of this version of nsa yet"
    check = getattr(_module(name), "unavailable", None)
    settings = current_settings() if settings is None else settings
    return None if check is None else check(problem, settings)


def resolve(
    config: NSAConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    length: int,
    packed: bool,
    needs_grad: bool,
    backend: str | None = None,
    settings: Settings | None = None,
) -> Resolution:
    """Decides which backend runs a problem.

    Args:
        config: what to compute.
        device, dtype: of q.
        length: T of a regular batch, the longest sequence of a packed one, in tokens.
        packed: whether ``cu_seqlens`` is given.
        needs_grad: whether a backward pass may follow.
        backend: a name, which beats the environment; None obeys ``NSA_BACKEND`` and
            ``NSA_USE_FA2``.
        settings: the settings in force; None takes the current ones.

    Raises:
        BackendUnavailable: the backend asked for cannot run this problem.
        SettingsError: there is no backend of that name, or the environment is wrong.
    """
    settings = current_settings() if settings is None else settings
    problem = Problem(
        config=config,
        device=torch.device(device),
        dtype=dtype,
        length=length,
        packed=packed,
        needs_grad=needs_grad,
    )
    return _resolve(problem, backend, settings, fa2_providers.active_impl())


@lru_cache(maxsize=1024)
def _resolve(
    problem: Problem, backend: str | None, settings: Settings, active_impl: str | None
) -> Resolution:
    """``active_impl`` is a part of the key: whoever activates another gets another answer."""
    name, asked = _requested(problem, backend, settings)
    if name != "auto":
        why_not = unavailable(name, problem, settings)
        if why_not is not None:
            others = [row for row in TABLE if unavailable(row, problem, settings) is None]
            raise BackendUnavailable(
                f"{asked} asks for {name}, which cannot run this: {why_not}; "
                f"backends that can: {', '.join(others)}"
            )
        return _resolution(name, asked, problem, settings)
    skipped = []
    order = _AUTO_ORDER.get(problem.device.type, ("sdpa",))
    for candidate in order:
        if candidate.startswith("fa2-") and settings.use_fa2 is False:
            skipped.append(f"{candidate}: NSA_USE_FA2=0")
            continue
        why_not = unavailable(candidate, problem, settings)
        if why_not is None:
            reason = f"auto on {problem.device.type}"
            if skipped:
                reason += f"; {'; '.join(skipped)}"
            _log_once(candidate, reason)
            return _resolution(candidate, reason, problem, settings)
        skipped.append(why_not)
    raise BackendUnavailable(f"auto found no backend: {'; '.join(skipped)}")


def _requested(problem: Problem, backend: str | None, settings: Settings) -> tuple[str, str]:
    """The name asked for, and who asks."""
    if backend is not None:
        if backend not in BACKENDS:
            raise SettingsError(
                f"backend: expected one of the known names, got {backend!r}; "
                f"{nearest(backend, BACKENDS)}"
            )
        if backend != "auto":
            return backend, f"backend={backend!r}"
        return backend, "backend='auto'"
    if settings.backend != "auto":
        return settings.backend, f"NSA_BACKEND={settings.backend}"
    if settings.use_fa2:
        return ("fa2-varlen" if problem.packed else "fa2-dense"), "NSA_USE_FA2=1"
    return "auto", "auto"


def _resolution(name: str, reason: str, problem: Problem, settings: Settings) -> Resolution:
    """The backend of every step; some leave a branch to ``sdpa``, and the reason says why."""
    steps = dict.fromkeys(STEPS, name)
    if name.startswith("fa2-"):  # which selects nothing itself
        kernel = (
            problem.device.type == "cuda" and unavailable("compiled", problem, settings) is None
        )
        steps["select"] = "compiled" if kernel else "sdpa"
    for branch, why in left_by(name, problem, settings).items():
        steps[branch] = "sdpa"
        reason += f"; {branch} on sdpa: {why}"
    return Resolution(name, reason, MappingProxyType(steps))


def left_by(name: str, problem: Problem, settings: Settings) -> dict[str, str]:
    """The branches that a backend leaves to ``sdpa`` here, and why."""
    if name.startswith("fa2-"):
        return left_to_sdpa(problem, settings)
    left = getattr(_module(name), "left_to_sdpa", None)
    return {} if left is None else left(problem, settings)


def left_to_sdpa(problem: Problem, settings: Settings) -> dict[str, str]:
    """The branches that an FA-2 backend leaves to ``sdpa``, and the flag that says so."""
    found = {}
    branches = (
        ("window", "WIN", settings.use_fa2_win, settings.fa2_min_len_win),
        ("compressed", "CMP", settings.use_fa2_cmp, settings.fa2_min_len_cmp),
    )
    for branch, flag, use, least in branches:
        if use is False:
            found[branch] = f"NSA_USE_FA2_{flag}=0"
        elif use is None and problem.length < least:
            found[branch] = f"shorter than NSA_FA2_MIN_LEN_{flag}={least}"
    return found


@cache
def _log_once(name: str, reason: str) -> None:
    _LOG.info("backend %s: %s", name, reason)
