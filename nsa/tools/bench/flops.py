"""The least that NSA has to compute and to move: the floors under every measured time.

T tokens of a sequence, N compressed blocks, H query heads, K key/value heads, D key size, V value
size; l, d, l', n and w as in :class:`nsa.NSAConfig`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from nsa.config import NSAConfig

_PARTS = {
    "compressed": ("compressed",),
    "select": (),
    "selected": ("selected",),
    "window": ("window",),
    "all": ("compressed", "selected", "window"),
    "all+select": ("compressed", "selected", "window"),
    "dense": ("dense",),
}
_INT32 = _FP32 = 4


class Work(NamedTuple):
    """What one pass has to do at least."""

    flops: int
    """Floating-point operations of the matrix products; a multiplication and an addition are 2."""
    bytes: int
    """Every input read once, every output written once."""


def pairs(part: str, config: NSAConfig, lengths: Iterable[int]) -> int:
    """Pairs of a query and a key that it sees, per query head, over all sequences.

    Args:
        part: "compressed", "selected", "window" or "dense".
        config: the geometry.
        lengths: tokens of each sequence.

    A query at position t sees, in sequences of T tokens:
        compressed: the blocks that end by t, so that block i is seen by ``T - (i*d + l - 1)``
            queries;
        selected: ``min(n, t // l' + 1)`` blocks, its own, of which it sees ``t % l' + 1`` tokens,
            among them;
        window: ``min(t + 1, w)`` tokens;
        dense: ``t + 1`` tokens.
    """
    return sum(_pairs(part, config, T) for T in lengths)


def _pairs(part: str, config: NSAConfig, T: int) -> int:
    if part == "compressed":
        N = config.num_compressed(T)
        first = T - config.compress_block + 1
        return N * first - config.compress_stride * N * (N - 1) // 2
    if part == "selected":
        size, n = config.select_block, config.num_selected
        full, rest = divmod(T, size)
        few = min(n, full)
        # the blocks that come on top of the own one, summed over the full blocks of queries
        others = few * (few - 1) // 2 + (full - few) * (n - 1)
        own = full * (size * (size + 1) // 2) + rest * (rest + 1) // 2
        return size * size * others + rest * size * (min(n, full + 1) - 1) + own
    if part == "window":
        short = min(T, config.window)
        return short * (short + 1) // 2 + (T - short) * config.window
    if part == "dense":
        return T * (T + 1) // 2
    raise ValueError(f"expected compressed, selected, window or dense, got {part!r}")


def forward_work(branch: str, config: NSAConfig, lengths: tuple[int, ...], itemsize: int) -> Work:
    """The forward pass of one of bench's branches, or "dense".

    Two products for each pair: ``q·k`` (2·D operations) and ``p·v`` (2·V), for every query head.
    Selection takes ``q·k_cmp`` once more, because its softmax needs the log-sum-exp of the whole
    row. Softmax, gates, scores of selection blocks and the top-n are left out: they are no matrix
    products.

    Args:
        branch: what is computed; "all+select" makes the block list itself, "all" reads it.
        config: heads and geometry.
        lengths: tokens of each sequence.
        itemsize: bytes of an element of q, k, v, gates and the output.
    """
    H, D, V = config.num_heads, config.head_dim, config.dv
    flops = sum(2 * H * (D + V) * pairs(part, config, lengths) for part in _PARTS[branch])
    if branch in ("select", "all+select"):
        flops += 2 * H * D * pairs("compressed", config, lengths)
    inputs, outputs = _elements(branch, config, lengths)
    return Work(flops, itemsize * (inputs + outputs) + _other_bytes(branch, config, lengths))


def backward_work(branch: str, config: NSAConfig, lengths: tuple[int, ...], itemsize: int) -> Work:
    """The backward pass; the arguments are those of :func:`forward_work`.

    Five products for each pair: ``q·k`` again, ``dO·v``, and those that make dV (2·V each way) and
    dQ and dK (2·D each). It reads the inputs and the output's gradient and writes a gradient for
    each input. Selection has none.
    """
    if branch == "select":
        return Work(0, 0)
    H, D, V = config.num_heads, config.head_dim, config.dv
    flops = sum(2 * H * (3 * D + 2 * V) * pairs(part, config, lengths) for part in _PARTS[branch])
    inputs, outputs = _elements(branch, config, lengths)
    # the block list is made in the forward pass, so that this one reads it in any case
    listed = "all" if branch == "all+select" else branch
    return Work(flops, itemsize * (2 * inputs + outputs) + _other_bytes(listed, config, lengths))


def _elements(branch: str, config: NSAConfig, lengths: tuple[int, ...]) -> tuple[int, int]:
    """Elements of the floating-point inputs and outputs."""
    H, K, D, V = config.num_heads, config.num_kv_heads, config.head_dim, config.dv
    T = sum(lengths)
    N = sum(config.num_compressed(length) for length in lengths)
    if branch == "select":
        return T * H * D + N * K * D, 0
    rows = sum(N if part == "compressed" else T for part in _PARTS[branch])
    gates = 3 * T * H if branch in ("all", "all+select") else 0
    return T * H * D + rows * K * (D + V) + gates, T * H * V


def _other_bytes(branch: str, config: NSAConfig, lengths: tuple[int, ...]) -> int:
    """The block list (int32) and, for the selection alone, the log-sum-exp (fp32) it is given."""
    T = sum(lengths)
    listed = branch in ("select", "selected", "all")
    lists = _INT32 * T * config.num_kv_heads * config.num_selected if listed else 0
    return lists + (_FP32 * T * config.num_heads if branch == "select" else 0)
