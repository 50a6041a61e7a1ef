"""What a model and its training take at least, known before anything is made."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path

from nsa.core.inputs import BRANCHES
from nsa.distributed.mesh import ALONE
from nsa.errors import ConfigError
from nsa.models import ModelConfig
from nsa.training.config import RunConfig

_GIB = 2**30
_FP32, _INT64 = 4, 8
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where the limit of a container stands: version 2 and version 1 of control groups."""


def memory_bytes() -> float:
    """Memory that a process can have here at most, swap included; infinite where nothing says."""
    known = []
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            known.append(float(Path(path).read_text()))
    with contextlib.suppress(OSError):  # not Linux
        text = Path("/proc/meminfo").read_text()
        found = re.findall(r"^(?:MemTotal|SwapTotal): +(\d+) kB$", text, re.MULTILINE)
        known.append(sum(map(int, found)) * 1024.0)
    return min(known, default=float("inf"))


def num_parameters(config: ModelConfig) -> int:
    """Count the parameters of a model that is not made (shapes without memory take a second to
    import, too)."""
    assert config.hidden_dim is not None  # resolved by ModelConfig
    dim, nsa = config.dim, config.nsa
    H, K, D, V, block = nsa.num_heads, nsa.num_kv_heads, nsa.head_dim, nsa.dv, nsa.compress_block
    attention, projections = dim * H * (D + V), 1
    if config.attention == "nsa":
        projections = len(BRANCHES) if nsa.independent_kv else 1
        attention += (dim + 1) * H * len(BRANCHES)
        for size in (D, V):
            inputs = block * size
            attention += {
                "mlp": inputs + (inputs + 1) * 2 * size + (2 * size + 1) * size,
                "linear": (inputs + 1) * size,
                "mean": 0,
            }[nsa.compression]
    attention += projections * dim * K * (D + V)
    layer = attention + 3 * dim * config.hidden_dim + 2 * dim
    heads = 1 if config.tied_embeddings else 2
    return config.num_layers * layer + heads * config.vocab_size * dim + dim


def require_memory_to_load(config: ModelConfig) -> None:
    """Refuse a model whose weights this machine cannot hold.

    Raises:
        ConfigError: what it takes, and what there is.
    """
    parameters = num_parameters(config)
    _require(_FP32 * parameters, f"{parameters:,} parameters", "load it on a larger machine")


def require_memory_to_train(
    config: RunConfig, sizes: Mapping[str, int] = ALONE, processes_here: int = 1
) -> None:
    """Refuse a run that this machine cannot hold: weights, and of a pass the text and, on a CPU,
    gradients, the optimizer's two averages, logits, and what every compiler keeps for the backward
    pass. A device of its own says itself, and at once, that it is full.

    Args:
        config: of the run.
        sizes: of its mesh; each process makes the whole model first, and trains its part of it.
        processes_here: how many of them share this machine's memory.

    Raises:
        ConfigError: what it takes, and what there is.
    """
    train, model = config.train, config.model
    assert model.hidden_dim is not None
    parameters, tokens = num_parameters(model), train.batch_size // sizes["dp"] * train.seq_len
    needed = _FP32 * parameters
    if train.device == "cpu":
        size = _FP32 if train.precision == "fp32" else _FP32 // 2
        kept = model.dim  # what enters a layer
        if not train.activation_checkpointing:
            split = 2 * model.hidden_dim + model.nsa.num_heads * model.nsa.head_dim
            kept += model.dim + split // sizes["tp"]
        numbers = tokens // sizes["cp"] * (model.num_layers * kept + model.vocab_size)
        part = 4 * _FP32 * parameters // prod(sizes.values())
        needed = max(needed, part + size * numbers)
    needed += 2 * _INT64 * tokens  # a window's positions, and its bytes
    what = f"{parameters:,} parameters, {tokens:,} bytes of text in a pass"
    if processes_here > 1:
        what += f" of each of {processes_here} processes"
    _require(
        needed * processes_here, what, "lower --batch-size, --seq-len or the sizes of the model"
    )


def _require(needed: int, what: str, fix: str) -> None:
    there = memory_bytes()
    if needed > there:
        raise ConfigError(
            f"expected what fits into the {there / _GIB:,.1f} GiB of memory here, got {what}, "
            f"which take {needed / _GIB:,.1f} GiB at least; {fix}"
        )
