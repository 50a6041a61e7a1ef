"""A run on a mesh is the run of one process: its losses, its checkpoints, what it refuses."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa.tools.train import __main__ as train
from nsa.training.checkpoint import load_checkpoint
from nsa.training.trainer import GROUPS
from tests.support.launching import error_of, launch, run_tool
from tests.support.training_runs import flags, metrics, write_texts

RUN = {"num_heads": 4, "num_kv_heads": 2, "batch_size": 4, "eval_windows": 5, "steps": 8}
MESHES = {
    "cp": (2, ["--cp", 2]),
    "tp": (2, ["--tp", 2]),
    "dp of 4": (4, []),
    "dp and cp": (4, ["--dp", 2, "--cp", 2]),
    "tp and cp": (4, ["--tp", 2, "--cp", 2]),
    "dp and tp": (4, ["--dp", 2, "--tp", 2]),
}
LEFT_OUT = {
    "dp and tp": ("--recompute", "--log-attention-every", "--compile"),
    "dp and cp": ("--attention", "--compile", "--log-attention-every"),
}
"""What is refused; and to compile on four processes takes minutes (test_shards.py has that)."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run of one process, never interrupted; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    assert train.main([*flags(data=data, **RUN), "--out", str(out)]) == 0
    return out


def assert_same_curve(run: Path, other: Path) -> None:
    """Every number of the metrics within rounding, and every tensor of the last checkpoint."""
    mine, theirs = metrics(run), metrics(other)
    assert [line.keys() for line in mine] == [line.keys() for line in theirs]
    for one, two in zip(mine, theirs, strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    one, two = (load_checkpoint(path, GROUPS) for path in (run, other))
    assert one.step == two.step
    assert one.state["data"] == two.state["data"]
    assert one.state["rng"] == two.state["rng"]
    for group in GROUPS:
        assert one.tensors[group].keys() == two.tensors[group].keys()
        for name, x in one.tensors[group].items():
            torch.testing.assert_close(x, two.tensors[group][name], rtol=1e-3, atol=1e-4)


def test_a_mesh_changes_no_number_and_any_mesh_resumes(
    tmp_path: Path, data: Path, alone: Path
) -> None:
    """Saved on 2 processes, resumed on 4, then on 1, from where the data was."""
    out = tmp_path / "run"
    told = run_tool(2, [*flags(data=data, **RUN), "--out", out])
    assert [rank.code for rank in told] == [0, 0]
    assert_same_curve(out, alone)
    assert ", 2 processes: dp 2, cp 1, tp 1" in told[0].out
    assert told[1].out == ""  # rank 0 alone prints
    assert told[1].errors == []
    suffixes = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".jsonl", ""}  # nothing is pickled

    def cut(step: int) -> None:
        """Go back to a checkpoint, as if the process had ended right after it."""
        for folder in (out / "checkpoints").glob("step-*"):
            if int(folder.name[5:]) > step:
                shutil.rmtree(folder)
        (out / "checkpoints" / "latest").write_text(f"step-{step:06d}\n")

    cut(4)
    told = run_tool(4, ["--out", out, "--resume", "--dp", 2, "--tp", 2])
    assert [rank.code for rank in told] == [0] * 4
    assert "resuming from step 4" in told[0].out
    note = (
        "note: saved on a mesh {'dp': 2, 'cp': 1, 'tp': 1}, resuming on {'dp': 2, 'cp': 1, 'tp': 2}"
    )
    assert note in told[0].out
    assert_same_curve(out, alone)
    cut(4)
    assert train.main(["--out", str(out), "--resume"]) == 0
    assert_same_curve(out, alone)


def test_a_checkpoint_of_one_process_resumes_on_several(
    tmp_path: Path, data: Path, alone: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    shutil.rmtree(out / "checkpoints" / "step-000008")
    (out / "checkpoints" / "latest").write_text("step-000004\n")
    assert [rank.code for rank in run_tool(2, ["--out", out, "--resume", "--tp", 2])] == [0, 0]
    assert_same_curve(out, alone)


@pytest.mark.parametrize(
    "mesh",
    [name if name == "cp" else pytest.param(name, marks=pytest.mark.slow) for name in MESHES],
)
def test_every_mesh_has_the_same_curve(tmp_path: Path, data: Path, alone: Path, mesh: str) -> None:
    size, sizes = MESHES[mesh]
    told = run_tool(size, [*flags(data=data, **RUN), *sizes, "--out", tmp_path / "run"])
    assert [rank.code for rank in told] == [0] * size, told
    assert_same_curve(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--accumulate", "2"],
        ["--activation-checkpointing"],
        ["--recompute"],
        ["--precision", "bf16"],
        ["--attention", "dense"],
        ["--compile", "blocks"],
        ["--log-attention-every", "3"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("mesh", ["dp of 2", "dp and tp", "dp and cp"])
def test_options_on_a_mesh(tmp_path: Path, data: Path, mesh: str, options: list[str]) -> None:
    size, sizes = MESHES.get(mesh, (2, []))
    if options[0] in LEFT_OUT.get(mesh, ()):
        pytest.skip("left out")
    argv = [*flags(data=data, **RUN), *options]
    run_tool(1, [*argv, "--out", tmp_path / "alone"])
    told = run_tool(size, [*argv, *sizes, "--out", tmp_path / "run"])
    assert [rank.code for rank in told] == [0] * size, told
    mine, theirs = metrics(tmp_path / "run"), metrics(tmp_path / "alone")
    precise = "bf16" not in options
    for line in (*mine, *theirs):
        line.pop("attention.seconds", None)
    for one, two in zip(mine, theirs, strict=True):
        assert one == pytest.approx(two, rel=1e-4 if precise else 0.02)


# Signals and kills


def wait_for(out: Path, step: int, launched: Any) -> None:
    deadline = time.monotonic() + 60
    while not (
        (out / "metrics.jsonl").exists() and metrics(out)[-1:] and metrics(out)[-1]["step"] >= step
    ):
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in launched.ranks), launched.wait()
        time.sleep(0.01)


def test_a_signal_to_one_process_saves_and_stops_all(
    tmp_path: Path, data: Path, alone: Path
) -> None:
    out = tmp_path / "run"
    argv = [*flags(data=data, **RUN), "--out", str(out)]
    with launch(*[argv] * 2) as launched:
        wait_for(out, 1, launched)
        os.kill(launched.ranks[1].pid, signal.SIGTERM)
        told = launched.wait()
    assert [rank.code for rank in told] == [130, 130]
    assert (
        f"resume with: torchrun --nproc-per-node 2 -m nsa.tools.train --out {out} --resume"
        in told[0].out
    )
    assert load_checkpoint(out, ()).step < 8
    run_tool(2, ["--out", out, "--resume"])
    assert_same_curve(out, alone)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow, id="slow")])
def test_killed_at_random_times(tmp_path: Path, data: Path, alone: Path, seed: int) -> None:
    """kill −9 of one of two ranks: the other ends with one line, and the run goes on as it was."""
    draw, killed = random.Random(seed), 0
    for number in range(10 if seed else 1):
        out = tmp_path / f"run-{number}"
        argv = [*flags(data=data, **RUN, save_every=2), "--out", str(out)]
        victim = draw.randrange(2)
        with launch(*[argv] * 2) as launched:
            if seed:
                while not out.exists():
                    time.sleep(0.01)
                time.sleep(draw.uniform(0.0, 2.0))
            else:
                wait_for(out, 3, launched)
            launched.ranks[victim].kill()
            begun = time.monotonic()
            told = launched.wait()
        took = time.monotonic() - begun
        if told[victim].code == 0:  # it had ended
            continue
        killed += 1
        assert took < 30
        assert told[1 - victim].code == 2
        (line,) = told[1 - victim].errors
        assert line == (
            f"error: rank {victim} of 2 processes is gone (killed, or it lost its machine); the "
            "others have ended, too; --resume continues from the last checkpoint"
        )
        resume = ["--resume"] if (out / "config.json").exists() else argv
        assert [rank.code for rank in run_tool(2, [*resume, "--out", out])] == [0, 0]
        assert_same_curve(out, alone)
    assert killed


# What is refused


def test_one_line_from_one_process(tmp_path: Path, data: Path, alone: Path) -> None:
    out = tmp_path / "run"
    argv = [*flags(data=data, **RUN), "--out", str(out)]

    def told(size: int, *more: object) -> str:
        return error_of(run_tool(size, [*argv, *more]))

    assert told(2, "--dp", 4) == (
        "--dp 4 --cp 1 --tp 1: expected 4 processes, got 2; start it with torchrun "
        "--nproc-per-node 4 -m …"
    )
    assert told(3, "--tp", 2) == (
        "--cp 1 --tp 2: expected 2 processes or a multiple of that, got 3; start it with torchrun "
        "--nproc-per-node 2 -m …"
    )
    assert told(4, "--tp", 4) == "--tp: expected a divisor of --num-kv-heads 2 (1, 2), got 4"
    assert told(2, "--batch-size", 3, "--accumulate", 2) == (
        "--batch-size: expected a multiple of --dp 2, got 3; --batch-size 2 --accumulate 3 (as "
        "many sequences in a step) would fit, or --dp 1, 3"
    )
    assert told(4, "--batch-size", 6) == (
        "--batch-size: expected a multiple of --dp 4, got 6; --batch-size 4 or --batch-size 8 "
        "would fit, or --dp 1, 2, 3, 6"
    )
    assert told(2, "--cp", 2, "--seq-len", 50) == (
        "--seq-len: expected a multiple of 4 with --cp 2, got 50"
    )
    assert told(2, "--cp", 2, "--attention", "dense") == (
        "--cp: expected 1 with --attention dense, got 2"
    )
    assert told(2, "--tp", 2, "--recompute") == (
        "--recompute: expected none with --tp 2 (--activation-checkpointing computes again, too), "
        "got True"
    )
    assert told(2, "--device", "cuda:1").startswith("--device: expected a device of this machine")
    assert told(2, "--lrr", 1) == "expected a known flag, got --lrr; did you mean --lr?"
    assert told(2, "--tp", 0) == "--tp: expected an int >= 1, got 0"
    assert told(2, "--compile", "model") == (
        "--compile: expected none or blocks on several processes, got model"
    )
    assert not out.exists()

    other = tmp_path / "other"
    shutil.copytree(alone, other)
    weights = other / "checkpoints" / "step-000008" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    error = error_of(run_tool(2, ["--out", other, "--resume"]))
    assert error == f"{weights} is damaged: its SHA-256 is not the one in manifest.json"
    error = error_of(run_tool(2, ["--out", alone, "--resume", "--dim", 64]))
    assert error.startswith(f"{alone} holds a run of another configuration: dim 32 -> 64")


def test_other_commands_or_data_on_another_rank(tmp_path: Path, data: Path) -> None:
    argv = [*flags(data=data, **RUN), "--out", str(tmp_path / "run")]
    other = write_texts(tmp_path / "data", files=9)
    same = "expected the same command, configuration and data on every process, got"
    for more, text in (
        (["--lr", "0.5"], "--lr None on rank 0 and 0.5 on rank 1"),
        (["--tp", "2"], "--tp None on rank 0 and 2 on rank 1"),
        (["--data", str(other)], f"--data '{data}' on rank 0 and '{other}' on rank 1"),
    ):
        with launch(argv, [*argv, *more]) as launched:
            assert error_of(launched.wait()) == f"{same} {text}"


def test_a_mesh_without_torchrun(tmp_path: Path, data: Path, capsys: Any) -> None:
    argv = [*flags(data=data, **RUN), "--out", str(tmp_path / "run"), "--dp", "2"]
    assert train.main(argv) == 2
    assert capsys.readouterr().err == (
        "error: --dp 2 --cp 1 --tp 1: expected 2 processes, got 1; start it with torchrun "
        "--nproc-per-node 2 -m …\n"
    )


def test_one_process_says_nothing_of_a_mesh(alone: Path) -> None:
    """Its files are those of a version without meshes."""
    assert "mesh" not in load_checkpoint(alone, ()).state
    config = json.loads((alone / "config.json").read_text())
    assert not {"dp", "cp", "tp"} & config["train"].keys()
