"""Trains a byte-level language model on real text: ``python -m nsa.tools.train``.

A run is a folder (``--out``)::

    config.json      the resolved configuration
    metrics.jsonl    loss, gradient norm, learning rate, speed, validation loss
    checkpoints/     see nsa.training.checkpoint

``--resume`` continues bit for bit: on a CPU with the same number of threads, on a GPU as far as its
kernels are deterministic, and with the same ``--compile``; another may be given, and is noted. The
folder is locked while a run trains in it; the file ``lock`` names the process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nsa.tools.common.cli import EXIT_INTERRUPTED, run
from nsa.tools.common.streams import OutputLost
from nsa.tools.train.display import Display, print_header, print_result
from nsa.tools.train.flags import run_config, train_parser
from nsa.training.data import baselines
from nsa.training.run import Run, stored_config


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    given = vars(train_parser().parse_strictly(argv))
    out, resume = Path(given.pop("out", "runs/train")), given.pop("resume", False)
    cache = given.pop("compile_cache", None)
    config = run_config(given, stored_config(out) if resume else None)
    training = Run(out, config, resume=resume, compile_cache=cache)
    for note in training.notes:
        print(note)
    out.mkdir(parents=True, exist_ok=True)  # before minutes of training, not after
    print_header(training)
    display = Display(step=training.trainer.step, steps=config.train.steps)
    with display.bar:
        validation_loss = training.train(display)
    if validation_loss is None:
        command = f"python -m nsa.tools.train --out {out} --resume"
        text = f"stopped and saved at step {training.trainer.step}; resume with: {command}"
        if display.lost is not None:
            raise OutputLost(display.lost.name, display.lost.reason, text)
        print(text)
        return EXIT_INTERRUPTED
    train = config.train
    counted = baselines(training.corpus, count=train.eval_windows, seq_len=train.seq_len)
    print_result(validation_loss, counted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
