"""The flags of ``bench``, their defaults and their mistakes, and the plan that they make."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from nsa.backends import TABLE
from nsa.cache import MAX_STEP
from nsa.config import PRESETS, NSAConfig
from nsa.errors import ConfigError, UsageError, show
from nsa.settings import PROVIDERS
from nsa.tools.bench.cases import BRANCHES, WHOLE
from nsa.tools.bench.peers import PEERS
from nsa.tools.common.cli import Parser, choose_device, integer, number, one_of
from nsa.tools.common.problems import Trial, short

DECIDED = {"window": "WIN", "compressed": "CMP"}
"""The branches that a length may send to ``sdpa``, and what their settings end in."""
_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
_DTYPE_NAMES = {**{short(dtype): dtype for dtype in _DTYPES.values()}, **_DTYPES}
_PLOT_SUFFIXES = (".png", ".svg", ".pdf")
_BACKENDS = (*TABLE, *PEERS)
_LAYOUT = re.compile(r"(\d{1,6})/(\d{1,6})(?::(\d{1,6})(?:/(\d{1,6}))?)?", re.ASCII)
_MOST_TOKENS = 2**31 - 1
"""Kernels count in int32."""
_MOST_COUNTED = 10**6
_DEFAULT_LENGTHS = {"cpu": (512, 1024, 2048, 4096), "cuda": (2048, 8192, 32768)}
_DEFAULT_DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
_THRESHOLD_LENGTHS = {
    "cuda": tuple(64 * 2**i for i in range(9)),
    "cpu": tuple(64 * 2**i for i in range(5)),  # FA-2 on a CPU is there for tests, and quadratic
}
_TUNED_LENGTHS = (8192,)
_TUNED_BYTES = 2
"""Of an element of the dtypes whose tiles are tuned."""
_Item = TypeVar("_Item")

_EXAMPLES = """\
examples:
  python -m nsa.tools.bench
  python -m nsa.tools.bench --lengths 8192,65536 --heads 64/4:128,64/4:192/128 --plot bench.png
  python -m nsa.tools.bench --backends sdpa,fa2-varlen --packed 4 --jsonl bench.jsonl
  python -m nsa.tools.bench --decode --batch 32 --lengths 65536
  python -m nsa.tools.bench --find-fa2-min-len
  python -m nsa.tools.bench --tune --heads 64/4:128,32/8:128
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that one run measures."""

    trials: tuple[Trial, ...]
    """Every problem, those of one table after each other."""
    device: torch.device
    backends: tuple[str, ...]
    """Those requested, which must run; empty: all that can, except the oracle."""
    branches: tuple[str, ...]
    provider: str | None
    """Where FA-2 comes from; None leaves that to the settings."""
    decode: int | None
    """New tokens of a sequence in the step of decode that alone is timed; None: training."""
    find_min_len: bool
    """Whether only what decides FA-2's least lengths is timed."""
    tune: bool
    """Whether tiles of the kernels are tried, and nothing else."""
    seconds: float
    runs: int
    jsonl: Path | None
    plot: Path | None


def bench_parser() -> Parser:
    """Every flag of ``bench``; one that is not given is None."""
    parser = Parser(
        prog="python -m nsa.tools.bench",
        description="Time NSA's backends beside dense causal attention, each after a parity check.",
        epilog=_EXAMPLES,
    )
    what = parser.add_argument_group("what is timed (lists are separated by commas)")
    add = what.add_argument

    def add_list(flag: str, parse: Callable[[str], object], text: str, metavar: str) -> None:
        add(flag, type=partial(_list, flag, parse), metavar=metavar, help=text)

    text = f"of {', '.join(_BACKENDS)} (default: those that run)"
    add_list("--backends", one_of("--backends", _BACKENDS), text, "NAMES")
    text = f"of {', '.join(BRANCHES)} (default: all)"
    add_list("--branches", one_of("--branches", BRANCHES), text, "NAMES")
    add_list("--lengths", _length, "tokens (default: 2048,8192,32768; CPU: 512 to 4096)", "T")
    add("--heads", metavar="LAYOUTS", help="Hq/Hkv[:Dk[/Dv]] (default: 64/4:128; CPU: 4/2:32)")
    text = f"of {', '.join(_DTYPES)} (default: bf16; CPU: fp32)"
    add_list("--dtypes", _dtype, text, "NAMES")
    text = f"geometry and heads: {', '.join(PRESETS)} (CPU: tiny)"
    add("--preset", type=one_of("--preset", tuple(PRESETS)), metavar="NAME", help=text)
    text = "sequences in a regular batch (default: 1)"
    add("--batch", type=partial(_count, "--batch"), default=1, metavar="B", help=text)
    text = "pack T tokens as N sequences, 1 : 2 : … : N"
    add("--packed", type=partial(_count, "--packed"), metavar="N", help=text)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    text = f"where FA-2 comes from: {', '.join(PROVIDERS)}"
    add("--provider", type=one_of("--provider", PROVIDERS), metavar="NAME", help=text)
    text = "time only what decides NSA_FA2_MIN_LEN_WIN and _CMP, and print both"
    add("--find-fa2-min-len", action="store_true", help=text, dest="find_min_len")
    text = "find the best tiles of compiled's kernels on this GPU, and print rows for its tables"
    add("--tune", action="store_true", help=text)
    text = f"time one step of decode, of S new tokens (1 to {MAX_STEP}; default: 1)"
    add("--decode", type=integer, nargs="?", const=1, metavar="S", help=text)
    how = parser.add_argument_group("how")
    text = "about, of each timing (default: 0.2)"
    how.add_argument("--seconds", type=number, default=0.2, metavar="S", help=text)
    text = "of each, at least (default: 5)"
    how.add_argument("--runs", type=partial(_count, "--runs"), default=5, metavar="N", help=text)
    output = parser.add_argument_group("output")
    text = "write a line for each row as it comes; replaces FILE"
    output.add_argument("--jsonl", type=Path, metavar="FILE", help=text)
    text = f"draw time over T: {', '.join(_PLOT_SUFFIXES)}"
    output.add_argument("--plot", type=Path, metavar="FILE", help=text)
    return parser


def make_plan(argv: Sequence[str] | None) -> Plan:
    """Parses and checks a command line.

    Raises:
        UsageError, ConfigError: naming the flag.
    """
    given = bench_parser().parse_strictly(argv)
    device, packed = choose_device(given.device), given.packed
    for name in ("backends", "branches", "plot") if given.find_min_len else ():
        if getattr(given, name) is not None:
            raise UsageError(f"--find-fa2-min-len: expected no --{name}, which it chooses itself")
    for name in ("branches", "plot", "packed", "provider") if given.decode is not None else ():
        if getattr(given, name) is not None:
            raise UsageError(f"--decode: expected no --{name}, which it does not have")
    if given.tune:
        _check_tune(given, device)
    if given.decode is not None and given.find_min_len:
        raise UsageError("--decode: expected no --find-fa2-min-len, which times training")
    if given.decode is not None and not 1 <= given.decode <= MAX_STEP:
        raise UsageError(f"--decode: expected an int from 1 to {MAX_STEP}, got {given.decode}")
    if packed and given.batch > 1:
        raise UsageError(f"--packed: expected --batch 1, got --batch {given.batch}")
    backends, branches = given.backends or (), given.branches or BRANCHES
    if given.find_min_len:
        backends = ("sdpa", "fa2-varlen" if packed else "fa2-dense")
        branches = tuple(branch for branch in BRANCHES if branch in DECIDED)
    for name, peer in PEERS.items():
        if name in backends and not set(peer.branches) & set(branches):
            got, wanted = ",".join(branches), " or ".join(peer.branches)
            raise UsageError(f"--backends {name}: expected {wanted} in --branches, got {got!r}")
    if given.plot is not None and not set(WHOLE) & set(branches):
        raise UsageError(f"--plot: expected {' or '.join(WHOLE)} in --branches, which is drawn")
    if given.plot is not None and given.plot.suffix not in _PLOT_SUFFIXES:
        suffixes = ", ".join(_PLOT_SUFFIXES)
        raise UsageError(f"--plot: expected a name in {suffixes}, got {str(given.plot)!r}")
    if not 0 < given.seconds < 3600:
        raise UsageError(f"--seconds: expected a number in (0, 3600), got {given.seconds}")
    return Plan(
        trials=_trials(given, device),
        device=device,
        backends=backends,
        branches=branches,
        provider=given.provider,
        decode=given.decode,
        find_min_len=given.find_min_len,
        tune=given.tune,
        seconds=given.seconds,
        runs=given.runs,
        jsonl=given.jsonl,
        plot=given.plot,
    )


def _check_tune(given: argparse.Namespace, device: torch.device) -> None:
    """What ``--tune`` cannot go with; and it needs the GPU that the tiles are for."""
    for name in ("backends", "branches", "packed", "provider", "decode", "jsonl", "plot"):
        if getattr(given, name) is not None:
            raise UsageError(f"--tune: expected no --{name}, which it does not have")
    if given.find_min_len:
        raise UsageError("--tune: expected no --find-fa2-min-len, which times other kernels")
    for dtype in given.dtypes or ():
        if dtype.itemsize != _TUNED_BYTES:
            got = f"got {short(dtype)}, whose kernels are for checks"
            raise UsageError(f"--tune: expected bf16 or fp16 in --dtypes, {got}")
    if device.type != "cuda":
        raise UsageError(
            f"--tune: expected a CUDA GPU, the one that the tiles are for, got {device.type}: run "
            "it on a machine that has that GPU, with a PyTorch built for CUDA"
        )


def _trials(given: argparse.Namespace, device: torch.device) -> tuple[Trial, ...]:
    preset = given.preset or ("tiny" if device.type == "cpu" else None)
    base = NSAConfig.preset(preset) if preset else NSAConfig()
    base = replace(base, rope_theta=None)
    lengths = given.lengths or _DEFAULT_LENGTHS[device.type]
    if given.find_min_len and not given.lengths:
        lengths = _THRESHOLD_LENGTHS[device.type]
    if given.tune and not given.lengths:
        lengths = _TUNED_LENGTHS
    least = given.packed or 1
    if min(lengths) < least:
        raise UsageError(f"--lengths: expected an int >= {least}, got {show(min(lengths))}")
    configs: tuple[NSAConfig, ...] = (base,)
    if given.heads is not None:
        configs = _list("--heads", lambda part: _layout(part, base), given.heads)
    batches = [
        Trial(
            config=config,
            device=device,
            dtype=dtype,
            lengths=(0,) * (given.packed or given.batch),
            packed=given.packed is not None,
        )
        for dtype in given.dtypes or (_DEFAULT_DTYPE[device.type],)
        for config in configs
    ]
    return tuple(batch.with_length(length) for batch in batches for length in sorted(lengths))


def _layout(text: str, base: NSAConfig) -> NSAConfig:
    found = _LAYOUT.fullmatch(text)
    if found is None:
        expected = "expected Hq/Hkv[:Dk[/Dv]], such as 64/4:128"
        raise UsageError(f"--heads: {expected}, got {show(text)}")
    heads, kv_heads, k, v = (None if part is None else int(part) for part in found.groups())
    assert heads is not None
    assert kv_heads is not None
    try:
        config = replace(base, num_heads=heads, num_kv_heads=kv_heads)
        return config if k is None else replace(config, head_dim=k, value_dim=v)
    except ConfigError as error:
        raise ConfigError(f"--heads {text}: {error}") from None


# Types for argparse, whose own message would not name what is known


def _list(flag: str, parse: Callable[[str], _Item], text: str) -> tuple[_Item, ...]:
    """The parts between commas, each once."""
    parts = [part.strip() for part in text.split(",")]
    if "" in parts:
        raise UsageError(f"{flag}: expected a list separated by commas, got {text!r}")
    return tuple(dict.fromkeys(parse(part) for part in parts))


def _dtype(text: str) -> torch.dtype:
    return _DTYPE_NAMES[one_of("--dtypes", tuple(_DTYPE_NAMES))(text)]


def _length(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise UsageError(f"--lengths: expected integers, got {show(text)}") from None
    if value > _MOST_TOKENS:
        raise UsageError(f"--lengths: expected integers <= {_MOST_TOKENS}, got {show(text)}")
    return value


def _count(flag: str, text: str) -> int:
    value = integer(text)
    if value < 1:
        raise UsageError(f"{flag}: expected an int >= 1, got {value}")
    if value > _MOST_COUNTED:
        raise UsageError(f"{flag}: expected an int <= {_MOST_COUNTED}, got {value}")
    return value
