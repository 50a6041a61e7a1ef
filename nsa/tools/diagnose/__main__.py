"""Say what this machine can run, and prove it: ``python -m nsa.tools.diagnose``.

Under ``torchrun``, ``--all-reduce`` sums tensors over all processes, and looks at nothing else.

Exit code 0: everything requested works. 1: a requested backend cannot run, a backend is not within
its accuracy bounds, one that claims FlashAttention-2 ran other kernels (``--profile``), one breaks
its graph or compiles again (``--compile``), a sum is wrong (``--all-reduce``), or the ``NSA_…``
environment is wrong. 2: the command line is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from nsa.distributed.ranks import Ranks, launched
from nsa.errors import UsageError
from nsa.registry import names
from nsa.tools.common.cli import Parser, fail, integer, one_of, run
from nsa.tools.common.machine import collect_machine
from nsa.tools.diagnose.compile.trials import COMPILERS
from nsa.tools.diagnose.ranks import all_reduce
from nsa.tools.diagnose.recommend import DEFAULT_LENGTH, recommend
from nsa.tools.diagnose.report import collect_diagnosis
from nsa.tools.diagnose.tables import print_diagnosis

_EXAMPLES = """\
examples:
  python -m nsa.tools.diagnose
  NSA_USE_FA2=1 python -m nsa.tools.diagnose --profile
  python -m nsa.tools.diagnose --backend sdpa --json
  python -m nsa.tools.diagnose --compile inductor --backend compiled
  python -m nsa.tools.diagnose --recommend --length 32768
  torchrun --nproc-per-node 2 -m nsa.tools.diagnose --all-reduce
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m nsa.tools.diagnose",
        description="Say what this machine can run, and hold every backend to the oracle.",
        epilog=_EXAMPLES,
    )
    add = parser.add_argument
    text = f"fail unless this one runs: {', '.join(names())}"
    add("--backend", type=one_of("--backend", names()), metavar="NAME", help=text)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--profile", action="store_true", help="show which kernels run each branch (CUDA)")
    add(
        "--compile",
        nargs="?",
        type=one_of("--compile", COMPILERS),
        const=COMPILERS[0],
        metavar="COMPILER",
        help="show what torch.compile makes of every backend, or of --backend's, and hold it to "
        f"one graph and no recompiles; takes minutes: {', '.join(COMPILERS)} "
        f"(default: {COMPILERS[0]}; the quickest: eager; the real one: inductor)",
    )
    text = "print configuration, environment and commands for this machine, to paste into a shell"
    add("--recommend", action="store_true", help=text)
    defaults = " and ".join(f"{T} on {device}" for device, T in DEFAULT_LENGTH.items())
    text = f"with --recommend: tokens of a sequence (default: {defaults})"
    add("--length", type=integer, metavar="T", help=text)
    text = "sum over the processes that torchrun started, right and how fast, and nothing else"
    add("--all-reduce", action="store_true", help=text)
    add("--json", action="store_true", help="print JSON for programs instead of tables")
    with launched(fail) as ranks:
        return _diagnose(parser.parse_strictly(argv), ranks)


def _diagnose(arguments: argparse.Namespace, ranks: Ranks) -> int:
    if arguments.all_reduce:
        return _all_reduce(arguments, ranks)
    if ranks.size > 1:
        raise UsageError(f"expected --all-reduce with {ranks.size} processes, got no such flag")
    if arguments.length is not None and not arguments.recommend:
        raise UsageError("--length: expected --recommend with it, got none")
    if arguments.recommend:
        for flag in ("backend", "profile", "compile"):
            if getattr(arguments, flag):
                raise UsageError(f"--recommend: expected no --{flag}, which it does not look at")
        lines = recommend(collect_machine(), arguments.device, arguments.length)
        if arguments.json:
            print(json.dumps([line._asdict() for line in lines], indent=1))
        else:
            print(*lines, sep="\n")
        return 0
    # A library that prints while it is probed must not spoil the JSON.
    with contextlib.redirect_stdout(sys.stderr):
        diagnosis = collect_diagnosis(
            arguments.device,
            arguments.backend,
            profile=arguments.profile,
            compiler=arguments.compile,
        )
    if arguments.json:
        print(json.dumps(diagnosis.to_dict(), indent=1, allow_nan=False))
    else:
        print_diagnosis(diagnosis)
    return 1 if diagnosis.problems else 0


def _all_reduce(arguments: argparse.Namespace, ranks: Ranks) -> int:
    for flag in ("backend", "profile", "compile", "recommend"):
        if getattr(arguments, flag):
            raise UsageError(f"--all-reduce: expected no --{flag}, which it does not look at")
    found = all_reduce(ranks, arguments.device)
    if arguments.json:
        print(json.dumps([asdict(row) for row in found], indent=1))
    else:
        print(*found, sep="\n")
    return 0 if all(row.right for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
