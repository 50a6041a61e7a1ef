"""Samples text from a trained checkpoint: ``python -m nsa.tools.generate``."""

from __future__ import annotations

import argparse
import codecs
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from nsa.models import GenerationConfig, generate
from nsa.tools.common.cli import Parser, add_backend_and_device, add_fields, choose_device, run
from nsa.tools.common.models import load_trained
from nsa.training.data import SEPARATOR

_EXAMPLES = """\
examples:
  python -m nsa.tools.generate runs/demo --prompt "def "
  python -m nsa.tools.generate runs/demo/checkpoints/step-000200 --temperature 0
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m nsa.tools.generate",
        description="Sample bytes from a trained model.",
        epilog=_EXAMPLES,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("path", metavar="PATH", help="a run's folder, or one of its checkpoints")
    parser.add_argument("--prompt", help="text to continue (default: the start of a document)")
    add_fields(parser, GenerationConfig, show_defaults=True)
    add_backend_and_device(parser)
    given = vars(parser.parse_strictly(argv))
    path, prompt = Path(given.pop("path")), given.pop("prompt", "")
    device, backend = choose_device(given.pop("device", "auto")), given.pop("backend", None)
    config = GenerationConfig(**given)

    trained = load_trained(path, backend, device)
    text = prompt.encode("utf-8", "surrogateescape")
    context = trained.config.train.seq_len
    stream = generate(trained.model, SEPARATOR + text, config, context=context, stop=SEPARATOR[0])
    _print_stream(text, stream)
    return 0


def _print_stream(prompt: bytes, stream: Iterator[int]) -> None:
    """Write the text as it comes; bytes that are not UTF-8 become replacement characters."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    print(decoder.decode(prompt), end="", flush=True)
    for token in stream:
        print(decoder.decode(bytes([token])), end="", flush=True)
    print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    sys.exit(main())
