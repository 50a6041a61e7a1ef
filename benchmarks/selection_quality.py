"""What the options of selection do to a model: the loss it is trained to, and the lists it reads.

    python benchmarks/selection_quality.py                                # on a GPU, about 10 min
    python benchmarks/selection_quality.py --runs exact share4 --seeds 0 1 2
    python benchmarks/selection_quality.py --bound --length 65536 --steps 300 --runs exact
    python benchmarks/selection_quality.py --tiny                         # does it run?

Each run is ``python -m nsa.tools.train --preset small`` on the standard library's sources, one
sequence a step, ``--steps`` steps, ``--jobs`` of them at a time; the table has its validation loss
in nats per byte (``--windows`` sequences). Then the exact model of the first seed reads validation
text, and every option makes lists from its queries and compressed keys: the share of the exact
list's blocks that they have, over queries that leave a block out, on average and of the worst.

``--bound`` asks how many tiles of 64 compressed keys an exact search could leave out if it knew
each tile's probability beforehand: those whose sum, over the group, cannot reach what the last
listed block has, for eight neighbouring queries at once.

Runs "gate_bias" and "gate_floor" are exact selection with the compressed branch's gate helped: its
bias starts at 2 (σ(2) = 0.88), or every gate is 0.1 + 0.9 σ.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa import NSAttention, select_blocks
from nsa.core.geometry import num_select_blocks, overlap_weights
from nsa.gates import GATES, GateRow
from nsa.inspection import record
from nsa.inspection.lists import has_choice, listed_blocks, shared_part
from nsa.inspection.recording import Recording, SequenceRecord
from nsa.inspection.scores import block_scores, compressed_probabilities
from nsa.selection.rules import forced_blocks
from nsa.tools.common.models import load_trained
from nsa.tools.train.__main__ import main as train
from nsa.training.data import load_corpus

OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    "schedule": {"select_schedule": ((1024, 6), (4096, 10))},
    "mass50": {"select_mass": 0.5},
    "mass90": {"select_mass": 0.9},
    "share4": {"select_share": 4},
    "share16": {"select_share": 16},
    "regions4x16": {"select_regions": (4, 16)},
    "regions8x8": {"select_regions": (8, 8)},
    "fp8": {"score_dtype": "fp8"},
    "regions4x16+share4": {"select_regions": (4, 16), "select_share": 4},
}
OTHERS = {
    "dense": ["--attention", "dense"],
    "s2048": [
        "--select-block",
        "128",
        "--num-selected",
        "12",
        "--window",
        "256",
        "--num-kv-heads",
        "4",
    ],
    "gate_bias": [],
    "gate_floor": [],
}
TINY = ["--preset", "tiny", "--seq-len", "512", "--precision", "fp32", "--compile", "none"]
TINY += ["--num-selected", "12", "--select-block", "32"]
TILE, ROWS = 64, 8


def flag(name: str, value: Any) -> str:
    """An option of NSAConfig as a flag of ``train``."""
    if name == "select_schedule":
        value = ",".join(f"{p}:{n}" for p, n in value)
    if name == "select_regions":
        value = ",".join(map(str, value))
    return f"--{name.replace('_', '-')}={value}"


def flags(run: str) -> list[str]:
    if run in OTHERS:
        return OTHERS[run]
    return [flag(name, value) for name, value in OPTIONS[run].items()]


def worker(run: str, arguments: list[str]) -> int:
    """``train`` in this process, with a remedy that is no option of it."""
    if run == "gate_bias":
        plain = NSAttention.reset_parameters

        def biased(self: NSAttention) -> None:
            plain(self)
            with torch.no_grad():
                self.gate_proj.bias.view(-1, 3)[:, 0] = 2.0  # type: ignore[union-attr, operator]

        NSAttention.reset_parameters = biased  # type: ignore[method-assign]
    if run == "gate_floor":
        row = GateRow(lambda x: 0.1 + 0.9 * torch.sigmoid(x), in_unit_interval=True)
        GATES["sigmoid"] = row  # type: ignore[index]
    return train(arguments)


def folder(out: Path, run: str, seed: int) -> Path:
    return out / f"{run}-{seed}"


def train_one(args: argparse.Namespace, run: str, seed: int) -> None:
    shape = TINY if args.tiny else ["--preset", "small", "--seq-len", str(args.length)]
    shape += [] if args.tiny else ["--compile", "model"]
    steps = [f"--{name}={args.steps}" for name in ("steps", "save-every", "eval-every")]
    command = [sys.executable, __file__, "--worker", run, *shape, *steps, "--batch-size", "1"]
    command += ["--seed", str(seed), "--eval-windows", str(args.windows), "--log-every", "50"]
    command += ["--out", str(folder(args.out, run, seed)), *flags(run)]
    log = args.out / f"{run}-{seed}.log"
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if code.returncode:
        print(f"{run}, seed {seed}: failed, {log.read_text(encoding='utf-8')[-400:]}", flush=True)


def loss(out: Path, run: str, seed: int) -> float:
    """The last validation loss, NaN if there is none."""
    found = math.nan
    metrics = folder(out, run, seed) / "metrics.jsonl"
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else ():
        found = json.loads(line).get("validation_loss", found)
    return found


def lists(part: SequenceRecord, change: dict[str, Any], backend: str) -> Tensor:
    """``[T, K, J]``, the blocks that an option lists for a recorded layer."""
    config = replace(part.config, **change)
    found = select_blocks(part.q[None], part.k_compressed[None], config, backend=backend)[0]
    return listed_blocks(found, num_select_blocks(len(part.q), config))


def overlap(recording: Recording, change: dict[str, Any], backend: str) -> tuple[float, float]:
    shares = []
    for call in recording.calls:
        for part in call.sequences():
            exact = lists(part, {}, backend)
            share = shared_part(exact, lists(part, change, backend))
            shares.append(share[has_choice(exact, part.config)])
    every = torch.cat(shares)
    return every.mean().item(), every.min().item()


def skippable(part: SequenceRecord) -> float:
    """The share of tiles of keys, of those that eight neighbouring queries see, that none of them
    needs: twice the bound that is known only after the search, so the most that can be won."""
    config, T = part.config, len(part.q)
    J, most = num_select_blocks(T, config), max(overlap_weights(config)[1])
    skipped = seen = 0
    for rows, p_CHN in compressed_probabilities(part):
        C, K = len(p_CHN), part.k_compressed.shape[1]
        scores = block_scores(p_CHN, K, T, config)
        position = torch.arange(rows.start, rows.start + C, device=p_CHN.device)
        candidate, forced = forced_blocks(position, J, config)
        free = scores.masked_fill((~candidate | forced)[:, None], -1.0)
        ranks = config.num_selected - forced.sum(-1)
        last = free.sort(-1, descending=True)[0]
        last = last.gather(-1, (ranks - 1).clamp(0, J - 1)[:, None, None].expand(C, K, 1))
        N = p_CHN.shape[-1] // TILE * TILE
        mass = p_CHN[..., :N].unflatten(1, (K, -1)).sum(2).unflatten(-1, (-1, TILE)).sum(-1)
        visible = mass > 0
        needed = most * mass >= last
        whole = C // ROWS * ROWS
        needed, visible = (x[:whole].unflatten(0, (-1, ROWS)).any(1) for x in (needed, visible))
        seen += visible.sum().item()
        skipped += (visible & ~needed).sum().item()
    return skipped / max(seen, 1)


@torch.no_grad()
def read(args: argparse.Namespace, device: torch.device) -> Recording:
    """The exact model of the first seed on validation text."""
    trained = load_trained(folder(args.out, "exact", args.seeds[0]), None, device)
    data = trained.config.train
    text = load_corpus(data.data, data.split).validation
    text = torch.as_tensor(text[: data.seq_len].copy()).long()[None].to(device)
    with record(trained.model) as recording, torch.autocast(device.type, torch.bfloat16):
        trained.model(text)
    return recording


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["--worker"]:
        return worker(argv[1], list(argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    every = [*OPTIONS, *OTHERS]
    parser.add_argument("--runs", nargs="+", choices=every, default=every, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=32, help="of validation")
    parser.add_argument("--jobs", type=int, default=5, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--bound", action="store_true", help="tiles that a search could leave out")
    parser.add_argument("--tiny", action="store_true", help="few steps of the tiny model")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    with ThreadPoolExecutor(args.jobs) as pool:
        wanted = [(run, seed) for seed in args.seeds for run in args.runs]
        for _ in pool.map(lambda both: train_one(args, *both), wanted):
            pass
    for run in args.runs:
        losses = [loss(args.out, run, seed) for seed in args.seeds]
        print(f"{run:20s} " + "  ".join(f"{value:.4f}" for value in losses), flush=True)
    if "exact" not in args.runs:
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = "compiled" if device.type == "cuda" else "sdpa"
    recording = read(args, device)
    for run in OPTIONS:
        mean, worst = overlap(recording, OPTIONS[run], backend)
        print(f"{run:20s} overlap with exact {mean:.1%}, worst query {worst:.1%}", flush=True)
    if args.bound:
        for call in recording.calls:
            part = skippable(call.sequences()[0])
            print(f"{call.layer}: {part:.1%} of tiles could be left out", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
