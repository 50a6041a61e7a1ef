"""SIGKILL at random moments, again and again: the run that is resumed is the one never killed."""

import shutil
import subprocess
import sys

import pytest

from nsa.tools.train.__main__ import main
from nsa.training.files import temporary_of
from tests.support.training_runs import assert_same_run, flags, start, write_texts

# A fork has imported everything already; the parent itself never trains, since threads of a
# parent are not there in its children.
_DRIVER = """
import os, random, signal, sys, time, warnings
from pathlib import Path
import torch._dynamo
from nsa.tools.train.__main__ import main

warnings.simplefilter("ignore")
seed, rounds, folder, *flags = sys.argv[1:]
draw, folder = random.Random(int(seed)), Path(folder)


def child(argv):
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(argv))
    return process


begun = time.monotonic()
assert os.waitpid(child([*flags, "--out", str(folder / "whole")]), 0)[1] == 0
duration = time.monotonic() - begun
for number in range(int(rounds)):
    out = folder / f"killed-{number}"
    kills = 0
    while True:
        argv = ["--resume"] if (out / "config.json").exists() else flags
        process = child([*argv, "--out", str(out)])
        if kills < 5:
            time.sleep(draw.uniform(0, duration if kills else duration / 2))
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.WIFEXITED(status):
            assert os.waitstatus_to_exitcode(status) == 0, status
            break
        kills += 1
    print(kills, flush=True)
"""


@pytest.mark.parametrize(
    ("seed", "rounds"), [(0, 3), pytest.param(1, 50, marks=pytest.mark.slow, id="slow")]
)
def test_killed_at_random_moments(tmp_path, seed, rounds):
    data = write_texts(tmp_path / "data")
    argv = flags(data=data, steps=10, save_every=1, eval_every=5)
    process = start("-c", _DRIVER, seed, rounds, tmp_path, *argv)
    printed, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    kills = [int(line) for line in printed.splitlines()]
    assert len(kills) == rounds
    assert sum(kills) > 0
    for number in range(rounds):
        out = tmp_path / f"killed-{number}"
        assert_same_run(out, tmp_path / "whole")
        left = sorted(path.relative_to(out).as_posix() for path in out.glob("**/*"))
        assert left == sorted(
            path.relative_to(tmp_path / "whole").as_posix()
            for path in (tmp_path / "whole").glob("**/*")
        )


def test_killed_after_its_last_save(tmp_path, monkeypatch):
    """What it had not removed yet goes when it is resumed, though nothing is saved then."""
    out = tmp_path / "run"
    argv = flags(data=write_texts(tmp_path / "data"), steps=2, save_every=1, keep=1)
    assert main([*argv, "--out", str(out)]) == 0
    folder, dead = out / "checkpoints", subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    final = folder / "step-000002"
    with monkeypatch.context() as earlier:
        earlier.setattr("os.getpid", lambda: dead.pid)
        trash = temporary_of(folder / "step-000000").with_suffix(".old.tmp")
    kept = sorted(folder.iterdir())
    for left in (trash, folder / "step-000001"):
        shutil.copytree(final, left)
    assert main(["--resume", "--out", str(out)]) == 0
    assert sorted(folder.iterdir()) == kept
