"""The flags of ``bench``, their defaults and their mistakes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from nsa.backends import TABLE
from nsa.config import NSAConfig, nearest
from nsa.errors import ConfigError, UsageError
from nsa.settings import PROVIDERS
from nsa.tools.bench import fla as bench_fla
from nsa.tools.bench.advice import FLAGS
from nsa.tools.bench.cases import BRANCHES, WHOLE
from nsa.tools.bench.plan import Plan
from nsa.tools.bench.timing import PASSES
from nsa.tools.common.cli import Parser, choose_device, integer, number

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
PRESETS = ("paper", "small", "tiny")
_BACKENDS = (*TABLE, bench_fla.NAME)
_Item = TypeVar("_Item")
_LAYOUT = re.compile(r"(\d+)/(\d+)(?::(\d+)(?:/(\d+))?)?")
_DEFAULT_LENGTHS = {"cpu": (512, 1024, 2048, 4096), "cuda": (2048, 8192, 32768)}
_DEFAULT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
_DEFAULT_PRESET = {"cpu": "tiny", "cuda": ""}
_THRESHOLD_LENGTHS = {
    "cuda": tuple(64 * 2**i for i in range(9)),
    "cpu": tuple(64 * 2**i for i in range(5)),  # FA-2 on a CPU is there for tests, and quadratic
}

_EXAMPLES = """\
examples:
  python -m nsa.tools.bench
  python -m nsa.tools.bench --lengths 8192,65536 --heads 64/4:128,64/4:192/128 --plot bench.png
  python -m nsa.tools.bench --backends sdpa,fa2-varlen --packed 4 --jsonl bench.jsonl
  python -m nsa.tools.bench --find-fa2-min-len
"""


def bench_parser() -> Parser:
    """Every flag of ``bench``; one that is not given is None."""
    parser = Parser(
        prog="python -m nsa.tools.bench",
        description="Time NSA's backends beside dense causal attention, each after a parity check.",
    )
    parser.epilog = _EXAMPLES
    what = parser.add_argument_group("what is timed (lists are separated by commas)")
    add = what.add_argument
    add(
        "--backends",
        metavar="NAMES",
        help=f"of {', '.join(_BACKENDS)} (default: those that run)",
    )
    add("--branches", metavar="NAMES", help=f"of {', '.join(BRANCHES)} (default: all)")
    add("--lengths", metavar="T", help="tokens (default: 2048,8192,32768; CPU: 512 to 4096)")
    add("--heads", metavar="LAYOUTS", help="Hq/Hkv[:Dk[/Dv]] (default: 64/4:128; CPU: 4/2:32)")
    add(
        "--dtypes",
        metavar="NAMES",
        help=f"of {', '.join(_SHORT_DTYPES)} (default: bf16; CPU: fp32)",
    )
    add("--preset", metavar="NAME", help=f"geometry and heads: {', '.join(PRESETS)} (CPU: tiny)")
    add("--batch", type=integer, metavar="B", help="sequences in a regular batch (default: 1)")
    add("--packed", type=integer, metavar="N", help="pack T tokens as N sequences, 1 : 2 : … : N")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--provider", metavar="NAME", help=f"where FA-2 comes from: {', '.join(PROVIDERS)}")
    add(
        "--find-fa2-min-len",
        action="store_true",
        help="time only what decides NSA_FA2_MIN_LEN_WIN and _CMP, and print both",
    )
    how = parser.add_argument_group("how")
    add = how.add_argument
    add(
        "--seconds",
        type=number,
        default=0.2,
        metavar="S",
        help="about, of each timing (default: 0.2)",
    )
    add("--runs", type=integer, default=5, metavar="N", help="of each, at least (default: 5)")
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--jsonl", metavar="FILE", help="write a line for each row as it comes; replaces FILE")
    add("--plot", metavar="FILE", help=f"draw time over T: {', '.join(PLOT_SUFFIXES)}")
    return parser


def make_plan(argv: Sequence[str] | None) -> Plan:
    """Parses and checks a command line.

    Raises:
        UsageError, ConfigError: naming the flag.
    """
    given = bench_parser().parse_strictly(argv)
    device = choose_device(given.device)
    kind = device.type
    find = given.find_fa2_min_len
    if find:
        _refuse_with_find(given)
    preset = _DEFAULT_PRESET[kind] if given.preset is None else given.preset
    if given.preset is not None:
        _known("--preset", preset, PRESETS)
    base = replace(NSAConfig.preset(preset) if preset else NSAConfig(), rope_theta=None)
    if given.provider is not None:
        _known("--provider", given.provider, PROVIDERS)
    sequences = 0 if given.packed is None else _at_least(1, "--packed", given.packed)
    batch = 1 if given.batch is None else _at_least(1, "--batch", given.batch)
    if sequences and batch > 1:
        raise UsageError(f"--packed: expected --batch 1, got --batch {batch}")
    lengths = (_THRESHOLD_LENGTHS if find else _DEFAULT_LENGTHS)[kind]
    if given.lengths is not None:
        lengths = _list("--lengths", given.lengths, lambda text: _length(text, sequences))
    backends = _names("--backends", given.backends, _BACKENDS) if given.backends else ()
    branches = _names("--branches", given.branches, BRANCHES) if given.branches else BRANCHES
    if find:
        backends = ("sdpa", "fa2-varlen" if sequences else "fa2-dense")
        branches = tuple(branch for branch in BRANCHES if branch in FLAGS)
    if bench_fla.NAME in backends and "selected" not in branches:
        raise UsageError(f"--backends fla: expected selected in --branches, got {given.branches!r}")
    if given.plot is not None and not set(WHOLE) & set(branches):
        raise UsageError(f"--plot: expected {' or '.join(WHOLE)} in --branches, which is drawn")
    if not 0 < given.seconds < 3600:
        raise UsageError(f"--seconds: expected a number in (0, 3600), got {given.seconds}")
    return Plan(
        backends=backends,
        branches=branches,
        passes=("both",) if find else PASSES,
        dense=not find,
        lengths=tuple(sorted(lengths)),
        configs=_configs(given.heads, base),
        dtypes=_dtypes(given.dtypes or _DEFAULT_DTYPE[kind]),
        batch=batch,
        sequences=sequences,
        device=device,
        provider=given.provider,
        seconds=given.seconds,
        runs=_at_least(1, "--runs", given.runs),
        jsonl=None if given.jsonl is None else Path(given.jsonl),
        plot=None if given.plot is None else _plot_path(given.plot),
        find_min_len=find,
    )


def _refuse_with_find(given: argparse.Namespace) -> None:
    for name in ("backends", "branches", "plot"):
        if getattr(given, name) is not None:
            raise UsageError(f"--find-fa2-min-len: expected no --{name}, which it chooses itself")


def _configs(text: str | None, base: NSAConfig) -> tuple[NSAConfig, ...]:
    if text is None:
        return (base,)
    return _list("--heads", text, lambda part: _layout(part, base))


def _layout(text: str, base: NSAConfig) -> NSAConfig:
    found = _LAYOUT.fullmatch(text)
    if found is None:
        raise UsageError(f"--heads: expected Hq/Hkv[:Dk[/Dv]], such as 64/4:128, got {text!r}")
    heads, kv_heads, k, v = (None if part is None else int(part) for part in found.groups())
    assert heads is not None
    assert kv_heads is not None
    try:
        config = replace(base, num_heads=heads, num_kv_heads=kv_heads)
        return config if k is None else replace(config, head_dim=k, value_dim=v)
    except ConfigError as error:
        raise ConfigError(f"--heads {text}: {error}") from None


def _dtypes(text: str) -> tuple[torch.dtype, ...]:
    names = _list("--dtypes", text, lambda part: _SHORT_DTYPES.get(part, part))
    known = (*DTYPES, *_SHORT_DTYPES)
    return tuple(DTYPES[_known("--dtypes", name, known)] for name in names)


def _names(flag: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    return _list(flag, text, lambda part: _known(flag, part, known))


def _known(flag: str, name: str, known: tuple[str, ...]) -> str:
    if name not in known:
        raise UsageError(
            f"{flag}: expected one of the known names, got {name!r}; {nearest(name, known)}"
        )
    return name


def _list(flag: str, text: str, parse: Callable[[str], _Item]) -> tuple[_Item, ...]:
    """The parts between commas, each once."""
    parts = [part.strip() for part in text.split(",")]
    if "" in parts:
        raise UsageError(f"{flag}: expected a list separated by commas, got {text!r}")
    return tuple(dict.fromkeys(parse(part) for part in parts))


def _length(text: str, sequences: int) -> int:
    try:
        length = int(text)
    except ValueError:
        raise UsageError(f"--lengths: expected integers, got {text!r}") from None
    return _at_least(max(1, sequences), "--lengths", length)


def _at_least(least: int, flag: str, value: int) -> int:
    if value < least:
        raise UsageError(f"{flag}: expected an int >= {least}, got {value}")
    return value


def _plot_path(text: str) -> Path:
    path = Path(text)
    if path.suffix not in PLOT_SUFFIXES:
        raise UsageError(f"--plot: expected a name in {', '.join(PLOT_SUFFIXES)}, got {text!r}")
    return path
