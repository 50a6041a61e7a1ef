"""Which tensors a compiled forward saves for its backward in one memory.

AOTAutograd takes every saved tensor for a buffer of its own and may let the backward overwrite it
(``torch._functorch.config.donated_buffer``). Of two views of one memory that is wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd


def saved_in_one_memory(module: nn.Module, x: Tensor, **options: Any) -> list[set[str]]:
    """Names of the saved tensors that share memory with each other and with no input.

    The module is compiled as for Inductor, but for the code; a backward pass runs as well.
    """
    groups = _saved_storages(module, x, **options)
    names = ({f"{node} ({node.target})" for node in group} for group in groups)
    return [group for group in names if len(group) > 1]


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of what a compiled forward saves, its inputs and its output left out."""
    _, *groups = _saved_storages(module, x)  # the output comes first
    return sum(group[0].meta["val"].untyped_storage().nbytes() for group in groups)


def _saved_storages(module: nn.Module, x: Tensor, **options: Any) -> list[list[torch.fx.Node]]:
    """What a compiled forward returns, the module's output first, by the memory it stands in."""
    groups: dict[int | None, list[torch.fx.Node]] = {}

    def forward(graph: torch.fx.GraphModule, inputs: object) -> Any:
        def storage(node: torch.fx.Node) -> int | None:
            value = node.meta.get("val")
            return value.untyped_storage()._cdata if isinstance(value, Tensor) else None

        nodes = list(graph.graph.nodes)
        given = {storage(node) for node in nodes if node.op == "placeholder"}
        for node in nodes[-1].args[0]:
            if isinstance(node, torch.fx.Node) and storage(node) not in (*given, None):
                groups.setdefault(storage(node), []).append(node)
        return make_boxed_func(graph.forward)

    compiler = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    torch.compile(module, backend=compiler, fullgraph=True)(x, **options).sum().backward()
    torch._dynamo.reset()
    return list(groups.values())
