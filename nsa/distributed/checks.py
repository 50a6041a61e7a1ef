"""What the functions here ask of their arguments."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from nsa.errors import ConfigError, show


def require_line(mesh: object) -> None:
    """Refuse what is not a mesh of one dimension.

    Raises:
        ConfigError: with what would be one.
    """
    if not isinstance(mesh, DeviceMesh):
        raise ConfigError(
            f"mesh: expected a DeviceMesh of one dimension, got {show(mesh)}; "
            'init_device_mesh("cuda", (processes,)) makes one'
        )
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        one = f"mesh[{names[-1]!r}]" if names else "a mesh with mesh_dim_names, by one name"
        raise ConfigError(f"mesh: expected one dimension, got {mesh.ndim}; take {one}")
