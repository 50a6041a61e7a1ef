"""The least that NSA has to compute and to move: the floors under every measured time.

T tokens, N compressed blocks, H query heads, K key/value heads, D key size, V value size.
"""

from __future__ import annotations

from typing import NamedTuple

from nsa.core.flops import backward_flops, branch_pairs, forward_flops, search_pairs
from nsa.tools.bench.cases import WHOLE
from nsa.tools.common.problems import Trial

_BRANCHES = ("compressed", "selected", "window")
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
    config, lengths, size = trial.config, trial.lengths, trial.dtype.itemsize
    H, K, D, V = config.num_heads, config.num_kv_heads, config.head_dim, config.dv
    T, N = sum(lengths), sum(map(config.num_compressed, lengths))
    block_list = _INT32 * T * K * config.num_selected
    scores = 2 * D * H * sum(search_pairs(config, length) for length in lengths)
    if branch == "select":  # is given the log-sum-exp
        moved = size * (T * H * D + N * K * D) + block_list + _FP32 * T * H
        return Work(scores, moved), Work(0, 0)
    parts = _BRANCHES if branch in WHOLE else (branch,)
    pairs = H * sum(branch_pairs(part, config, lengths) for part in parts)
    keys = sum(N if part == "compressed" else T for part in parts)
    gates = 3 * T * H if branch in WHOLE else 0
    inputs, outputs = T * H * D + keys * K * (D + V) + gates, T * H * V
    forward = Work(forward_flops(pairs, D, V), size * (inputs + outputs))
    backward = Work(backward_flops(pairs, D, V), size * (2 * inputs + outputs))
    if branch == "all+select":  # the list that it makes is read by the backward pass alone
        forward = Work(forward.flops + scores, forward.bytes)
    elif "selected" in parts:
        forward = Work(forward.flops, forward.bytes + block_list)
    if "selected" in parts:
        backward = Work(backward.flops, backward.bytes + block_list)
    return forward, backward
