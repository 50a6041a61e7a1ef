"""More than one GPU, on ``torch.distributed``: ranks share sequences (context parallelism)."""

from nsa.distributed.context.layout import Layout
from nsa.distributed.context.parallel import context_parallel

__all__ = [
    "Layout",
    "context_parallel",
]
