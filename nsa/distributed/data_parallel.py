"""Data parallel by FSDP2: each process keeps a part of every parameter, and gathers blocks."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from nsa.distributed.checks import require_line
from nsa.errors import ConfigError
from nsa.models import LanguageModel


def shard(
    model: LanguageModel, mesh: DeviceMesh, policy: MixedPrecisionPolicy | None = None
) -> LanguageModel:
    """Apply ``fully_shard`` to each block of a model and to the rest, in place.

    Compile blocks and apply tensor parallel before, make the optimizer after. A model on the CPU is
    moved to the mesh's device block by block.

    Args:
        model: whole (or split by :func:`nsa.distributed.tensor_parallel.parallelize`), and the same
            on every process.
        mesh: of one dimension.
        policy: what parameters are gathered and gradients reduced in; by default their own dtype,
            so that autocast computes what it computes on one process.

    Raises:
        ConfigError: another model, or another mesh.
    """
    if not isinstance(model, LanguageModel):
        raise ConfigError(
            f"model: expected a LanguageModel, got {type(model).__name__}; fully_shard of "
            "torch.distributed.fsdp takes any other"
        )
    require_line(mesh)
    policy = policy or MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model
