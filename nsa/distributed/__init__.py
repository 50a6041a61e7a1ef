"""More than one GPU, on ``torch.distributed``: FSDP2, tensor parallel, and context parallel."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsa.distributed.context.layout import Layout
    from nsa.distributed.context.parallel import context_parallel
    from nsa.distributed.context.traffic import Traffic, context_traffic
    from nsa.distributed.data_parallel import shard
    from nsa.distributed.tensor_parallel import parallelize, tensor_parallel_plan

_MODULES = {
    "Layout": "context.layout",
    "Traffic": "context.traffic",
    "context_parallel": "context.parallel",
    "context_traffic": "context.traffic",
    "parallelize": "tensor_parallel",
    "shard": "data_parallel",
    "tensor_parallel_plan": "tensor_parallel",
}
"""Where names are, which are looked up when they are used: a tool that may run on several
processes must not import DTensor and the compiler, which take seconds, to run on one."""

__all__ = [
    "Layout",
    "Traffic",
    "context_parallel",
    "context_traffic",
    "parallelize",
    "shard",
    "tensor_parallel_plan",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
