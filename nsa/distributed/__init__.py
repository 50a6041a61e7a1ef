"""More than one GPU, on ``torch.distributed``: ranks share sequences (context parallelism)."""

from nsa.distributed.context.layout import Layout
from nsa.distributed.context.parallel import context_parallel
from nsa.distributed.context.traffic import Traffic, context_traffic

__all__ = [
    "Layout",
    "Traffic",
    "context_parallel",
    "context_traffic",
]
