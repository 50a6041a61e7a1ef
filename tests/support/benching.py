"""What the tests of ``bench`` share: quick runs, their rows, problems."""

import json

import pytest
import torch

from nsa import NSAConfig
from nsa.tools.bench import __main__ as bench
from nsa.tools.bench import run as bench_run
from nsa.tools.bench.parity import Parity
from nsa.tools.bench.rows import Row
from nsa.tools.bench.timing import Ceilings, Measurement, Timing
from nsa.tools.common.problems import Trial

CPU = torch.device("cpu")
TINY = NSAConfig.preset("tiny")
ODD = NSAConfig(
    num_heads=6,
    num_kv_heads=2,
    head_dim=5,
    value_dim=3,
    compress_block=8,
    compress_stride=4,
    select_block=12,
    num_selected=4,
    window=17,
    rope_theta=None,
)
CEILINGS = Ceilings(
    flops_per_second={"float32": 1e11, "bfloat16": 2e11},
    matmul_size=512,
    bytes_per_second=1e10,
)


def be_quick(monkeypatch):
    """Takes out the machine's ceilings."""
    monkeypatch.setattr(bench, "measure_ceilings", lambda device, dtypes, clock: CEILINGS)


def skip_parity(monkeypatch):
    """Takes out the parity checks, for tests that are about something else."""
    monkeypatch.setattr(bench_run, "backend_parity", lambda name, trial: Parity(0.25))
    monkeypatch.setattr(bench_run, "baseline_parity", lambda baseline, trial: Parity(0.5))


def run(capsys, *argv, lengths="64"):
    """The exit code, stdout and stderr of a run in which everything is timed once or twice."""
    argv = [*argv, "--seconds", "1e-4", "--runs", "1", "--device", "cpu", "--lengths", lengths]
    code = bench.main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def run_jsonl(capsys, tmp_path, *argv, **options):
    """The exit code, the header, the rows and stdout."""
    path = tmp_path / "rows.jsonl"
    code, out, _ = run(capsys, *argv, "--jsonl", str(path), **options)
    lines = [
        json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return code, lines[0], lines[1:], out


def problem(config=TINY, *, dtype=torch.float32, length=64, sequences=0, batch=1):
    """A problem on the CPU."""
    trial = Trial(
        config=config,
        device=CPU,
        dtype=dtype,
        lengths=(0,) * (sequences or batch),
        packed=sequences > 0,
    )
    return trial.with_length(length)


def both(backend, branch, length, seconds, *, runs_on=None, **options):
    """A row whose forward and backward together took so long."""
    timing = Timing(seconds, seconds, seconds, 5)
    return Row(
        trial=problem(length=length, **options),
        backend=backend,
        branch=branch,
        runs_on=runs_on or backend,
        measured=Measurement(both=timing),
    )
