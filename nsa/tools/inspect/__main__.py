"""Show what a trained model's attention reads: ``python -m nsa.tools.inspect``.

For a checkpoint of ``nsa.tools.train`` and a text: which blocks queries read and whom they share
them with, how much of dense attention's mass that holds, gates, attention sinks, what the loss
becomes without a branch or with other lists, and the loss by position. Everything is of
:mod:`nsa.inspection`, which does the same for any model with NSA layers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from nsa.errors import UsageError, require
from nsa.tools.common.cli import Parser, add_backend_and_device, choose_device, integer, run
from nsa.tools.common.models import load_trained
from nsa.tools.common.progress import Bar
from nsa.tools.inspect.study import Examiner, read_sequences, require_nsa, save_lists
from nsa.tools.inspect.tables import print_study

_EXAMPLES = """\
examples:
  python -m nsa.tools.inspect runs/demo --text book.txt
  python -m nsa.tools.inspect runs/demo --text book.txt --html page.html --json study.json
  python -m nsa.tools.inspect runs/demo --text book.txt --length 8192 --figures figures/
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_strictly(argv)
    for flag in ("length", "sequences"):
        value = getattr(arguments, flag)
        require(value is None or value >= 1, f"--{flag}", "an int >= 1", value)
    require(0 <= arguments.seed < 2**63, "--seed", "an int in [0, 2**63)", arguments.seed)
    outputs = ("html", "json", "lists")
    for flag in outputs:
        _require_folder(f"--{flag}", getattr(arguments, flag))
    device = choose_device(arguments.device or "auto")
    trained = load_trained(arguments.checkpoint, arguments.backend, device)
    require_nsa(trained)
    sequences = read_sequences(
        arguments.text, trained, length=arguments.length, sequences=arguments.sequences
    )
    examiner = Examiner(
        trained,
        sequences,
        arguments.text,
        with_knock_outs=not arguments.no_knock_outs,
        seed=arguments.seed,
    )
    with Bar(examiner.steps) as bar:

        def step(name: str) -> None:
            bar.show(description=name)
            bar.step()

        study = examiner.study(step)
    print_study(study)
    if arguments.json:
        text = json.dumps(study.to_dict(), allow_nan=False) + "\n"
        arguments.json.write_text(text, encoding="utf-8")
    if arguments.lists:
        save_lists(arguments.lists, examiner.recording)
    if arguments.html:
        from nsa.tools.inspect.page import page  # what it takes is only spent when it is wanted

        arguments.html.write_text(page(study), encoding="utf-8")
    if arguments.figures:
        from nsa.tools.inspect.figures import write_figures

        write_figures(study, arguments.figures)
    for flag in (*outputs, "figures"):
        if getattr(arguments, flag):
            print(f"wrote {getattr(arguments, flag)}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m nsa.tools.inspect",
        description="Show what a trained model's attention reads.",
        epilog=_EXAMPLES,
    )
    add = parser.add_argument
    add(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="a run's folder, or one of its checkpoints",
    )
    add("--text", metavar="FILE", type=Path, required=True, help="what the model reads")
    add(
        "--length",
        metavar="N",
        type=integer,
        help="bytes of a sequence (default: as in training)",
    )
    add(
        "--sequences",
        metavar="N",
        type=integer,
        default=1,
        help="sequences at most, from the beginning of the text (default: 1)",
    )
    add("--html", metavar="FILE", type=Path, help="write a page with every figure, in one file")
    add("--json", metavar="FILE", type=Path, help="write every number")
    add("--figures", metavar="DIR", type=Path, help="write every figure as SVG or PNG")
    add("--lists", metavar="FILE", type=Path, help="write the block lists, as .npz")
    add(
        "--no-knock-outs",
        action="store_true",
        help="leave out what takes several more forwards",
    )
    add(
        "--seed",
        metavar="N",
        type=integer,
        default=0,
        help="seed of the random lists (default: 0)",
    )
    add_backend_and_device(parser)
    return parser


def _require_folder(flag: str, path: Path | None) -> None:
    """Find out before anything is computed that a file could not be written."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        got = "a folder" if path.is_dir() else f"one in {path.parent}, which is not there"
        raise UsageError(f"{flag}: expected a file in an existing folder, got {got}")


if __name__ == "__main__":
    sys.exit(main())
