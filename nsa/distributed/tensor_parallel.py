"""Tensor parallel: each process computes some of the key/value heads, and part of every MLP.

Of attention, projections of q, k, v and gates are split by rows of their weights, which are heads,
and the output projection by columns; φ is whole everywhere, and its gradients are summed. So one
all-reduce of ``[B, T, dim]`` goes forward and one backward, for attention and for an MLP.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from nsa.config import NSAConfig
from nsa.distributed.checks import require_line
from nsa.distributed.sums import local_parts, sum_gradients, sum_parts
from nsa.errors import ConfigError
from nsa.models.dense import DenseAttention
from nsa.models.language_model import SwiGLU
from nsa.module import NSAttention

_ROWS, _COLUMNS = Shard(0), Shard(1)


def tensor_parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """Say how the layers of a model are split, for ``parallelize_module``.

    Args:
        model: it, or modules in it, are :class:`nsa.NSAttention`, or attention and MLP of
            :class:`nsa.models.LanguageModel`. Others are left out; add styles of torch's, or a
            :class:`SplitModule`, for those.

    Returns:
        a style by the name of the module, which is "" for the model itself.

    Raises:
        ConfigError: a layer shares a weight with something outside it.
    """
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        if isinstance(module, (NSAttention, DenseAttention)):
            plan[name] = SplitHeads()
        elif isinstance(module, SwiGLU):
            plan[name] = SplitModule(rows=("gate_proj", "up_proj"), columns=("down_proj",))
    _require_own_weights(model, plan)
    return plan


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Apply :func:`tensor_parallel_plan` to a model, in place; before ``fully_shard``.

    ``state_dict`` keeps names and shapes: its tensors are DTensors.

    Args:
        model: whole, and the same on every process.
        mesh: of one dimension; its size must divide ``num_kv_heads``.

    Raises:
        ConfigError: a layer that cannot be split so, or no layer to split.
    """
    require_line(mesh)
    plan = tensor_parallel_plan(model)
    if not plan:
        raise ConfigError(
            "model: expected a layer to split (NSAttention, DenseAttention or SwiGLU of nsa), got "
            f"none in {type(model).__name__}; parallelize_module splits others"
        )
    for name, style in plan.items():
        parallelize_module(model.get_submodule(name), mesh, style)
    return model


def _require_own_weights(model: nn.Module, layers: Iterable[str]) -> None:
    """Refuse weights that a layer shares: each would get a tensor of its own, and train alone."""
    inside = {x for layer in layers for x in model.get_submodule(layer).modules()}
    others = {name: x for name, x in model.named_modules() if x not in inside}
    found = [(layer, layer, model.get_submodule(layer).named_parameters()) for layer in layers]
    found += [("", name, x.named_parameters(recurse=False)) for name, x in others.items()]
    owners: dict[nn.Parameter, tuple[str, str]] = {}
    for layer, prefix, parameters in found:
        for leaf, parameter in parameters:
            name = f"{prefix}.{leaf}"
            owner, other = owners.setdefault(parameter, (layer, name))
            if owner != layer:
                raise ConfigError(
                    f"{other}: expected a weight of one layer to split, got one that is {name}, "
                    "too; untie them"
                )


def _require_heads(config: NSAConfig, size: int) -> None:
    """Refuse to split heads among so many processes; what would fit is named."""
    heads = config.num_kv_heads
    if heads % size:
        fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ConfigError(
            f"tp: expected a divisor of num_kv_heads={heads} ({fits}), got {size}: the query "
            "heads of a group stay with their key/value head"
        )


def _require_no_recompute(module: nn.Module) -> None:
    """Refuse to compute again in backward, where parameters are DTensors once more."""
    if getattr(module, "recompute", False):
        raise ConfigError(
            "recompute: expected False with tensor parallel, got True; checkpoint the block "
            "instead (activation_checkpointing)"
        )


class SplitModule(ParallelStyle):
    """Splits the linear layers of a module that sums over what is split, as an MLP does.

    In a forward pass the module sees plain tensors: its part of every weight. Its first argument is
    whole, and so is its result, the sum over all processes.

    Args:
        rows: names of linear layers, or of modules of them, whose outputs are split.
        columns: of those whose inputs are split; without bias.
    """

    def __init__(self, *, rows: tuple[str, ...], columns: tuple[str, ...]) -> None:
        self.rows, self.columns = rows, columns

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        require_line(device_mesh)
        placements = self._placements(module, device_mesh)
        sharded: dict[nn.Parameter, nn.Parameter] = {}
        for name, parameter in _named_parameters(module):
            if parameter not in sharded:
                value = distribute_tensor(parameter.detach(), device_mesh, [placements[name]])
                sharded[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            parent, _, leaf = name.rpartition(".")
            module.get_submodule(parent).register_parameter(leaf, sharded[parameter])
        # of what is copied or pickled with the module, unlike a closure
        module.forward = functools.partial(_forward, _Unbound(module))
        return module

    def _placements(self, module: nn.Module, mesh: DeviceMesh) -> dict[str, Placement]:
        """Of every parameter; what is not split is replicated."""
        found: dict[str, Placement] = {}
        for name, parameter in _named_parameters(module):
            if isinstance(parameter, DTensor):
                raise ConfigError(
                    f"{type(module).__name__}.{name}: expected a whole parameter, got a sharded "
                    "one; apply tensor parallel once, and before fully_shard"
                )
            found[name] = Replicate()
        for names, split in ((self.rows, _ROWS), (self.columns, _COLUMNS)):
            for part in names:
                for prefix, linear in _linears(module, part):
                    size = linear.weight.shape[split.dim]
                    if size % mesh.size():
                        raise ConfigError(
                            f"{type(module).__name__}.{prefix}: expected {mesh.size()} processes "
                            f"to divide its {size} features, got a rest"
                        )
                    if split is _COLUMNS and linear.bias is not None:
                        raise ConfigError(
                            f"{type(module).__name__}.{prefix}: expected no bias, which every "
                            "process would add, got one"
                        )
                    found |= {f"{prefix}.{name}": split for name, _ in linear.named_parameters()}
        first_names: dict[nn.Parameter, str] = {}
        for name, parameter in _named_parameters(module):
            first = first_names.setdefault(parameter, name)
            if found[name] != found[first]:
                raise ConfigError(
                    f"{type(module).__name__}.{name}: expected a weight that is split one way, got "
                    f"one that is {first}, too; untie them"
                )
        return found


class SplitHeads(SplitModule):
    """Splits an attention layer by key/value heads, with the query heads and gates of each."""

    def __init__(self) -> None:
        super().__init__(rows=("q_proj", "k_proj", "v_proj", "gate_proj"), columns=("o_proj",))

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, (NSAttention, DenseAttention))
        require_line(device_mesh)
        config, size = module.config, device_mesh.size()
        _require_heads(config, size)
        _require_no_recompute(module)
        super()._apply(module, device_mesh)
        heads, kv_heads = config.num_heads // size, config.num_kv_heads // size
        module.config = replace(config, num_heads=heads, num_kv_heads=kv_heads)
        return module


def _linears(module: nn.Module, part: str) -> list[tuple[str, nn.Linear]]:
    """The linear layers at a name, one or several, with their full names."""
    found = getattr(module, part, None)
    if found is None:  # dense attention has no gates
        return []
    modules = {part: found}
    if isinstance(found, nn.ModuleDict):
        modules = {f"{part}.{name}": child for name, child in found.items()}
    for name, child in modules.items():
        if type(child) is not nn.Linear:
            raise ConfigError(
                f"{type(module).__name__}.{name}: expected an nn.Linear to split, got "
                f"{type(child).__name__}"
            )
    return list(modules.items())


class _Unbound(nn.Module):
    """Calls a module's own ``forward``, whatever stands in its place."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


def _forward(unbound: _Unbound, x: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Compute this process's part with plain tensors, and sum the parts."""
    _require_no_recompute(unbound.module)
    if x is None:
        raise ConfigError(
            f"{type(unbound.module).__name__}: expected its input as the first argument with "
            f"tensor parallel, got {', '.join(kwargs) or 'none'}; such a layer cannot be split"
        )
    names, parameters = zip(*_named_parameters(unbound), strict=True)
    group = parameters[0].device_mesh.get_group().group_name
    parts = dict(zip(names, local_parts(parameters, group), strict=True))
    inputs = sum_gradients(x, group), *args
    # what is tied has parts of its own; torch would not restore a module that stands twice
    out = torch.func.functional_call(unbound, parts, inputs, kwargs, tie_weights=False)
    return sum_parts(out, group)


def _named_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Of every module in it once, a weight that several share by each of its names."""
    return [
        (f"{name}.{leaf}".removeprefix("."), parameter)
        for name, child in module.named_modules()
        for leaf, parameter in child.named_parameters(recurse=False, remove_duplicate=False)
    ]
