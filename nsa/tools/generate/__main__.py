"""Samples text from a trained checkpoint: ``python -m nsa.tools.generate``."""

from __future__ import annotations

import codecs
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nsa.errors import CheckpointError, ConfigError
from nsa.models import LanguageModel
from nsa.registry import names
from nsa.tools.common.cli import Parser, choose_device, integer, number, run
from nsa.training.checkpoint import load_checkpoint
from nsa.training.config import RunConfig
from nsa.training.data import SEPARATOR
from nsa.training.trainer import load_model

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
        prog="python -m nsa.tools.generate", description="Sample bytes from a trained model."
    )
    parser.epilog = _EXAMPLES
    add = parser.add_argument
    add("checkpoint", metavar="PATH", help="a run's folder, or one of its checkpoints")
    add("--prompt", default="", help="text to go on from (default: the start of a document)")
    add("--max-new-tokens", type=integer, default=400, metavar="N", help="bytes (default: 400)")
    add("--temperature", type=number, default=0.8, metavar="X", help="0: greedy (default: 0.8)")
    add("--top-k", type=integer, metavar="N", help="sample among the N likeliest bytes")
    add("--top-p", type=number, metavar="X", help="sample among the likeliest bytes of this share")
    add("--seed", type=integer, default=0, metavar="N", help="(default: 0)")
    add(
        "--backend",
        choices=names(),
        help="what computes NSA (default: the settings decide)",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    arguments = parser.parse_strictly(argv)
    device = choose_device(arguments.device)
    if arguments.max_new_tokens < 0:
        raise ConfigError(f"--max-new-tokens: expected an int >= 0, got {arguments.max_new_tokens}")
    check_sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    if not 0 <= arguments.seed < 2**63:
        raise ConfigError(f"--seed: expected an int in [0, 2**63), got {arguments.seed}")

    model, context = _load(Path(arguments.checkpoint), arguments.backend, device)
    prompt = arguments.prompt.encode("utf-8", "surrogateescape")
    stream = generate(
        model,
        SEPARATOR + prompt,
        max_new_tokens=arguments.max_new_tokens,
        context=context,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    _print_stream(prompt, stream)
    return 0


def _load(path: Path, backend: str | None, device: torch.device) -> tuple[LanguageModel, int]:
    """The model of a checkpoint, and the length that it was trained on."""
    checkpoint = load_checkpoint(path, ("model",))
    try:
        config = RunConfig.from_dict(checkpoint.state["config"])
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{checkpoint.path}: unusable configuration: {error}") from error
    if config.model.attention == "dense" and backend is not None:
        raise ConfigError(f"--backend: expected none for a dense model, got {backend!r}")
    model = LanguageModel(config.model, backend=backend, device=device)
    load_model(model, checkpoint)
    return model.eval(), config.train.seq_len


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuses what :func:`sample` cannot do.

    Raises:
        ConfigError: naming the flag.
    """
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"--temperature: expected a finite number >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"--top-k: expected an int >= 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"--top-p: expected a number in (0, 1], got {top_p}")


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: bytes,
    *,
    max_new_tokens: int,
    context: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yields one byte after the other, each from a full forward over what stands before it.

    Args:
        model: of bytes; runs on its own device.
        prompt: at least one byte.
        max_new_tokens: where to stop, unless the model ends the document before.
        context: the most bytes that the model looks back on: it knows no longer positions than it
            was trained on.
        temperature: as in :func:`sample`.
        top_k: as in :func:`sample`.
        top_p: as in :func:`sample`.
        seed: the same seed gives the same bytes on the same machine.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        window = torch.tensor([tokens[-context:]], device=device)
        logits = model(window)[0, -1].double().cpu()
        token = sample(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
        )
        if token == SEPARATOR[0]:
            return
        tokens.append(token)
        yield token


def sample(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """Draws one token.

    Args:
        logits: ``[C]`` on the CPU.
        temperature: divides the logits; 0 takes the likeliest token (the first of equals).
        top_k: keep this many of the likeliest tokens; None keeps all.
        top_p: then keep the likeliest tokens whose shares add up to at least this; None keeps all.
        generator: the source of randomness.

    Returns:
        The token's number.
    """
    if temperature == 0:
        return int(logits.argmax())
    # Sorted stably: equal logits keep their order, and nothing depends on topk's.
    ordered, order = (logits / temperature).sort(descending=True, stable=True)
    if top_k is not None:
        ordered = ordered[:top_k]
    shares = ordered.softmax(0)
    if top_p is not None:
        before = shares.cumsum(0) - shares
        shares = shares[before < top_p]
    return int(order[torch.multinomial(shares, 1, generator=generator)])


def _print_stream(prompt: bytes, stream: Iterator[int]) -> None:
    """Writes the text as it comes; bytes that are not UTF-8 become replacement characters."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    print(decoder.decode(prompt), end="", flush=True)
    for token in stream:
        print(decoder.decode(bytes([token])), end="", flush=True)
    print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    sys.exit(main())
