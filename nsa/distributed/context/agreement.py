"""Whether all ranks compute the same: compared when a layer first meets a group."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from nsa.backends.dispatch import Resolution
from nsa.cached_attention import Projected
from nsa.distributed.context.collectives import all_gather
from nsa.distributed.context.layout import Layout
from nsa.errors import ConfigError, show

_MET: WeakKeyDictionary[nn.Module, set[tuple[str, bool]]] = WeakKeyDictionary()
"""The names of the groups that a layer has met, without and with gradients."""


def check_agreement(
    layer: Any, layout: Layout, chosen: Resolution, projected: Projected, *, every_call: bool
) -> None:
    """Compare configuration, layout, backend, dtype and what backward depends on, of all ranks.

    Reads from the device, and so is done once for a layer and a group (once more with gradients),
    or at ``every_call``.

    Raises:
        ConfigError: they differ; the same error on every rank.
    """
    group = dist.group.WORLD if layout.group is None else layout.group
    assert group is not None
    met, meeting = _MET.setdefault(layer, set()), (group.group_name, torch.is_grad_enabled())
    if meeting in met and not every_call:
        return
    q = projected.q
    mine = {
        **{f"config.{name}": value for name, value in json.loads(layer.config.key).items()},
        "layout": repr((layout.offsets, layout.segments)),
        "backend": chosen.backend,
        "dtype": str(q.dtype),
        "batch size": q.shape[0],
        "recompute": layer.recompute,
        "gradients of": _trained(layer, projected),
        "NSA_CHECK": every_call,
    }
    of_rank = _of_every_rank(mine, layout, q.device)
    for rank, theirs in enumerate(of_rank):
        for name, value in of_rank[0].items():
            if theirs[name] != value:
                raise ConfigError(
                    f"{name}: expected the same on all ranks of context_parallel, got "
                    f"{show(value)} on rank 0 and {show(theirs[name])} on rank {rank}"
                )
    met.add(meeting)


def _trained(layer: Any, projected: Projected) -> list[str]:
    """What is sent and gets gradients: a rank without them takes no part in their collectives."""
    if not torch.is_grad_enabled():
        return []
    parts = {
        "tokens": projected.tokens,
        "φ": [*layer.compress_k.parameters(), *layer.compress_v.parameters()],
        "selected": projected.selected,
        "window": projected.window,
    }
    return [name for name, part in parts.items() if any(x.requires_grad for x in part)]


def _of_every_rank(
    mine: Mapping[str, Any], layout: Layout, device: torch.device
) -> list[Mapping[str, Any]]:
    """What JSON can hold, of each rank, by tensors on the device that the layer is on."""
    text = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
    length = torch.tensor([len(text)])
    longest = int(all_gather(length.to(device), layout.group).wait().max())
    padded = F.pad(text, (0, longest - len(text)), value=ord(" "))
    texts = all_gather(padded.to(device), layout.group).wait().cpu()
    return [json.loads(row.numpy().tobytes()) for row in texts]
