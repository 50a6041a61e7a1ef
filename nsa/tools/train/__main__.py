"""Trains a byte-level language model on real text: ``python -m nsa.tools.train``.

A run is a folder (``--out``)::

    config.json      the resolved configuration
    metrics.jsonl    loss, gradient norm, learning rate, speed, validation loss
    checkpoints/     see nsa.training.checkpoint

``--resume`` goes on bit for bit: on a CPU with the same number of threads, on a GPU as far as its
kernels are deterministic, and with the same ``--compile``; another may be given, and is noted. One
process at a time may write to a run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nsa.errors import CheckpointError
from nsa.tools.common.cli import EXIT_INTERRUPTED, run
from nsa.tools.train.display import Display, print_result
from nsa.tools.train.flags import run_config, train_parser
from nsa.training.atomic_files import replace_atomically
from nsa.training.baselines import baselines
from nsa.training.checkpoint import CheckpointStore, load_checkpoint
from nsa.training.compile import Compilation
from nsa.training.config import RunConfig
from nsa.training.data import Corpus, load_corpus, require_length
from nsa.training.loop import fit
from nsa.training.trainer import GROUPS, Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    given = vars(train_parser().parse_strictly(argv))
    out = Path(given.pop("out", "runs/train"))
    resume = given.pop("resume", False)
    cache = given.pop("compile_cache", None)
    checkpoint = None
    if resume:
        stored = _stored_config(out)
        config = run_config(given, stored)
        _refuse_differences(out, stored, config)
        store = CheckpointStore(out / "checkpoints", keep=config.train.keep)
        latest = store.latest()
        if latest is not None:
            checkpoint = load_checkpoint(latest, GROUPS)
            _refuse_differences(out, RunConfig.from_dict(checkpoint.state["config"]), config)
    else:
        _refuse_existing(out)
        config = run_config(given)
        store = CheckpointStore(out / "checkpoints", keep=config.train.keep)

    compilation = Compilation(config.train.compile, torch.device(config.train.device), cache)
    corpus = load_corpus(config.train.data)
    require_length(corpus, config.train.seq_len)
    trainer = Trainer(config, corpus)
    if checkpoint is not None:
        trainer.restore(checkpoint)
        before, now = checkpoint.state["threads"], torch.get_num_threads()
        if trainer.device.type == "cpu" and before != now:
            print(
                f"note: saved with {before} threads, going on with {now}: results may differ in "
                "the last bits"
            )
        saved = RunConfig.from_dict(checkpoint.state["config"])
        for difference in saved.rounding_differences(config):
            print(f"note: going on with {difference}: results may differ in the last bits")
    out.mkdir(parents=True, exist_ok=True)  # before minutes of training, not after
    _describe(out, config, corpus, trainer)
    display = Display(step=trainer.step, steps=config.train.steps)
    with display.bar:

        def started() -> None:
            compilation.ready(display.line, "step" if steps_left else "validation")
            display.line(f"backend      {_backend(trainer)}")
            data = json.dumps(config.to_dict(), indent=1) + "\n"
            replace_atomically(out / "config.json", data.encode())

        steps_left = trainer.step < config.train.steps
        compilation.begin(display.line)
        with compilation.failures():
            validation_loss = fit(
                trainer,
                store=store,
                metrics_path=out / "metrics.jsonl",
                display=display,
                started=started,
                validated=lambda: compilation.keep(display.line),
            )
    if validation_loss is None:
        print(f"stopped and saved at step {trainer.step}; go on with: {_resume_command(out)}")
        return EXIT_INTERRUPTED
    counted = baselines(corpus, count=config.train.eval_windows, seq_len=config.train.seq_len)
    print_result(validation_loss, counted)
    return 0


def _stored_config(out: Path) -> RunConfig:
    path = out / "config.json"
    try:
        return RunConfig.from_dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise CheckpointError(
            f"--resume: expected a run in {out}, got no config.json; start one without --resume"
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:  # JSON, or what it holds
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _refuse_differences(out: Path, stored: RunConfig, config: RunConfig) -> None:
    differences = stored.differences(config)
    if differences:
        raise CheckpointError(
            f"{out} holds a run of another configuration: {', '.join(differences)} "
            "(stored -> asked for); drop those flags, or choose another --out"
        )


def _refuse_existing(out: Path) -> None:
    for name in ("config.json", "checkpoints"):
        if (out / name).exists():
            raise CheckpointError(
                f"{out} already holds a run: expected --resume to go on with it, or another --out"
            )


def _resume_command(out: Path) -> str:
    return f"python -m nsa.tools.train --out {out} --resume"


def _describe(out: Path, config: RunConfig, corpus: Corpus, trainer: Trainer) -> None:
    """Prints the resolved configuration, every value of it."""
    parts = config.to_dict()
    nsa = parts["model"].pop("nsa")
    threads = f", {torch.get_num_threads()} threads" if trainer.device.type == "cpu" else ""
    resumed = f", going on from step {trainer.step}" if trainer.step else ""
    print(f"run          {out}{resumed}")
    print(
        f"data         {corpus.source}: {len(corpus.train):,} bytes to train on "
        f"({corpus.train_files} files), {len(corpus.validation):,} to validate "
        f"({corpus.validation_files}), {corpus.skipped} files skipped"
    )
    print(f"model        {_line(parts['model'])}, {trainer.model.num_parameters():,} parameters")
    print(f"attention    {_line(nsa)}")
    print(f"training     {_line(parts['train'])}")
    print(f"device       {trainer.device}{threads}", flush=True)


def _line(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _backend(trainer: Trainer) -> str:
    """What ran, and why."""
    resolution = trainer.model.resolution
    if resolution is None:
        return "dense: torch.nn.functional.scaled_dot_product_attention"
    branches = ", ".join(f"{step} {name}" for step, name in resolution.per_branch.items())
    return f"{resolution.backend} ({resolution.reason}); {branches}"


if __name__ == "__main__":
    sys.exit(main())
