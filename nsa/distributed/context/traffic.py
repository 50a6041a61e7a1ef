"""Bytes that context parallelism moves, by arithmetic."""

from __future__ import annotations

from typing import NamedTuple

from nsa.config import NSAConfig
from nsa.distributed.context.layout import Layout
from nsa.distributed.context.plan import plan_of


class Traffic(NamedTuple):
    """Bytes that one rank receives of other ranks for one layer."""

    forward: int
    backward: int


def context_traffic(
    layout: Layout, config: NSAConfig, *, batch: int = 1, element_size: int = 2
) -> dict[str, Traffic]:
    """What this rank of a layout receives for one layer and one step, by collective.

    With R ranks, ``W = K·(D + V)`` elements of e bytes for a token's keys and values of one branch,
    B sequences, and r rows (b compressed blocks) of the rank that has the most:

    - "halo", an all-to-all: ``B·e·W`` for every row past a segment that its last compressed block
      reads, and for every row before it that its first row's window reads, if another rank holds
      it; at most ``l - 1`` and ``w - 1`` rows for each segment. Backward the same rows return;
    - "compressed", an all-gather and a reduce-scatter: ``(R - 1)·B·e·W·b``, b about T/(d·R);
    - "selected", the same: ``(R - 1)·B·e·W·r``, r about T/R.

    With ``recompute=True``, or activation checkpointing, the forward's are moved twice.

    Args:
        layout: of this process, or one for arithmetic (``Layout.head_tail(T, size=64)``).
        config: heads and geometry.
        batch: B.
        element_size: e, in bytes: 2 for bfloat16.
    """
    plan, others = plan_of(layout, config), layout.size - 1
    row = batch * element_size * config.num_kv_heads * (config.head_dim + config.dv)
    received = returned = 0
    if plan.exchange is not None:
        for rank in range(layout.size):
            if rank != layout.rank:
                received += plan.exchange.received_rows[rank]
                returned += plan.exchange.sent_rows[rank]
    compressed, selected = others * plan.blocks.most * row, others * layout.parts.most * row
    return {
        "halo": Traffic(received * row, returned * row),
        "compressed": Traffic(compressed, compressed),
        "selected": Traffic(selected, selected),
    }
