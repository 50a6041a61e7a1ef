"""Computing again in the backward pass what would be kept for it, block lists apart.

Recomputed indices may differ where two scores nearly tie, and the gradients would be those of
another function; so the result of ``nsa::select_blocks`` (int32, ``n`` a query and head) is always
kept. The backend ``reference`` alone selects again: it is made of no operators.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

R = TypeVar("R")


def _policy(
    context: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    # by name: importing nsa defines no operator, which torch's flop counter would have to hear of
    if isinstance(operator, torch._ops.OpOverload) and operator.name() == "nsa::select_blocks":
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


save_block_idx = functools.partial(create_selective_checkpoint_contexts, _policy)
"""The ``context_fn`` of ``torch.utils.checkpoint``: everything again but the block lists."""


def recompute(function: Callable[..., R], *args: Any, selects: bool = True) -> R:
    """Call ``function``, and call it again in the backward pass in place of keeping what it saves.

    Its arguments are kept. Nothing of ours draws random numbers, so no state of theirs is stashed.
    ``selects``: whether ``nsa::select_blocks`` may run in it.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selects:
        options["context_fn"] = save_block_idx
    result: R = checkpoint(function, *args, **options)
    return result


@contextlib.contextmanager
def in_a_graph() -> Iterator[None]:
    """Set torch up to trace :func:`recompute`; to be put around what may compile.

    A layer notes which backend ran, and torch refuses that inside a checkpoint unless it is told
    not to. It also warns that saved results must not be written to; nothing writes to block lists.
    """

    def is_other(record: logging.LogRecord) -> bool:
        return "context_fn is passed" not in str(record.msg)

    log = logging.getLogger("torch._higher_order_ops.wrap")
    log.addFilter(is_other)
    try:
        with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
            yield
    finally:
        log.removeFilter(is_other)
