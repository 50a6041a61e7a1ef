"""The least that NSA has to compute and to move: the floors under every measured time.

T tokens of a sequence, N compressed blocks, H query heads, K key/value heads, D key size, V value
size.
"""

from __future__ import annotations

from typing import NamedTuple

from nsa.config import NSAConfig
from nsa.core.flops import backward_flops, branch_pairs, forward_flops
from nsa.tools.bench.cases import WHOLE
from nsa.tools.common.problems import Trial

_THREE = ("compressed", "selected", "window")
_INT32 = _FP32 = 4


class Work(NamedTuple):
    """What one pass has to do at least."""

    flops: int
    """Operations of the matrix products, as :mod:`nsa.core.flops` counts them."""
    bytes: int
    """Every input read once, every output written once."""


def work(branch: str, trial: Trial) -> tuple[Work, Work]:
    """The forward and the backward pass of one of bench's branches, or "dense".

    "all+select" makes the block list itself, "all" reads it. Selection takes ``q·k_cmp`` once more,
    because its softmax needs the log-sum-exp of the whole row, and has no backward. A backward pass
    reads the inputs and the output's gradient and writes a gradient for each input.
    """
    config, lengths, itemsize = trial.config, trial.lengths, trial.dtype.itemsize
    H, D, V = config.num_heads, config.head_dim, config.dv
    parts = _parts(branch)
    pairs = H * sum(branch_pairs(part, config, lengths) for part in parts)
    flops = forward_flops(pairs, D, V)
    if branch in ("select", "all+select"):
        flops += 2 * D * H * branch_pairs("compressed", config, lengths)
    inputs, outputs = _elements(branch, parts, config, lengths)
    forward = Work(flops, itemsize * (inputs + outputs) + _other_bytes(branch, config, lengths))
    if branch == "select":
        return forward, Work(0, 0)
    # the block list is made in the forward pass, so that this one reads it in any case
    listed = _other_bytes("all" if branch == "all+select" else branch, config, lengths)
    backward = Work(backward_flops(pairs, D, V), itemsize * (2 * inputs + outputs) + listed)
    return forward, backward


def _parts(branch: str) -> tuple[str, ...]:
    if branch in WHOLE:
        return _THREE
    return () if branch == "select" else (branch,)


def _elements(
    branch: str, parts: tuple[str, ...], config: NSAConfig, lengths: tuple[int, ...]
) -> tuple[int, int]:
    """Elements of the floating-point inputs and outputs."""
    H, K, D, V = config.num_heads, config.num_kv_heads, config.head_dim, config.dv
    T = sum(lengths)
    N = sum(config.num_compressed(length) for length in lengths)
    if branch == "select":
        return T * H * D + N * K * D, 0
    rows = sum(N if part == "compressed" else T for part in parts)
    gates = 3 * T * H if branch in WHOLE else 0
    return T * H * D + rows * K * (D + V) + gates, T * H * V


def _other_bytes(branch: str, config: NSAConfig, lengths: tuple[int, ...]) -> int:
    """The block list (int32) and, for the selection alone, the log-sum-exp (fp32) it is given."""
    T = sum(lengths)
    listed = branch in ("select", "selected", "all")
    lists = _INT32 * T * config.num_kv_heads * config.num_selected if listed else 0
    return lists + (_FP32 * T * config.num_heads if branch == "select" else 0)
