"""What to set on this machine for a length, as lines to paste into a shell: ``--recommend``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import fields
from typing import NamedTuple

import torch

from nsa.backends import unavailable
from nsa.backends.protocol import Problem
from nsa.config import PRESETS, NSAConfig
from nsa.errors import UsageError
from nsa.memory import layer_memory
from nsa.settings import Settings, use_settings
from nsa.tools.common.cli import choose_device
from nsa.tools.common.machine import ALLOCATOR_VARIABLES, GIB, Machine
from nsa.tools.diagnose.measured import gain_of

DEFAULT_LENGTH = {"cpu": 2048, "cuda": 8192}
SHORT, LONG = 4096, 65536
"""Up to and from which length the presets "short" and "long" are for."""
WIDTH = 80
"""Columns that comments keep to; commands are left whole."""


class Line(NamedTuple):
    """One line for the shell."""

    command: str
    """Empty: a comment alone."""
    comment: str

    def __str__(self) -> str:
        """The comment beside the command, or above it where that would be too wide."""
        text = f"{self.command}  # {self.comment}" if self.command else f"# {self.comment}"
        if len(text) <= WIDTH:
            return text
        above = textwrap.wrap(self.comment, WIDTH - 2, break_on_hyphens=False)
        return "\n".join([*(f"# {line}" for line in above), *([self.command] * bool(self.command))])


def recommend(machine: Machine, device_name: str, length: int | None) -> list[Line]:
    """Choose a preset, its environment and commands that use it.

    Raises:
        UsageError: a length that is none.
        ConfigError: there is no such device here.
    """
    device = choose_device("cpu" if device_name == "auto" and not machine.gpus else device_name)
    if length is None:
        length = DEFAULT_LENGTH[device.type]
    if length < 1:
        raise UsageError(f"--length: expected an int >= 1, got {length}")
    return list(_lines(machine, device, length))


def _lines(machine: Machine, device: torch.device, T: int) -> Iterator[Line]:
    cuda = device.type == "cuda"
    name = machine.gpus[device.index or 0].name if cuda else machine.cpu
    preset = preset_for(device, T)
    config = NSAConfig.preset(preset) if preset else NSAConfig()
    # as with nothing set: what is set now is what the lines are to replace
    dtype = torch.bfloat16 if cuda else torch.float32
    problem = Problem(config, device, dtype, T, packed=False, needs_grad=True)
    with use_settings(Settings()):
        refusal = unavailable("compiled", problem) if cuda else None
    backend = "compiled" if cuda and refusal is None else "sdpa"
    yield Line("", f"{name}, sequences of {T} tokens, torch {machine.torch}")
    if refusal is not None:
        yield Line("", f"{refusal}: sdpa runs in its place")
    if preset is None:
        yield Line("", "configuration: NSAConfig(), the default; no preset is for this length")
    else:
        what = f'configuration: NSAConfig.preset("{preset}"): {PRESETS[preset].summary}; gain:'
        yield Line("", f"{what} {gain_of(f'preset {preset}', T)}")
    yield Line("", f"l {config.compress_block}, d {config.compress_stride}, {_geometry(config)}")
    if cuda and config.select_share == 1 and T > SHORT:
        what = "select_share=4 in it (train --select-share 4): four queries share a list; gain:"
        yield Line("", f"{what} {gain_of('select_share=4', T)}")
    environment = dict(PRESETS[preset or "small"].environment)
    environment["NSA_BACKEND"] = backend
    if not cuda:
        environment["OMP_NUM_THREADS"] = str(machine.cores)
    for variable, value in environment.items():
        gain = gain_of(f"{variable}={value}", T)
        current = machine.variables.get(variable)
        if variable in ALLOCATOR_VARIABLES and current not in (None, value):
            gain += f"; now {current}"
        yield Line(f"export {variable}={value}", gain)
    bench = "python -m nsa.tools.bench --branches all+select"
    chosen = f" --preset {preset}" if preset else ""
    yield Line(f"{bench} --lengths {T}{chosen}", "measures it here, beside dense attention")
    base = "small" if cuda else "tiny"
    train = f"python -m nsa.tools.train --preset {base} --seq-len {T}{_flags(config, base)}"
    if cuda:
        train += " --compile model"
    yield Line(train, gain_of("--compile model", T) if cuda else "trains with it")
    yield Line("", _memory(config, T, dtype, backend, cuda=cuda))


def preset_for(device: torch.device, length: int) -> str | None:
    """The preset for a length on a device; None: the default."""
    if device.type == "cpu":
        return "cpu"
    if length <= SHORT:
        return "short"
    return "long" if length >= LONG else None


def _geometry(config: NSAConfig) -> str:
    n, forced = config.num_selected, config.num_initial + config.num_local
    options = ""
    if config.select_share > 1:
        options += f", one list for {config.select_share} queries"
    if config.select_regions is not None:
        options += ", regions of {} blocks, {} searched".format(*config.select_regions)
    heads = f"heads {config.num_heads}/{config.num_kv_heads}:{config.head_dim}"
    return f"l' {config.select_block}, n {n} ({forced} forced), w {config.window}, {heads}{options}"


def _flags(config: NSAConfig, base: str) -> str:
    """Flags of ``train`` that turn a preset's configuration into this one."""
    text, start = "", NSAConfig.preset(base)
    for field in fields(NSAConfig):
        value = getattr(config, field.name)
        if field.name != "value_dim" and value != getattr(start, field.name):
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            text += f" --{field.name.replace('_', '-')} {shown}"
    return text


def _memory(config: NSAConfig, T: int, dtype: torch.dtype, backend: str, *, cuda: bool) -> str:
    """Bytes of a layer as wide as its heads."""
    if (cuda and backend == "sdpa") or T < config.compress_block:
        return "memory: no formula; docs/memory.md"
    dim = config.num_heads * config.head_dim
    kept, again = (
        layer_memory(
            config,
            dim,
            batch=1,
            length=T,
            dtype=dtype,
            backend=backend,
            recompute=recompute,
            autocast=cuda,
        )
        for recompute in (False, True)
    )
    bytes_ = (kept.parameters, kept.saved, again.saved, kept.peak)
    sizes = [f"{x / GIB:.2f} GiB" if x >= GIB else f"{x / 2**20:.0f} MiB" for x in bytes_]
    return (
        "memory of a layer, dim {4}, one sequence: parameters {0}, kept for backward {1} "
        "({2} with --recompute), peak {3}; docs/memory.md"
    ).format(*sizes, dim)
