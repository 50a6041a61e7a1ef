"""The ``sdpa`` backend on a CPU: time and memory beside dense causal attention, in one run.

    python benchmarks/sdpa_cpu.py

Hq 8, Hkv 2, D 64, fp32, B 1, random inputs, selection included, gates included, φ not. Every figure
is taken in a process of its own; times are medians. The backend is held to the oracle by
``tests/backends/test_parity.py``.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from nsa import NSAConfig, nsa_attention
from nsa.testing import make_inputs

CONFIG = NSAConfig(num_heads=8, num_kv_heads=2, head_dim=64)


def peak_gib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed(call: Callable[[], object], runs: int) -> float:
    """Median seconds of ``runs`` calls, after one that is not counted."""
    call()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def memory(length: int) -> dict[str, float]:
    """How far one forward and backward raise the peak of a fresh process, GiB."""
    inputs = make_inputs(CONFIG, length=length)
    before = peak_gib()
    out = run(inputs)
    torch.autograd.grad(out, inputs.leaves(), inputs.dout)
    return {"raised_gib": peak_gib() - before, "before_gib": before}


def backward(length: int, runs: int) -> dict[str, float]:
    """Seconds of forward (with the graph kept) and of backward."""
    inputs = make_inputs(CONFIG, length=length)
    forward = timed(lambda: run(inputs), runs)
    out = run(inputs)
    back = timed(
        lambda: torch.autograd.grad(out, inputs.leaves(), inputs.dout, retain_graph=True), runs
    )
    return {"forward_s": forward, "backward_s": back, "ratio": back / forward}


def versus_dense(length: int, runs: int) -> dict[str, float]:
    """Seconds of the NSA forward and of dense causal attention over the same heads."""
    inputs = make_inputs(CONFIG, length=length)
    q, k, v = (x.detach().transpose(1, 2) for x in (inputs.q, *inputs.selected))
    with torch.no_grad():
        sparse = timed(lambda: run(inputs), runs)
        dense = timed(
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), runs
        )
    return {"nsa_s": sparse, "dense_s": dense, "speedup": dense / sparse}


def run(inputs):  # type: ignore[no-untyped-def]
    """The public call on the sdpa backend."""
    parts = inputs.compressed, inputs.selected, inputs.window
    return nsa_attention(inputs.q, *parts, inputs.gates, CONFIG, backend="sdpa")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each call")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "T"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, length = args.one[0], int(args.one[1])
        call = {
            "memory": lambda: memory(length),
            "backward": lambda: backward(length, args.runs),
            "dense": lambda: versus_dense(length, args.runs),
        }[kind]
        print(json.dumps(call()))
        return
    print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, {CONFIG.num_heads} heads on {CONFIG.num_kv_heads}, "
        f"D {CONFIG.head_dim}, fp32"
    )
    jobs = [("memory", 8192), ("backward", 8192)]
    jobs += [("dense", length) for length in (4096, 8192, 16384, 32768)]
    for kind, length in jobs:
        command = [sys.executable, __file__, "--one", kind, str(length), "--runs", str(args.runs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        figures = json.loads(done.stdout)
        row = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        print(f"T = {length:6d}  {kind:9s} {row}", flush=True)


if __name__ == "__main__":
    main()
