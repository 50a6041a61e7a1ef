"""What the tests of the tools share: a folder of text, a small run, processes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsa.tools.train import __main__ as train
from nsa.tools.train.flags import run_config, train_parser
from nsa.training.checkpoint import load_checkpoint
from nsa.training.config import RunConfig
from nsa.training.trainer import GROUPS

MODEL = {
    "dim": 32,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "compress_block": 8,
    "compress_stride": 4,
    "select_block": 8,
    "num_selected": 3,
    "window": 16,
}
TRAINING = {
    "seq_len": 48,
    "batch_size": 2,
    "steps": 12,
    "warmup": 2,
    "eval_every": 6,
    "eval_windows": 4,
    "save_every": 4,
    "log_every": 1,
    "device": "cpu",
}


def flags(**changes: object) -> list[str]:
    """The command line of a small run, with changes."""
    return [
        part
        for name, value in {**MODEL, **TRAINING, **changes}.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]


def write_texts(folder: Path, files: int = 8) -> Path:
    """A folder of English-looking text, always the same."""
    words = ("sparse", "attention", "reads", "few", "keys", "and", "a", "gate", "mixes", "them")
    source = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        text = " ".join(source.choice(words) for _ in range(400))
        (folder / f"{number}.txt").write_text(text)
    return folder


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics, without the speed, which no two runs share."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
    return lines


def assert_same_run(run: Path, other: Path, *, with_metrics: bool = True) -> None:
    """Bit for bit: metrics, weights, optimizer, random state."""
    assert not with_metrics or metrics(run) == metrics(other)
    mine, theirs = (load_checkpoint(path, GROUPS) for path in (run, other))
    assert mine.step == theirs.step
    assert mine.state["rng"] == theirs.state["rng"]
    for group in GROUPS:
        assert mine.tensors[group].keys() == theirs.tensors[group].keys()
        for name, tensor in mine.tensors[group].items():
            assert torch.equal(tensor, theirs.tensors[group][name]), name


def start(*arguments: object) -> "subprocess.Popen[str]":
    """Python in a process of its own, with as many threads as this one (sums depend on it)."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


def config_of(data: Path, **changes: object) -> RunConfig:
    """The configuration of a small run."""
    return run_config(vars(train_parser().parse_strictly(flags(data=data, **changes))))


def error_of(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The one line on stderr of a training command that must fail with exit code 2."""
    capsys.readouterr()
    assert train.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")
