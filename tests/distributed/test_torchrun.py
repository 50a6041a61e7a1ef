"""``torchrun`` itself: a killed process ends the others, with one line that says so."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.training_runs import flags, metrics, write_texts

ROOT = Path(__file__).parents[2]
RUN = {"num_heads": 4, "num_kv_heads": 2, "batch_size": 4, "steps": 10**6, "save_every": 10**6}


@pytest.fixture
def torchrun(tmp_path: Path):
    """Starts a command on two processes; whatever is left is ended."""
    started = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *launcher, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        children = ranks_of(process.pid)
        for pid in (process.pid, *children.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def ranks_of(parent: int) -> dict[int, int]:
    """The processes that torchrun started, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"PPid:\t{parent}\n" not in (folder / "status").read_text():
                continue
            variables = (folder / "environ").read_bytes().split(b"\0")
            ranks = [x for x in variables if x.startswith(b"RANK=")]
            found |= {int(x[5:]): int(folder.name) for x in ranks}
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds processes in /proc")
def test_a_killed_rank_ends_the_other_within_a_minute(torchrun, tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = flags(data=write_texts(tmp_path / "data"), **RUN)
    process = torchrun("-m", "nsa.tools.train", *argv, "--out", out)
    deadline = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and metrics(out)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = ranks_of(process.pid)
    assert sorted(ranks) == [0, 1]
    begun = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begun < 60
    assert process.returncode != 0
    assert [line for line in errors.splitlines() if line.startswith("error:")] == [
        "error: rank 1 of 2 processes is gone (killed, or it lost its machine); the others have "
        "ended, too; --resume continues from the last checkpoint"
    ], errors
    for pid in ranks.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
def test_diagnose_sums_over_all_processes(torchrun) -> None:
    process = torchrun("-m", "nsa.tools.diagnose", "--all-reduce")
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    lines = printed.splitlines()
    assert [line.rpartition(": ")[0] for line in lines] == [
        "all-reduce over gloo, 2 processes, 1 MiB",
        "all-reduce over gloo, 2 processes, 16 MiB",
    ]
    assert all(line.endswith("GB/s, sums right") for line in lines)
