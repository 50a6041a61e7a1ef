"""Training on 1, 2 and 4 GPUs: tokens/s, memory, time in NCCL, and whether the losses agree.

    python benchmarks/mesh.py                   # all meshes that the GPUs of this machine allow
    python benchmarks/mesh.py --budget-s 200    # start nothing new after so many seconds
    python benchmarks/mesh.py dp2 tp2           # some of them
    python benchmarks/mesh.py --batch-size 16   # sequences of a step; 8 by default
    python benchmarks/mesh.py --device cpu --tiny one dp2 tp2

The "small" model (12 layers, width 768, Hq 12, Hkv 2, D 64) on Python's own source, bf16 autocast,
T = 8192 and as many tokens a step whatever the mesh: the seed, and so the batches, are the same.
Where a process has less to do than the host takes to launch it, the host is what is measured:
batches of 8 are that small on two GPUs, those of 16 are not.
Each mesh is a command of its own, with ``--limit-s`` to end in; one that fails says so and the next
one starts. One JSON line each as they come, then a table:

- tokens/s: of ``--steps`` steps after ``--warm-up``, the median of fours; x: beside one GPU,
  compiled as this one is or not;
- peak GiB: of one GPU, by the allocator, after the first step;
- NCCL: share of a step's time that the kernels of collectives take on rank 0, by torch.profiler
  (they overlap with others: this is no time lost);
- loss: after the last step, and how far any step's loss is from that of one GPU.

What is computed stands on ``tests/distributed`` and ``tests/training/test_mesh.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

MESHES: dict[str, dict[str, int]] = {
    "one": {},
    "dp2": {"dp": 2},
    "tp2": {"tp": 2},
    "dp4": {"dp": 4},
    "dp2tp2": {"dp": 2, "tp": 2},
    "cp2": {"cp": 2},
    "dp2cp2": {"dp": 2, "cp": 2},
}
ORDER = ("one", "dp2", "dp4", "tp2", "dp2tp2", "one+c", "dp2+c", "dp4+c", "cp2", "dp2cp2")
"""With +c: blocks compiled."""
SIZES = {"seq_len": 8192, "batch_size": 8, "lr": 1e-3, "warmup": 10}
TOGETHER = 4
"""Steps that are timed together, as a run has them: the host is not held up after each."""
TINY = {"seq_len": 128, "batch_size": 4, "lr": 1e-3, "warmup": 10}


def mesh_of(name: str) -> dict[str, int]:
    return MESHES[name.partition("+")[0]]


def gpus_of(name: str) -> int:
    sizes = mesh_of(name)
    return sizes.get("dp", 1) * sizes.get("cp", 1) * sizes.get("tp", 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("meshes", nargs="*", metavar="MESH", help=", ".join(ORDER))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="the tiny model and short sequences")
    parser.add_argument("--batch-size", type=int, help="sequences of a step, on all processes")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warm-up", type=int, default=8)
    parser.add_argument("--limit-s", type=float, default=100.0, help="seconds for one mesh")
    parser.add_argument("--budget-s", type=float, default=230.0, help="seconds for all")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments)
        return
    available = torch.cuda.device_count() if arguments.device == "cuda" else 4
    begun, rows = time.monotonic(), []
    if available > 1:
        say(run(["-m", "nsa.tools.diagnose", "--all-reduce", "--device", arguments.device], 2, 60))
    names = list(arguments.meshes or ORDER)
    for name in names:
        left = arguments.budget_s - (time.monotonic() - begun)
        if gpus_of(name) > available:
            continue
        if left < 20:
            print(f"{name}: not started, {arguments.budget_s:.0f} s are spent", flush=True)
            continue
        row = measure(name, arguments, min(left, arguments.limit_s))
        print(json.dumps(row), flush=True)
        rows.append(row)
    table(rows)


def measure(name: str, arguments: argparse.Namespace, limit: float) -> dict[str, Any]:
    """One mesh, in processes of its own."""
    flags = [os.path.abspath(__file__), "--worker", name, "--device", arguments.device]
    flags += ["--steps", str(arguments.steps), "--warm-up", str(arguments.warm_up)]
    flags += ["--tiny"] * arguments.tiny
    if arguments.batch_size is not None:
        flags += ["--batch-size", str(arguments.batch_size)]
    begun = time.monotonic()
    told = run(flags, gpus_of(name), limit)
    seconds = round(time.monotonic() - begun, 1)
    for line in told.splitlines():
        if line.startswith('{"mesh"'):
            return {**json.loads(line), "seconds": seconds}
    return {"mesh": name, "error": why(told) or f"no answer in {limit:.0f} s", "seconds": seconds}


def run(flags: list[str], processes: int, limit: float) -> str:
    """What a command prints, on so many processes; they are all ended after the limit."""
    command = [sys.executable, *flags]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        command = [sys.executable, *launcher, "--nproc-per-node", str(processes), *flags]
    # the root of the repository is what torchrun's processes import from
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=root,
        env=environment,
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        # torchrun ends its workers, which have sessions of their own, when it is asked to
        process.send_signal(signal.SIGTERM)
        try:
            told = process.communicate(timeout=35)[0]
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            told = process.communicate()[0]
        return f"{told}\nerror: more than {limit:.0f} s"


def why(told: str) -> str:
    """The line that says what went wrong."""
    lines = [line for line in told.splitlines() if "rror" in line and "error_file" not in line]
    ours = [line for line in lines if line.startswith("error:")]
    return (ours or lines or [""])[0][:300]


def say(told: str) -> None:
    lines = [line for line in told.splitlines() if line.startswith("all-reduce")]
    print(*(lines or [f"all-reduce: {why(told)}"]), sep="\n", flush=True)


def table(rows: list[dict[str, Any]]) -> None:
    """Every mesh in a line, beside one GPU."""
    done = {row["mesh"]: row for row in rows if "error" not in row}
    print(
        f"\n{'mesh':10} {'GPUs':>4} {'tokens/s':>10} {'x':>6} {'peak GiB':>9} {'NCCL':>6}", end=""
    )
    print(f" {'last loss':>10} {'from one GPU':>13}")
    for row in rows:
        name = row["mesh"]
        if "error" in row:
            print(f"{name:10} {gpus_of(name):4}  {row['error']}")
            continue
        same = done.get("one+c" if "+c" in name else "one")
        speed = same and f"{row['tokens_per_second'] / same['tokens_per_second']:.2f}"
        one = done.get("one")
        apart = one and max(abs(a - b) for a, b in zip(one["losses"], row["losses"], strict=True))
        print(
            f"{name:10} {gpus_of(name):4} {row['tokens_per_second']:10,.0f} {speed or '-':>6} "
            f"{row['peak_gib']:9.2f} {row['nccl']:>6} {row['losses'][-1]:10.4f} "
            f"{'-' if apart is None else f'{apart:.4f}':>13}"
        )


def work(arguments: argparse.Namespace) -> None:
    """One process of one mesh."""
    from nsa.distributed.mesh import Mesh, MeshConfig
    from nsa.distributed.ranks import LaunchedRanks, launched
    from nsa.models import ModelConfig
    from nsa.training.config import PRESETS, RunConfig, TrainConfig
    from nsa.training.data import load_corpus
    from nsa.training.on_mesh import require_mesh
    from nsa.training.trainer import Trainer

    sizes, name = mesh_of(arguments.worker), arguments.worker
    preset = "tiny" if arguments.tiny else "small"
    values = {**PRESETS[preset], **(TINY if arguments.tiny else SIZES)}
    values |= {"data": "stdlib", "device": arguments.device}
    values["steps"] = 1 + arguments.warm_up + arguments.steps
    values["precision"] = "bf16" if arguments.device == "cuda" else "fp32"
    values["compile"] = "blocks" if "+c" in name else "none"
    if arguments.batch_size is not None:
        values["batch_size"] = arguments.batch_size
    config = RunConfig(model=ModelConfig.preset(preset), train=TrainConfig(**values))
    with launched(lambda text: print("error:", text, flush=True)) as ranks:
        if isinstance(ranks, LaunchedRanks):
            from nsa.distributed.process_mesh import ProcessMesh

            mesh: Mesh = ProcessMesh(MeshConfig(**sizes), ranks, arguments.device)
        else:
            mesh = Mesh(torch.device(arguments.device))
        require_mesh(config, mesh.sizes, None)
        trainer = Trainer(config, load_corpus("stdlib"), mesh)
        losses = [trainer.train_step().loss]
        cuda = mesh.device.type == "cuda"
        wait = torch.cuda.synchronize if cuda else (lambda: None)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        losses += [trainer.train_step().loss for _ in range(arguments.warm_up)]
        times = []
        for _ in range(arguments.steps // TOGETHER):
            wait()
            begun = time.perf_counter()
            losses += [trainer.train_step().loss for _ in range(TOGETHER)]
            wait()
            times.append((time.perf_counter() - begun) / TOGETHER)
        step = statistics.median(times)
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        share = nccl_share(trainer, step) if cuda and ranks.size > 1 else "-"
        row = {
            "mesh": name,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "tokens_per_second": round(trainer.tokens_per_step / step),
            "step_ms": round(1e3 * step, 2),
            "peak_gib": round(peak, 2),
            "nccl": share,
            "losses": [round(float(loss), 5) for loss in losses],
        }
        print(json.dumps(row), flush=True)


def nccl_share(trainer: Any, step: float) -> str:
    """The kernels of collectives in a step, as a share of its time."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            trainer.train_step()
            torch.cuda.synchronize()
    except RuntimeError:  # a profiler that does not work here
        return "?"
    taken = sum(
        event.device_time_total for event in found.key_averages() if "nccl" in event.key.lower()
    )
    return f"{taken / 1e6 / step:.0%}"


if __name__ == "__main__":
    main()
