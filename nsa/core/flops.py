"""Floating-point operations of attention, and what torch's ``FlopCounterMode`` counts of ours.

A program that counts sees the operators ``nsa::…`` as it sees ``aten::mm``::

    with torch.utils.flop_counter.FlopCounterMode() as counter:
        nsa_attention(...)
    counter.get_total_flops()

Counted are the matrix products over *visible* pairs of a query and a key, a multiplication and an
addition being two: ``q·k`` and ``p·v`` forward; backward five products, for the scores are computed
again. Softmax, gates and ranking are not. Counts follow from shapes alone, so nothing is read back
from the device, and where the tensors' contents decide they are the most that the shapes allow:

- packed: the longest sequence as often as it fits, where the operator knows it, else one sequence;
- block lists: full, and with the query's own block, as a selection makes them;
- ``sdpa`` and FA-2, compressed branch: folded, so that up to d−1 queries at an end do not exist;
- FA-2: head sizes as padded to one multiple of 8.

Where ``sdpa`` hands the compressed branch to a fused kernel of PyTorch, PyTorch's formula counts:
every pair, causal or not, on CUDA; nothing on a CPU. An operator's own formula is an argument of
:func:`nsa.core.operators.define`.

B batch, T query tokens, R rows, S keys, N compressed blocks, H query heads, K key/value heads, M
queries of a row and key head, D key size, V value size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from nsa.config import NSAConfig


def forward_flops(pairs: int, D: int, V: int) -> int:
    """``q·k`` and ``p·v`` for so many visible pairs."""
    return 2 * (D + V) * pairs


def backward_flops(pairs: int, D: int, V: int) -> int:
    """``q·k`` again, ``dO·v``, and the products that make dV, dQ and dK."""
    return 2 * (3 * D + 2 * V) * pairs


def window_pairs(T: int, window: int, first: int = 0) -> int:
    """Pairs of T queries from position ``first`` on, each seeing ``min(t + 1, window)`` tokens."""

    def until(t: int) -> int:
        short = min(t, window)
        return short * (short + 1) // 2 + (t - short) * window

    return until(first + T) - until(first)


def compressed_pairs(T: int, block: int, stride: int, first: int = 0, every: int = 1) -> int:
    """The same for compressed blocks: one is seen once it has ended. Of queries at multiples of
    ``every`` alone."""

    def until(t: int) -> int:
        N = _num_ended(t, block, stride)
        if every == 1:
            return N * (t - block + 1) - stride * N * (N - 1) // 2
        return sum(-(-t // every) - -(-(i * stride + block - 1) // every) for i in range(N))

    return until(first + T) - until(first)


def _num_ended(t: int, block: int, stride: int) -> int:
    return (t - block) // stride + 1 if t >= block else 0


def search_pairs(config: NSAConfig, T: int, first: int = 0) -> int:
    """Pairs that a selection of no more than it needs multiplies: the first of the queries that
    share a list, and compressed blocks; with ``select_regions`` first regions, then the compressed
    blocks of those searched, once for each selection block that they overlap."""
    block, stride, m = config.compress_block, config.compress_stride, config.select_share
    if config.select_regions is None:
        return compressed_pairs(T, block, stride, first, m)
    size = config.select_regions[0] * config.select_block
    ranking = compressed_pairs(T, size + block - stride, size, first, m)
    return ranking + _searched_until(config.key, first + T) - _searched_until(config.key, first)


@lru_cache
def _searched_until(key: str, t: int) -> int:
    """The second part, of the queries before position t."""
    config = NSAConfig.from_key(key)
    assert config.select_regions is not None
    r, k = config.select_regions
    l, d, m = config.compress_block, config.compress_stride, config.select_share  # noqa: E741
    ratio, span = config.select_block // d, l // d
    initial = -(-config.num_initial // r)

    def seen(blocks: range, visible: int) -> int:
        """Keys of some selection blocks; whole ones and a few that are not yet over."""
        whole = range(blocks.start, max(blocks.start, min(blocks.stop, visible // ratio)))
        rest = (visible - j * ratio for j in range(whole.stop, blocks.stop))
        keys = len(whole) * (ratio + span - 1) + sum(max(0, x + span - 1) for x in rest)
        return max(0, keys - (span - 1)) if 0 in blocks else keys

    def at(position: int) -> int:
        own, visible = position // config.select_block, _num_ended(position + 1, l, d)
        before_local = max(0, own - config.num_local + 1) // r
        ranked_until = min(before_local, max(0, position + 1 - l + d) // (r * config.select_block))
        chosen = max(0, min(k, ranked_until - initial)) * r * (ratio + span - 1)
        old = range(min(initial * r, own + 1))
        young = range(max(initial, ranked_until) * r, own + 1)
        return chosen + seen(old, visible) + seen(young, visible)

    # once k regions are chosen, each further region of queries costs the same
    period = r * config.select_block
    settled = (initial + k + config.num_local + 2) * period
    if t <= settled + period:
        return sum(map(at, range(0, t, m)))
    periods, rest = divmod(t - settled, period)
    one = sum(map(at, range(settled, settled + period, m)))
    return _searched_until(key, settled + rest) + periods * one


def selected_pairs(T: int, block: int, n: int, first: int = 0) -> int:
    """The same for selection: ``min(n, t // l' + 1)`` blocks, the own one up to t among them."""

    def until(t: int) -> int:
        full, rest = divmod(t, block)
        few = min(n, full)
        # the blocks that come on top of the own one, summed over the full blocks of queries
        others = few * (few - 1) // 2 + (full - few) * (n - 1)
        own = full * (block * (block + 1) // 2) + rest * (rest + 1) // 2
        return block * block * others + rest * block * (min(n, full + 1) - 1) + own

    return until(first + T) - until(first)


def branch_pairs(branch: str, config: NSAConfig, lengths: Iterable[int]) -> int:
    """Visible pairs per query head of "compressed", "selected", "window" or "dense".

    Args:
        lengths: tokens of each sequence.
    """
    l, d = config.compress_block, config.compress_stride  # noqa: E741 - the paper's name
    per_sequence: dict[str, Callable[[int], int]] = {
        "compressed": lambda T: compressed_pairs(T, l, d),
        "selected": lambda T: selected_pairs(T, config.select_block, config.num_selected),
        "window": lambda T: window_pairs(T, config.window),
        "dense": lambda T: window_pairs(T, T),
    }
    if branch not in per_sequence:
        raise ValueError(f"expected compressed, selected, window or dense, got {branch!r}")
    return sum(map(per_sequence[branch], lengths))


def longest_first(total: int, longest: int) -> list[int]:
    """The packed sequences of at most that length which see the most."""
    longest = max(1, longest)
    return [longest] * (total // longest) + [total % longest]


Arguments = dict[str, Any]
"""Of an operator's call, by their names in the schema; of a tensor the shape."""
Count = Callable[[Arguments], int]


def window(x: Arguments) -> int:
    """Visible pairs of a call, as ``compressed`` and ``selected``; q ``[B, T, H, D]``."""
    B, T, H, _ = x["q"]
    return B * H * window_pairs(T, _config(x).window, x.get("q_start", 0))


def compressed(x: Arguments) -> int:
    """See :func:`window`."""
    B, T, H, _ = x["q"]
    block, stride = _config(x).compress_block, _config(x).compress_stride
    return B * H * compressed_pairs(T, block, stride, x.get("q_start", 0))


def selected(x: Arguments) -> int:
    """See :func:`window`."""
    B, T, H, _ = x["q"]
    n = x["block_idx"][-1]
    return B * H * selected_pairs(T, _config(x).select_block, n, x.get("q_start", 0))


def _config(x: Arguments) -> NSAConfig:
    return NSAConfig.from_key(x["config"])


def of_forward(pairs: Count, v: str = "v") -> Count:
    """Operations of attention over so many pairs; ``v`` names the values' argument."""
    return lambda x: forward_flops(pairs(x), x["q"][-1], x[v][-1])


def of_backward(pairs: Count, v: str = "v") -> Count:
    """The same of its backward."""
    return lambda x: backward_flops(pairs(x), x["q"][-1], x[v][-1])


def register(operator: Any, flops: Count) -> None:
    """Gives torch's flop counter the formula of one of our operators, if it is there to be given.

    Costs nothing in a program that does not count. Importing the counter imports triton, which
    ``import nsa`` must not, so that this runs when an operator is defined and when one is called
    under a dispatch mode; counters that are already counting have copied the table of formulas.
    """
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    packet = operator.overloadpacket
    if packet not in counting.flop_registry:
        names = [argument.name for argument in operator._schema.arguments]

        def formula(*args: Any, out_val: object = None, **kwargs: Any) -> int:
            given = dict(zip(names, args, strict=False)) | kwargs
            return flops({name: _sizes(x) for name, x in given.items()})

        counting.register_flop_formula(packet, get_raw=True)(formula)
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, counting._FlopCounterMode):
            mode.counter.flop_registry.setdefault(packet, counting.flop_registry[packet])


def _sizes(x: Any) -> Any:
    """The shape of a tensor; of a symbolic size its hint, if any: a comparison would be a guard."""
    if isinstance(x, Tensor):
        return tuple(_sizes(size) for size in x.shape)
    if isinstance(x, torch.SymInt):
        return x.node.hint if x.node.has_hint() else 0
    return x
