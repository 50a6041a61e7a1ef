"""What runs every step, decided outside a trace.

Inside ``torch.compile`` nothing may probe, import or log: the decision is a constant of the graph,
made while it is traced, on everything but the length, which stays symbolic.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast

import torch

from nsa.backends import Resolution, load, resolve
from nsa.backends.protocol import STEPS, Backend, Gated
from nsa.config import NSAConfig
from nsa.core.compile import keep_saved_tensors
from nsa.settings import Settings, current_settings

_F = TypeVar("_F", bound=Callable[..., Any])


def _constant_in_a_trace(function: _F) -> _F:
    """What ``torch.compiler.assume_constant_result`` does, without its import of the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Plan(NamedTuple):
    """A :class:`nsa.Resolution` in strings, and where its steps are found."""

    backend: str
    reason: str
    names: tuple[str, ...]
    """The backend of each of :data:`STEPS`."""
    keys: tuple[str, ...]
    """Of :data:`BOUND`, likewise."""

    @property
    def resolution(self) -> Resolution:
        """For people."""
        per_branch = dict(zip(STEPS, self.names, strict=True))
        return Resolution(self.backend, self.reason, MappingProxyType(per_branch))

    def step(self, name: str) -> Backend:
        """The backend that runs one of :data:`STEPS`."""
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


def plan(
    config: NSAConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    length: int,
    packed: bool,
    needs_grad: bool,
    backend: str | None,
    settings: Settings,
) -> Plan:
    """:func:`nsa.resolve`, in a trace too; the arguments and errors are the same."""
    if not torch.compiler.is_compiling():
        return Plan(*_decide(config, device, dtype, length, packed, needs_grad, backend, settings))
    # branches, not values: the comparison of a symbolic length would be no constant
    short_win = short_cmp = False
    if length < settings.fa2_min_len_win:
        short_win = True
    if length < settings.fa2_min_len_cmp:
        short_cmp = True
    return Plan(
        *_decide_by_key(
            config.key,
            device.type,
            device.index,
            dtype,
            short_win,
            short_cmp,
            packed,
            needs_grad,
            backend,
            settings.key,
        )
    )


@_constant_in_a_trace
def _decide_by_key(
    config_key: str,
    device: str,
    index: int | None,
    dtype: torch.dtype,
    short_win: bool,
    short_cmp: bool,
    packed: bool,
    needs_grad: bool,
    backend: str | None,
    settings_key: str,
) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
    """:func:`_decide` of plain values: of others a trace makes no constants."""
    keep_saved_tensors()
    settings = Settings.from_key(settings_key)
    lengths = [2**31 - 1]  # of it only what the flags ask is known
    if short_win:
        lengths.append(settings.fa2_min_len_win - 1)
    if short_cmp:
        lengths.append(settings.fa2_min_len_cmp - 1)
    return _decide(
        NSAConfig.from_key(config_key),
        torch.device(device) if index is None else torch.device(device, index),
        dtype,
        min(lengths),
        packed,
        needs_grad,
        backend,
        settings,
    )


def _decide(
    config: NSAConfig,
    device: torch.device,
    dtype: torch.dtype,
    length: int,
    packed: bool,
    needs_grad: bool,
    backend: str | None,
    settings: Settings,
) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
    resolution = resolve(
        config,
        device=device,
        dtype=dtype,
        length=length,
        packed=packed,
        needs_grad=needs_grad,
        backend=backend,
        settings=settings,
    )
    names = tuple(resolution.per_branch[step] for step in STEPS)
    keys = tuple(_bind(name, settings) for name in names)
    return resolution.backend, resolution.reason, names, keys


def _bind(name: str, settings: Settings) -> str:
    key = name
    if name.startswith("fa2-"):
        flags = settings.fa2_provider, settings.prealloc_varlen_n, settings.prealloc_varlen_k
        key = ":".join(map(str, (name, *flags)))
    if key not in BOUND:
        BOUND[key] = load(name, settings)
    return key


_SETTINGS: dict[str, Settings] = {}


def settings_in_force() -> Settings:
    """:func:`nsa.settings.current_settings`; in a trace those of the moment of tracing."""
    if torch.compiler.is_compiling():
        return _SETTINGS[_settings_key()]
    return current_settings()


@_constant_in_a_trace
def _settings_key() -> str:
    settings = current_settings()
    key = repr(settings)
    _SETTINGS[key] = settings
    return key
