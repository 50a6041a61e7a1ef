"""Samples text from a trained checkpoint: ``python -m nsa.tools.generate``."""

from __future__ import annotations

import argparse
import codecs
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from nsa.errors import UsageError, require
from nsa.models import Generation, GenerationConfig
from nsa.models.generation import DEFAULT_CHUNK
from nsa.tools.common.cli import (
    Parser,
    add_backend_and_device,
    add_fields,
    choose_device,
    integer,
    run,
)
from nsa.tools.common.models import load_trained
from nsa.tools.generate.summary import summary
from nsa.training.data import SEPARATOR

_EXAMPLES = """\
examples:
  python -m nsa.tools.generate runs/demo --prompt "def "
  python -m nsa.tools.generate runs/demo --prompt "def " --prompt "class " --stop "return"
  python -m nsa.tools.generate runs/demo/checkpoints/step-000200 --temperature 0
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run(_main, argv)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m nsa.tools.generate",
        description="Sample bytes from a trained model. What was done goes to stderr.",
        epilog=_EXAMPLES,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("path", metavar="PATH", help="a run's folder, or one of its checkpoints")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue (default: the start of a document); again for a batch",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="more prompts, one a line, for a batch"
    )
    parser.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="text before which to end, as a document's end is; may be given again",
    )
    add_fields(parser, GenerationConfig, show_defaults=True)
    parser.add_argument(
        "--max-length",
        type=integer,
        metavar="N",
        help="bytes of a text at most, its prompt included (default: as the model was trained)",
    )
    parser.add_argument(
        "--chunk",
        type=integer,
        metavar="N",
        help=f"bytes of prompts to read at once, which bounds memory (default: {DEFAULT_CHUNK})",
    )
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="compute everything anew for each byte, from the last --max-length ones",
    )
    parser.add_argument(
        "--selected-dtype",
        choices=["e4m3"],
        help="keep the selected branch's keys and values in 8 bits, with scales",
    )
    parser.add_argument("--no-graph", action="store_true", help="take no CUDA graph for the steps")
    add_backend_and_device(parser)
    return parser


def _main(argv: Sequence[str] | None) -> int:
    given = vars(_parser().parse_strictly(argv))
    path = Path(given.pop("path"))
    texts, stops = _texts(given), _stops(given.pop("stop", []))
    device, backend = choose_device(given.pop("device", "auto")), given.pop("backend", None)
    max_length, chunk = given.pop("max_length", None), given.pop("chunk", DEFAULT_CHUNK)
    for flag, value in (("--max-length", max_length), ("--chunk", chunk)):
        require(value is None or value >= 1, flag, "an int >= 1", value)
    graph: bool | None = None
    cache: bool | dict[str, str] = not given.pop("no_cache", False)
    if "selected_dtype" in given:
        selected_dtype = given.pop("selected_dtype")
        require(cache is True, "--selected-dtype", "no --no-cache beside it", selected_dtype)
        cache = {"selected_dtype": selected_dtype}
    if given.pop("no_graph", False):
        graph = False
    config = GenerationConfig(**given)

    trained = load_trained(path, backend, device)
    context = trained.config.train.seq_len
    prompts = [SEPARATOR + text for text in texts]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generation = trained.model.generate(
            prompts[0] if len(prompts) == 1 else prompts,
            config,
            context=context,
            max_length=max_length,
            stop=[SEPARATOR, *stops],
            cache=cache,
            chunk=chunk,
            graph=graph,
        )
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    if len(texts) == 1:
        _print_stream(texts[0], generation)
    else:
        _print_batch(texts, generation)
    sys.stdout.flush()
    for line in summary(generation, trained.model.resolution):
        print(line, file=sys.stderr)
    return 0


def _texts(given: dict[str, object]) -> list[bytes]:
    """The prompts, without the separator that begins a document."""
    given_texts, file = given.pop("prompt", []), given.pop("prompts", None)
    assert isinstance(given_texts, list)
    texts = [text.encode("utf-8", "surrogateescape") for text in given_texts]
    if isinstance(file, Path):
        lines = file.read_bytes().splitlines()
        if not lines:
            raise UsageError(f"--prompts: expected a prompt a line, got none in {file}")
        texts += lines
    return texts or [b""]


def _stops(texts: list[str]) -> list[bytes]:
    if not all(texts):
        raise UsageError("--stop: expected a text, got an empty one")
    return [text.encode("utf-8", "surrogateescape") for text in texts]


def _print_stream(prompt: bytes, stream: Generation) -> None:
    """Write the text as it comes; bytes that are not UTF-8 become replacement characters."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    print(decoder.decode(prompt), end="", flush=True)
    for token in stream:
        print(decoder.decode(bytes([token])), end="", flush=True)
    print(decoder.decode(b"", final=True))


def _print_batch(prompts: list[bytes], generation: Generation) -> None:
    """Write each text under its number, in order, once it and those before it have ended."""
    shown = 0
    while shown < len(prompts):
        row = next(generation, None)
        while shown < len(prompts) and (row is None or generation.finished(shown)):
            text = prompts[shown] + bytes(generation.new[shown])
            print(f"=== {shown + 1} of {len(prompts)} ===")
            print(text.decode("utf-8", "replace"), end="\n\n", flush=True)
            shown += 1


if __name__ == "__main__":
    sys.exit(main())
