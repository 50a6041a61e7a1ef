"""``bench --decode``: one step of decode, with dense attention over as many tokens beside it.

B sequences, T tokens of each, S new ones among them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.text import Text
from torch import Tensor

from nsa.backends import load, unavailable
from nsa.backends.dispatch import no_decode
from nsa.backends.protocol import Decoder
from nsa.config import NSAConfig
from nsa.core.inputs import DecodeInputs
from nsa.registry import TABLE
from nsa.settings import Settings
from nsa.testing.decoding import decode_parity, random_step
from nsa.testing.inputs import random_blocks
from nsa.tools.bench.cases import heads_label
from nsa.tools.bench.timing import Clock, summarize
from nsa.tools.common.failures import failures, one_line
from nsa.tools.common.problems import Trial, short
from nsa.tools.common.styles import table_of
from nsa.training.memory import memory_bytes

_COLD = 256 * 2**20
"""Bytes that steps over several caches read before one of them comes again: more than any L2."""
_MOST_COPIES = 24
_CHECKED = 203
"""Tokens of the problem that is held to the oracle."""


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """What one backend takes for one step."""

    backend: str
    heads: str
    dtype: str
    batch: int
    length: int
    step: int
    seconds: float | None = None
    """Median; None where ``note`` says why not."""
    bytes: int = 0
    """Of the keys and values that the step must read."""
    dense_seconds: float | None = None
    """PyTorch's attention over every token."""
    parity: float | None = None
    """The largest error as a share of its bound."""
    note: str = ""


def decode_rows(
    trials: tuple[Trial, ...],
    backends: tuple[str, ...],
    step: int,
    settings: Settings,
    clock: Clock,
    runs: int,
) -> Iterator[DecodeRow]:
    """A row for every problem and backend that decodes."""
    names = backends or tuple(
        name for name, row in TABLE.items() if row.decodes and _runs(name, trials[0], settings)
    )
    parities: dict[object, float | str] = {}
    for trial in trials:
        B, T = len(trial.lengths), trial.length
        needed = 2 * B * T * _token_bytes(trial)
        there = _memory(trial.device)
        steps: list[DecodeInputs] = []
        dense: float | None = None
        for name in names:
            made = partial(
                DecodeRow, name, heads_label(trial.config), short(trial.dtype), B, T, step
            )
            why_not = _why_not(name, trial, settings)
            if why_not is not None:
                yield made(note=why_not)
                continue
            if needed > there:
                yield made(note=f"needs {needed / 2**30:.1f} GiB of {there / 2**30:.1f}")
                continue
            key = (name, trial.config.key, trial.dtype)
            if key not in parities:
                parities[key] = _parity(name, trial, settings)
            worst = parities[key]
            if isinstance(worst, str):
                yield made(note=worst)
                continue
            try:
                if not steps:
                    steps = _caches(trial, B, T, step)
                    dense = _dense(steps, trial, clock, runs)
                decoder = cast(Decoder, load(name, settings))
                calls = [partial(decoder.decode_attention, x, trial.config) for x in steps]
                seconds = _median(calls, clock, runs, trial.device)
            except failures() as error:
                yield made(note=one_line(error), parity=worst)
                continue
            yield made(seconds, _bytes(trial, B, T, step), dense, worst)
        steps.clear()


def print_decode(rows: list[DecodeRow], console: Console) -> None:
    """The table."""
    table = table_of(
        "One step of decode",
        *("backend", "heads, dtype", "B", "T", "new", "µs", "MB", "GB/s", "dense µs", "×"),
    )
    notes = []
    for row in rows:
        shape = (f"{row.heads} {row.dtype}", f"{row.batch:,}", f"{row.length:,}", f"{row.step}")
        if row.seconds is None:
            table.add_row(row.backend, *shape, *("-",) * 5)
            notes.append(f"{row.backend}, T = {row.length:,}: {row.note}")
            continue
        dense = ("-", "-")
        if row.dense_seconds is not None:
            dense = (f"{row.dense_seconds * 1e6:,.1f}", f"{row.dense_seconds / row.seconds:.2f}")
        table.add_row(
            row.backend,
            *shape,
            f"{row.seconds * 1e6:,.1f}",
            f"{row.bytes / 1e6:,.1f}",
            f"{row.bytes / row.seconds / 1e9:,.0f}",
            *dense,
        )
    console.print(table)
    for note in dict.fromkeys(notes):
        console.print(Text(f"  - {note}"), soft_wrap=True)


def as_dict(row: DecodeRow) -> dict[str, object]:
    """The line of ``--jsonl``."""
    return {"decode": True, **asdict(row)}


def _runs(name: str, trial: Trial, settings: Settings) -> bool:
    return _why_not(name, trial, settings) is None


def _why_not(name: str, trial: Trial, settings: Settings) -> str | None:
    why_not = unavailable(name, trial.problem, settings) or no_decode(name, trial.problem)
    return why_not and f"{why_not}; sdpa decodes anywhere"


def _parity(name: str, trial: Trial, settings: Settings) -> float | str:
    inputs = trial.with_length(_CHECKED).bare_inputs()
    inputs = replace(inputs, block_idx=random_blocks(inputs, 5, 0))
    try:
        row, faults = decode_parity(cast(Decoder, load(name, settings)), inputs)
    except failures() as error:
        return f"parity check failed: {one_line(error)}"
    if faults or not row.ok:
        return f"parity failed: {faults[0] if faults else f'{row.error:.2e} above {row.bound:.2e}'}"
    return row.error / row.bound if row.bound else 0.0


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return memory_bytes()


def _token_bytes(trial: Trial) -> int:
    config = trial.config
    return config.num_kv_heads * (config.head_dim + config.dv) * trial.dtype.itemsize


def _bytes(trial: Trial, B: int, T: int, S: int) -> int:
    """Keys and values that a step must read: every query has a list of its own."""
    config: NSAConfig = trial.config
    listed = min(T, config.num_selected * config.select_block) * S
    tokens = config.num_compressed(T) + listed + min(T, config.window + S - 1)
    return B * tokens * _token_bytes(trial)


def _caches(trial: Trial, B: int, T: int, S: int) -> list[DecodeInputs]:
    """As many as it takes that none of them is in the L2 cache when its turn comes."""
    copies = 1
    if trial.device.type == "cuda" and B * T * _token_bytes(trial) < _COLD:
        copies = min(_MOST_COPIES, 1 + _COLD // max(1, _bytes(trial, B, T, S)))
    made = partial(random_step, trial.config, B, T, S, dtype=trial.dtype, device=trial.device)
    return [made(seed=seed) for seed in range(copies)]


def _dense(steps: list[DecodeInputs], trial: Trial, clock: Clock, runs: int) -> float | None:
    """One query's attention over all tokens as they lie in memory; None for more, which would need
    a mask that no fused kernel takes."""
    B, S = steps[0].q.shape[:2]
    T, config = trial.length, trial.config
    if S > 1 or T % config.select_block:
        return None

    def call(x: DecodeInputs) -> Callable[[], Tensor]:
        k, v = (y.view(B, T, *y.shape[2:]).transpose(1, 2) for y in x.selected)
        q = x.q.view(B, config.num_kv_heads, config.group, -1)  # a group's heads as its queries
        return lambda: F.scaled_dot_product_attention(q, k, v, scale=config.softmax_scale)

    try:
        return _median([call(x) for x in steps], clock, runs, trial.device)
    except failures():
        return None


def _median(
    calls: Sequence[Callable[[], object]], clock: Clock, runs: int, device: torch.device
) -> float:
    """Seconds of one of the calls: in a CUDA graph one after the other, else each by itself."""
    for call in calls:
        call()
    if device.type != "cuda":
        return summarize([seconds for call in calls for seconds in clock(call, runs)]).median
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return statistics.median(clock(graph.replay, runs)) / len(calls)
