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
from dataclasses import asdict
from pathlib import Path

import torch

from nsa.distributed.mesh import Mesh, MeshConfig
from nsa.distributed.ranks import LaunchedRanks, Ranks, launched
from nsa.settings import current_settings
from nsa.tools.common.cli import EXIT_INTERRUPTED, fail, run
from nsa.tools.common.streams import OutputLost
from nsa.tools.train.display import Display, print_header, print_result
from nsa.tools.train.flags import mesh_config, run_config, train_parser
from nsa.training.config import RunConfig
from nsa.training.data import baselines
from nsa.training.run import Run, stored_config


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    def lost(text: str) -> None:
        fail(f"{text}; --resume continues from the last checkpoint")

    with launched(lost) as ranks:
        return _train(argv, ranks)


def _train(argv: Sequence[str] | None, ranks: Ranks) -> int:
    given = vars(train_parser().parse_strictly(argv))
    ranks.require_same({f"--{name.replace('_', '-')}": value for name, value in given.items()})
    out, resume = Path(given.pop("out", "runs/train")), given.pop("resume", False)
    cache = given.pop("compile_cache", None)
    stored = ranks.share(lambda: stored_config(out).to_dict()) if resume else None
    config = run_config(given, None if stored is None else RunConfig.from_dict(stored))
    mesh = _mesh(mesh_config(given), config, ranks)
    training = Run(out, config, resume=resume, compile_cache=cache, mesh=mesh)
    for note in training.notes:
        print(note)
    if ranks.leads:
        out.mkdir(parents=True, exist_ok=True)  # before minutes of training, not after
    print_header(training)
    display = Display(step=training.trainer.step, steps=config.train.steps)
    with display.bar:
        validation_loss = training.train(display)
    if validation_loss is None:
        program = "python" if ranks.size == 1 else f"torchrun --nproc-per-node {ranks.size}"
        sizes = training.trainer.mesh.sizes
        flags = "".join(f" --{name} {sizes[name]}" for name in ("cp", "tp") if sizes[name] > 1)
        command = f"{program} -m nsa.tools.train --out {out} --resume{flags}"
        text = f"stopped and saved at step {training.trainer.step}; resume with: {command}"
        if display.lost is not None:
            raise OutputLost(display.lost.name, display.lost.reason, text)
        print(text)
        return EXIT_INTERRUPTED
    if not ranks.leads:
        return 0
    train = config.train
    counted = baselines(training.corpus, count=train.eval_windows, seq_len=train.seq_len)
    print_result(validation_loss, counted)
    return 0


def _mesh(sizes: MeshConfig, config: RunConfig, ranks: Ranks) -> Mesh:
    """The mesh that the processes form, once they are known to want the same."""
    settings = asdict(current_settings())
    ranks.require_same({**settings, **config.flat(), "torch": torch.__version__})
    if isinstance(ranks, LaunchedRanks):
        from nsa.distributed.process_mesh import ProcessMesh

        return ProcessMesh(sizes, ranks, config.train.device)
    sizes.sizes(1)
    return Mesh(torch.device(config.train.device))


if __name__ == "__main__":
    sys.exit(main())
