"""Whether all ranks compute the same: compared once, when a layer first meets a group."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nsa.backends.dispatch import Resolution
from nsa.distributed.context.layout import Layout
from nsa.errors import ConfigError, show

_MET: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""The names of the groups that a layer has met."""


def check_agreement(
    layer: Any, layout: Layout, chosen: Resolution, q: Tensor, *, every_call: bool
) -> None:
    """Compare configuration, layout, backend, dtype and what backward depends on, of all ranks.

    Reads from the device, and so is done once for a layer and a group, or at ``every_call``.

    Raises:
        ConfigError: they differ; the same error on every rank.
    """
    group = dist.group.WORLD if layout.group is None else layout.group
    assert group is not None
    met = _MET.setdefault(layer, set())
    if group.group_name in met and not every_call:
        return
    mine = {
        **{f"config.{name}": value for name, value in json.loads(layer.config.key).items()},
        "layout": repr((layout.offsets, layout.segments)),
        "backend": chosen.backend,
        "dtype": str(q.dtype),
        "batch size": q.shape[0],
        "recompute": layer.recompute,
        "gradients": torch.is_grad_enabled(),
        "NSA_CHECK": every_call,
    }
    of_rank: list[Mapping[str, object]] = [{} for _ in range(layout.size)]
    dist.all_gather_object(of_rank, mine, group=group)
    for rank, theirs in enumerate(of_rank):
        for name, value in of_rank[0].items():
            if theirs[name] != value:
                raise ConfigError(
                    f"{name}: expected the same on all ranks of context_parallel, got "
                    f"{show(value)} on rank 0 and {show(theirs[name])} on rank {rank}"
                )
    met.add(group.group_name)
