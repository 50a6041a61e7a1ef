"""Which backend runs a problem, decided once per call, inside a trace as well.

A backend requested by name runs or raises :class:`nsa.BackendUnavailable`; only ``auto`` chooses,
and it logs its choice with the reason once. Steps that a backend delegates are looked up here too:
backends do not import each other.

Inside ``torch.compile`` nothing may probe, import or log: the decision is a constant of the graph,
made while it is traced, on everything but the length, which stays symbolic.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Hashable, Mapping
from functools import cache, lru_cache
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple, TypeVar, cast

import torch

from nsa import registry
from nsa.backends.fa2 import providers as fa2_providers
from nsa.backends.protocol import STEPS, Backend, Decoder, Gated, Problem
from nsa.config import NSAConfig
from nsa.core.validate import as_device, check_config
from nsa.errors import BackendUnavailable, SettingsError, is_int, require, require_known
from nsa.registry import TABLE
from nsa.settings import LENGTH_FLAGS, Settings, current_settings

_LOG = logging.getLogger("nsa")
_UNBOUNDED = 2**31 - 1
_F = TypeVar("_F", bound=Callable[..., Any])


class Resolution(NamedTuple):
    """What runs a problem, and why."""

    backend: str
    reason: str
    steps: tuple[str, ...]
    """The backend of each of :data:`nsa.backends.protocol.STEPS`."""
    keys: tuple[str, ...]
    """Of :data:`BOUND`, likewise."""

    @property
    def per_branch(self) -> Mapping[str, str]:
        """Backend of each step: "compressed", "select", "selected", "window"."""
        return MappingProxyType(dict(zip(STEPS, self.steps, strict=True)))

    def __str__(self) -> str:
        return f"{self.backend} ({self.reason})"

    def step(self, name: str) -> Backend:
        """The steps of the backend that runs one of :data:`nsa.backends.protocol.STEPS`."""
        return BOUND[self.keys[STEPS.index(name)]]

    def gated(self) -> Gated | None:
        """The backend that runs every branch, if it has a way to do so at once."""
        keys = {self.keys[STEPS.index(name)] for name in ("compressed", "selected", "window")}
        if len(keys) > 1:
            return None
        backend = BOUND[keys.pop()]
        return cast(Gated, backend) if hasattr(backend, "gated_attention") else None


BOUND: dict[str, Backend] = {}
"""Backends bound to settings. A trace looks them up here; it cannot hold them as constants."""


def load(name: str, settings: Settings | None = None) -> Backend:
    """The steps of a backend of the table, under the settings given or those in force.

    A row that does not select has no ``select_blocks``: :attr:`Resolution.per_branch` says what
    selects.
    """
    module = _module(name)
    bind = getattr(module, "bind", None)
    if bind is None:
        return cast(Backend, module)
    return cast(Backend, bind(current_settings() if settings is None else settings))


def _module(name: str) -> ModuleType:
    return importlib.import_module(TABLE[name].module)


def unavailable(name: str, problem: Problem, settings: Settings | None = None) -> str | None:
    """Why the backend cannot run the problem, or None if it can."""
    if problem.packed and not TABLE[name].packed:
        return f"{name} takes regular batches, got cu_seqlens: use {_packed_twin(name)}"
    if problem.sharded and not TABLE[name].shards:
        return f"{name} takes whole sequences, got the shards of context_parallel"
    check = getattr(_module(name), "unavailable", None)
    settings = current_settings() if settings is None else settings
    return None if check is None else check(problem, settings)


def _packed_twin(name: str) -> str:
    return registry.fa2_backend(packed=True) if TABLE[name].fa2 else "sdpa"


def decoding(
    chosen: Resolution, problem: Problem, *, e4m3: bool
) -> tuple[Resolution, Decoder | None]:
    """What runs a step of decode: the backend itself, or ``sdpa`` where it has no way to, which the
    reason then says.

    None with the oracle, which runs its steps on keys and values gathered from the cache.
    ``e4m3``: whether selected keys and values are kept so.
    """
    if chosen.backend == "reference":
        return chosen, None
    why_not = no_decode(chosen.backend, problem, e4m3=e4m3)
    if why_not is None:
        return chosen, cast(Decoder, load(chosen.backend))
    reason = f"{chosen.reason}; decode on sdpa: {why_not}"
    return chosen._replace(reason=reason), cast(Decoder, load("sdpa"))


def no_decode(name: str, problem: Problem, *, e4m3: bool = False) -> str | None:
    """Why a backend that can run a problem runs no step of decode of it, or None if it does."""
    if not TABLE[name].decodes:
        return f"{name} has none"
    check = getattr(_module(name), "decode_unavailable", None)
    return None if check is None else check(problem, e4m3=e4m3)


def delegated(name: str, problem: Problem, settings: Settings) -> dict[str, str]:
    """The steps that a backend leaves to ``sdpa`` here, and why."""
    found = getattr(_module(name), "delegated", None)
    return {} if found is None else found(problem, settings)


def resolve(
    config: NSAConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    length: int,
    packed: bool,
    needs_grad: bool,
    sharded: bool = False,
    backend: str | None = None,
    settings: Settings | None = None,
) -> Resolution:
    """Decide which backend runs a problem.

    Args:
        config: what to compute.
        device, dtype: of q.
        length: T of a regular batch, the longest sequence of a packed one, in tokens.
        packed: whether ``cu_seqlens`` is given.
        needs_grad: whether a backward pass may follow.
        sharded: whether it is called under :func:`nsa.distributed.context_parallel`.
        backend: a name, which beats the environment; None obeys ``NSA_BACKEND`` and
            ``NSA_USE_FA2``.
        settings: the settings in force; None takes the current ones.

    Raises:
        BackendUnavailable: the backend requested cannot run this problem.
        SettingsError: there is no backend of that name, or the environment is wrong.
        ConfigError: an argument that is none.
    """
    settings = current_settings() if settings is None else settings
    check_config(config)
    require(isinstance(dtype, torch.dtype), "dtype", "a dtype of torch", dtype)
    require(is_int(length) and length >= 0, "length", "an int >= 0", length)
    require(isinstance(packed, bool), "packed", "True or False", packed)
    require(isinstance(needs_grad, bool), "needs_grad", "True or False", needs_grad)
    require(isinstance(sharded, bool), "sharded", "True or False", sharded)
    require(isinstance(settings, Settings), "settings", "Settings", settings)
    _check_name(backend)
    where = as_device(device)
    problem = Problem(config, where, dtype, length, packed, needs_grad, sharded)
    return _resolve(problem, backend, settings, _process_state())


def plan(problem: Problem, backend: str | None, settings: Settings) -> Resolution:
    """:func:`resolve`, ready to run and in a trace too; the errors are the same."""
    _check_name(backend)
    if not torch.compiler.is_compiling():
        return _plan(problem, backend, settings)
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    # branches, not values: the comparison of a symbolic length would be no constant
    known = _UNBOUNDED
    for flag in LENGTH_FLAGS:
        least = getattr(settings, flag)
        if guard_or_false(problem.length < least):  # a length without a hint is long
            known = min(known, least - 1)
    device = problem.device
    return Resolution(
        *_plan_by_key(
            problem.config.key,
            device.type,
            device.index,
            problem.dtype,
            known,
            problem.packed,
            problem.needs_grad,
            problem.sharded,
            backend,
            settings.key,
        )
    )


def _constant_in_a_trace(function: _F) -> _F:
    """What ``torch.compiler.assume_constant_result`` does, without its import of the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_in_a_trace
def _plan_by_key(
    config_key: str,
    device: str,
    index: int | None,
    dtype: torch.dtype,
    length: int,
    packed: bool,
    needs_grad: bool,
    sharded: bool,
    backend: str | None,
    settings_key: str,
) -> tuple[Any, ...]:
    """:func:`_plan` of strings and numbers: of other objects a trace makes no constants."""
    where = torch.device(device) if index is None else torch.device(device, index)
    config, settings = NSAConfig.from_key(config_key), Settings.from_key(settings_key)
    problem = Problem(config, where, dtype, length, packed, needs_grad, sharded)
    return tuple(_plan(problem, backend, settings))


def _plan(problem: Problem, backend: str | None, settings: Settings) -> Resolution:
    found = _resolve(problem, backend, settings, _process_state())
    for name, key in zip(found.steps, found.keys, strict=True):
        if key not in BOUND:
            BOUND[key] = load(name, settings)
    return found


def _process_state() -> Hashable:
    """What else decides, and a program may change at any time; torch guards its graphs by the
    second and third."""
    return (
        fa2_providers.active_impl(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


@lru_cache(maxsize=1024)
def _resolve(
    problem: Problem, backend: str | None, settings: Settings, process_state: Hashable
) -> Resolution:
    """``process_state`` is a part of the key: whoever changes it gets another answer."""
    name, source = _requested(problem, backend, settings)
    if name != "auto":
        why_not = unavailable(name, problem, settings)
        if why_not is not None:
            others = [row for row in TABLE if unavailable(row, problem, settings) is None]
            raise BackendUnavailable(
                f"{source} asks for {name}, which cannot run this: {why_not}; "
                f"backends that can: {', '.join(others)}"
            )
        return _resolution(name, source, problem, settings)
    skipped = []
    for candidate in registry.ranked(problem.device.type):
        if TABLE[candidate].fa2 and settings.use_fa2 is False:
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


def _check_name(backend: object) -> None:
    """What is no name need not have a hash."""
    if backend is not None and not isinstance(backend, str):
        require_known("backend", backend, registry.names(), SettingsError)


def _requested(problem: Problem, backend: str | None, settings: Settings) -> tuple[str, str]:
    """The name requested, and what requests it."""
    if backend is not None:
        require_known("backend", backend, registry.names(), SettingsError)
        return backend, f"backend={backend!r}"
    if settings.backend == "auto" and settings.use_fa2:
        return registry.fa2_backend(packed=problem.packed), "NSA_USE_FA2=1"
    return settings.backend, f"NSA_BACKEND={settings.backend}"


def _resolution(name: str, reason: str, problem: Problem, settings: Settings) -> Resolution:
    """The backend of every step; the reason says why some are delegated."""
    steps = dict.fromkeys(STEPS, name)
    if not TABLE[name].selects:
        steps["select"] = next(
            other
            for other in registry.ranked(problem.device.type)
            if TABLE[other].selects and unavailable(other, problem, settings) is None
        )
    for step, why in delegated(name, problem, settings).items():
        steps[step] = "sdpa"
        reason += f"; {step} on sdpa: {why}"
    chosen = tuple(steps[step] for step in STEPS)
    return Resolution(name, reason, chosen, tuple(_key(step, settings) for step in chosen))


def _key(name: str, settings: Settings) -> str:
    """Where :data:`BOUND` keeps a backend: its name and the settings that its steps depend on."""
    return repr((name, *(getattr(settings, field) for field in TABLE[name].settings)))


@cache
def _log_once(name: str, reason: str) -> None:
    _LOG.info("backend %s: %s", name, reason)


_SETTINGS: dict[str, Settings] = {}


def settings_in_force() -> Settings:
    """:func:`nsa.settings.current_settings`; in a trace those of the moment of tracing."""
    if torch.compiler.is_compiling():
        return _SETTINGS[_settings_key()]
    return current_settings()


@_constant_in_a_trace
def _settings_key() -> str:
    settings = current_settings()
    _SETTINGS[settings.key] = settings
    return settings.key
