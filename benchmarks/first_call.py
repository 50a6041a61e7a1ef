"""How long a layer's first calls take in a fresh process, and an eager step after them.

    python benchmarks/first_call.py
    python benchmarks/first_call.py --layer 4096:64/4:128 --tokens 8192
    python benchmarks/first_call.py --device cpu --tiny

A layer of width 1024, 16/2:64, T 4096, bf16, parameters and input on the device. Three processes,
one after the other, none of which shares anything but cache folders on the disk:

- "empty": folders for Triton's and Inductor's caches that hold nothing;
- "warm": the same folders, filled by the first;
- "step": the same folders; medians of ``--steps`` eager steps.

Seconds, each until the device has finished, in this order: imports (torch, triton and nsa), the
device's first use, then forward and backward at T, the same at another length that is no multiple
of 16, forward without gradients, and forward and backward of a packed batch. "calls" is the sum of
all but the first two; "kernels" of Triton's were compiled or loaded in it. One JSON line for each
process, then a table. Compare with an earlier commit in the same session of one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

PHASES = (
    *("imports", "device", "forward", "backward", "other forward", "other backward"),
    *("no_grad", "packed forward", "packed backward"),
)
CALLS = PHASES[2:]
LAYER, TINY_LAYER = "1024:16/2:64", "64:4/2:16"
TOKENS, TINY_TOKENS = 4096, 300
WARM_UP = 5
"""Steps before those that are timed."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", help=f"width:Hq/Hkv:D, default {LAYER}")
    parser.add_argument("--tokens", type=int, help=f"T, default {TOKENS}")
    parser.add_argument("--steps", type=int, default=50, help="timed eager steps")
    parser.add_argument("--backend", default="compiled")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small layer, to see that it runs")
    parser.add_argument("--phase", choices=("calls", "step"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    given.layer = given.layer or (TINY_LAYER if given.tiny else LAYER)
    given.tokens = given.tokens or (TINY_TOKENS if given.tiny else TOKENS)
    if given.tiny:
        given.steps = min(given.steps, 3)
    return given


def main() -> None:
    given = parse()
    if given.phase is not None:
        print(json.dumps(measure(given)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        }
        for name, phase in (("empty", "calls"), ("warm", "calls"), ("step", "step")):
            begun = time.perf_counter()
            ran = subprocess.run(
                [sys.executable, *sys.argv, "--phase", phase],
                env={**os.environ, **caches},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            row = {"caches": name, **json.loads(ran.stdout.splitlines()[-1])}
            row["process"] = round(time.perf_counter() - begun, 2)
            print(json.dumps(row), flush=True)
            rows.append(row)
    *fresh, step = rows
    print(f"\n{step['machine']}, torch {step['torch']}, {given.layer}, T {given.tokens}, seconds")
    print(f"{'':16}" + "".join(f"{row['caches']:>10}" for row in fresh))
    for name in (*PHASES, "calls", "process", "kernels"):
        print(f"{name:16}" + "".join(f"{row[name]:>10}" for row in fresh))
    for kind in ("", "packed_"):
        ms = f"forward {step[f'{kind}forward_ms']}, with backward {step[f'{kind}step_ms']}"
        launches = step.get(f"{kind}launches", "no GPU's")
        print(f"an eager step, {kind.rstrip('_') or 'regular'}: ms {ms}; {launches} kernels")


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """One process: the seconds of every phase, or milliseconds of a step."""
    laps: dict[str, float] = {}
    last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        if given.device == "cuda" and name != "imports":
            torch.cuda.synchronize()
        now = time.perf_counter()
        laps[name], last = round(now - last, 3), now

    import torch

    import nsa

    if given.device == "cuda":
        import triton  # noqa: F401
    lap("imports")
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    width, heads, head_dim = given.layer.split(":")
    query_heads, kv_heads = map(int, heads.split("/"))
    config = nsa.NSAConfig(num_heads=query_heads, num_kv_heads=kv_heads, head_dim=int(head_dim))
    where = {"device": given.device, "dtype": dtype}
    layer = nsa.NSAttention(int(width), config, backend=given.backend, **where)
    T = given.tokens
    x = torch.randn(1, T, int(width), **where, requires_grad=True)
    other = torch.randn(1, T + T // 4 + 5, int(width), **where, requires_grad=True)
    ends = [0, T // 3, T // 3, T]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=given.device)
    (x @ layer.q_proj.weight.mT).sum().backward()  # the device's libraries
    lap("device")
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
    }
    if given.phase == "step":
        packing = {"cu_seqlens": cu_seqlens, "max_seqlen": T}
        packed = {f"packed_{name}": ms for name, ms in steps(layer, x, packing, given).items()}
        return {**found, **steps(layer, x, {}, given), **packed}
    kernels = count_kernels(given.device)
    for name, tensor, packing in (
        ("", x, {}),
        ("other ", other, {}),
        ("packed ", x, {"cu_seqlens": cu_seqlens, "max_seqlen": T}),
    ):
        if name == "packed ":
            with torch.no_grad():
                layer(x)
            lap("no_grad")
        out = layer(tensor, **packing)
        lap(f"{name}forward")
        out.sum().backward()
        lap(f"{name}backward")
    calls = round(sum(laps[name] for name in CALLS), 2)
    return {**found, **laps, "calls": calls, "kernels": len(kernels)}


def count_kernels(device: str) -> list[str]:
    """A list that the name of every kernel of Triton's is added to as it is compiled or loaded."""
    names: list[str] = []
    if device == "cuda":
        from triton import knobs

        def listen(*, src: Any, **others: Any) -> None:
            names.append(src.name)

        knobs.compilation.listener = listen
    return names


def steps(layer: Any, x: Any, packing: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Medians, of the time that a caller waits: eager steps may be bound by the host."""
    import torch

    def forward() -> None:
        layer(x, **packing)

    def step() -> None:
        layer(x, **packing).sum().backward()

    def median(call: Callable[[], None]) -> float:
        times = []
        for _ in range(WARM_UP + given.steps):
            if given.device == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            call()
            if given.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        return round(1000 * statistics.median(times[WARM_UP:]), 3)

    found: dict[str, Any] = {"forward_ms": median(forward), "step_ms": median(step)}
    if given.device == "cuda":
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            step()
            torch.cuda.synchronize()
        found["launches"] = sum(event.count for event in profiled.key_averages())
    return found


if __name__ == "__main__":
    main()
