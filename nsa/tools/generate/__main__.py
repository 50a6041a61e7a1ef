"""Samples text from a trained checkpoint: ``python -m nsa.tools.generate``."""

from __future__ import annotations

import argparse
import codecs
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from nsa.errors import ConfigError
from nsa.models import GenerationConfig, LanguageModel, generate
from nsa.tools.common.cli import Parser, add_backend_and_device, add_fields, choose_device, run
from nsa.training.checkpoint import load_checkpoint
from nsa.training.data import SEPARATOR
from nsa.training.memory import require_memory_to_load
from nsa.training.trainer import config_of, load_model

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

    model, context = _load(path, backend, device)
    text = prompt.encode("utf-8", "surrogateescape")
    stream = generate(model, SEPARATOR + text, config, context=context, stop=SEPARATOR[0])
    _print_stream(text, stream)
    return 0


def _load(path: Path, backend: str | None, device: torch.device) -> tuple[LanguageModel, int]:
    """Load the model of a checkpoint; also returns the length that it was trained on."""
    checkpoint = load_checkpoint(path, ("model",))
    config = config_of(checkpoint)
    if config.model.attention == "dense" and backend is not None:
        raise ConfigError(f"--backend: expected none for a dense model, got {backend!r}")
    require_memory_to_load(config.model)
    model = LanguageModel(config.model, backend=backend, device=device)
    load_model(model, checkpoint)
    return model.eval(), config.train.seq_len


def _print_stream(prompt: bytes, stream: Iterator[int]) -> None:
    """Write the text as it comes; bytes that are not UTF-8 become replacement characters."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    print(decoder.decode(prompt), end="", flush=True)
    for token in stream:
        print(decoder.decode(bytes([token])), end="", flush=True)
    print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    sys.exit(main())
