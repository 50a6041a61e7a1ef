"""Whether training on sequences of many lengths makes the CUDA allocator grow.

    python benchmarks/allocator.py
    python benchmarks/allocator.py --steps 400 --compile blocks

Each allocator setting is a process of its own, which trains a model of 4 layers, 768 wide, heads
12/2:64, bf16 autocast: ``--steps`` steps after a warm-up of two passes over every length. A step is
about 32,768 tokens of one length, drawn anew from 24 between 256 and 16,384; every fourth step is
packed. The table has, after the warm-up and at the most later, the bytes that the allocator has
reserved and its segments (``torch.cuda.memory_stats``); "flat" if neither grew. Exit code 1 if one
grew.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from typing import Any

SETTINGS = {
    "default": None,
    "expandable_segments": "expandable_segments:True",
    "max_split_size_mb:512": "max_split_size_mb:512",
    "both": "expandable_segments:True,max_split_size_mb:512",
}
"""Values of ``PYTORCH_CUDA_ALLOC_CONF``."""
TOKENS, LENGTHS = 32768, [int(256 * 64 ** (i / 23)) for i in range(24)]
MIB = 2**20


def train(steps: int, compiled: bool) -> dict[str, Any]:
    """Figures of this process's allocator."""
    import torch

    from nsa.models import LanguageModel, ModelConfig

    device = torch.device("cuda")
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig.preset("small", num_layers=4), device=device).train()
    if compiled:
        model.compile_blocks(dynamic=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    draw = random.Random(0)

    def step(length: int, packed: bool) -> None:
        shape = (max(1, TOKENS // length), length)
        where: dict[str, Any] = {}
        if packed:
            ends = torch.arange(0, shape[0] * length + 1, length, dtype=torch.int32, device=device)
            where, shape = {"cu_seqlens": ends, "max_seqlen": length}, (1, shape[0] * length)
        tokens = torch.randint(0, 256, shape, device=device)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.loss(tokens, tokens.roll(-1, 1), **where)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for packed in (False, True):
        for length in (*LENGTHS, *LENGTHS):
            step(length, packed)
    torch.cuda.synchronize()
    seen, begun = [], time.perf_counter()
    seconds = []
    for i in range(steps + 1):
        stats = torch.cuda.memory_stats()
        seen.append((stats["reserved_bytes.all.current"], stats["segment.all.current"]))
        if i < steps:
            step(draw.choice(LENGTHS), i % 4 == 3)
            torch.cuda.synchronize()
            now = time.perf_counter()
            seconds.append(now - begun)
            begun = now
    stats = torch.cuda.memory_stats()
    reserved, segments = (list(column) for column in zip(*seen, strict=True))
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "reserved_mib": [round(x / MIB) for x in (reserved[0], max(reserved))],
        "segments": [segments[0], max(segments)],
        "allocated_peak_mib": round(stats["allocated_bytes.all.peak"] / MIB),
        "retries": stats["num_alloc_retries"],
        "step_ms": round(1e3 * statistics.median(seconds), 1),
    }


def attempt(conf: str | None, arguments: list[str]) -> dict[str, Any]:
    """Run :func:`train` in a process with that setting."""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_ALLOC_CONF")}
    if conf is not None:
        environment["PYTORCH_CUDA_ALLOC_CONF"] = conf
    command = [sys.executable, __file__, "--worker", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="after the warm-up")
    parser.add_argument("--compile", choices=["none", "blocks"], default="none")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--json", metavar="FILE", help="also write JSON lines there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(train(args.steps, args.compile == "blocks")))
        return 0
    arguments = ["--steps", str(args.steps), "--compile", args.compile]
    rows = []
    for name in args.settings:
        rows.append({"setting": name, **attempt(SETTINGS[name], arguments)})
        print(json.dumps(rows[-1]), flush=True)
    if args.json:
        with open(args.json, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    print("| setting | reserved MiB, after warm-up / most | segments | in use, peak | retries |"
          " ms a step | |\n|---|---|---|---|---|---|---|")  # fmt: skip
    grew = False
    for row in rows:
        if "error" in row:
            print(f"| {row['setting']} | {row['error']} | | | | | failed |")
            grew = True
            continue
        (before, most), (few, many) = row["reserved_mib"], row["segments"]
        flat = most == before and many == few
        grew |= not flat
        print(
            f"| {row['setting']} | {before:,} / {most:,} | {few} / {many} |"
            f" {row['allocated_peak_mib']:,} | {row['retries']} | {row['step_ms']} |"
            f" {'flat' if flat else 'grew'} |"
        )
    return int(grew)


if __name__ == "__main__":
    sys.exit(main())
