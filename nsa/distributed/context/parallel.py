"""context_parallel: every NSA layer inside attends across the ranks of a layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nsa.backends.dispatch import Resolution
from nsa.cached_attention import Projected
from nsa.compression import compress_both
from nsa.config import KV
from nsa.core import sharding
from nsa.core.compile import outside_graphs
from nsa.distributed.context.agreement import check_agreement
from nsa.distributed.context.attention import attend
from nsa.distributed.context.collectives import check_sendable
from nsa.distributed.context.layout import Layout
from nsa.distributed.context.plan import plan_of
from nsa.errors import ShapeError, show
from nsa.gates import GATES


@contextlib.contextmanager
def context_parallel(layout: Layout) -> Iterator[None]:
    """Let the NSA layers inside the ``with`` attend across ranks (context parallelism).

    Each rank calls the model on its own rows, as :meth:`Layout.shard` gives them, and gets its own
    rows of the result: with the keys of all ranks, what one process would compute of them, with
    the same lists of blocks. Everything else in the model must treat tokens apart from each other.

        layout = Layout.head_tail(T, group=mesh["cp"].get_group())
        with context_parallel(layout):
            loss = model.loss(layout.shard(tokens), layout.shard(targets))
            loss.backward()

    Call the backward inside, too: it may run layers again (activation checkpointing). Every rank
    must call the same layers in the same order, forward and backward. Gradients of parameters are
    those of the rank's own loss; sum them over the ranks, as data parallelism does.

    Layers take no ``cu_seqlens``, ``cache`` or ``angles`` inside, since the layout says where rows
    stand. In a ``torch.compile`` of a model the attention itself breaks the graph: do not ask for
    ``fullgraph=True``. The whole process is concerned, not one thread.

    Raises:
        ShapeError: no layout, one for arithmetic alone, or one inside another's ``with``; from
            layers: input that does not fit it.
        ConfigError: from layers at their first call: ranks have different configurations.
        BackendUnavailable: from layers: a backend that takes whole sequences alone.
    """
    if not isinstance(layout, Layout):
        raise ShapeError(f"layout: expected a Layout, got {show(layout)}")
    layout.check_group()
    if sharding.active() is not None:
        raise ShapeError(
            "context_parallel: expected none in force, got one inside another; end the outer one "
            "first, or make one layout for both"
        )
    before = sharding.activate(_Sharded(layout))
    try:
        yield
    finally:
        sharding.activate(before)


class _Sharded:
    """What layers ask of a layout; see :class:`nsa.core.sharding.SequenceSharding`."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.longest, self.packed = layout.longest, layout.packed

    def check_call(self, layer: Any, x: Tensor, **given: object) -> None:
        """Its rows are the layout's, and nothing else says where they stand."""
        self.layout.check_rows("x", x, self.layout.rows)
        check_sendable("x", x)
        if layer.probes is not None:
            raise ShapeError(
                "context_parallel: expected a layer that nsa.inspection does not watch, got one "
                "that it does; record in one process"
            )
        for name, value in given.items():
            if value is not None:
                raise ShapeError(
                    f"{name}: expected None under context_parallel, whose layout says where rows "
                    f"stand, got {type(value).__name__}"
                )

    @outside_graphs  # which would make them anew
    def positions(self, device: torch.device) -> Tensor:
        """Of this rank's rows."""
        return self.layout.positions(device)

    @outside_graphs
    def attend(self, layer: Any, chosen: Resolution, *projected: Any) -> Tensor:
        """φ and the gated sum of the branches."""
        q, tokens, selected, window, gates, *_ = projected
        of_rank = Projected(q, KV(*tokens), KV(*selected), KV(*window), gates)
        config, settings = layer.config, layer.settings
        plan_of(self.layout, config)  # first what all ranks refuse alike
        check_agreement(layer, self.layout, chosen, of_rank, every_call=settings.check)
        return attend(
            self.layout,
            of_rank,
            partial(compress_both, layer.compress_k, layer.compress_v),
            chosen,
            config,
            gates_in_unit_interval=GATES[config.gate].in_unit_interval,
            check=settings.check,
            nvtx=settings.nvtx,
        )
