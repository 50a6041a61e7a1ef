"""A mesh of several processes: what :class:`nsa.distributed.mesh.Mesh` says, with collectives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from nsa.distributed.context.layout import Layout
from nsa.distributed.context.parallel import context_parallel
from nsa.distributed.data_parallel import shard
from nsa.distributed.local_parameters import LocalParameters
from nsa.distributed.mesh import Mesh, MeshConfig, OwnParameters
from nsa.distributed.ranks import LaunchedRanks
from nsa.distributed.tensor_parallel import parallelize
from nsa.models import LanguageModel


class ProcessMesh(Mesh):
    """The processes of ``torchrun`` as a mesh of dp, cp and tp, the last the fastest.

    Args:
        config: the sizes.
        ranks: what :func:`nsa.distributed.ranks.launched` gave.
        device_type: "cpu", or "cuda": then each process has the GPU of its local rank.

    Raises:
        ConfigError: more processes than GPUs.
        UsageError: as :meth:`MeshConfig.sizes`.
    """

    def __init__(self, config: MeshConfig, ranks: LaunchedRanks, device_type: str) -> None:
        sizes = config.sizes(ranks.size)
        super().__init__(ranks.device(device_type), ranks)
        self.sizes = sizes
        names = tuple(self.sizes)
        mesh = init_device_mesh(device_type, tuple(self.sizes.values()), mesh_dim_names=names)
        self.tp = mesh["tp"]
        self.dp = mesh["dp"]
        self.cp = mesh["cp"]
        self.data = mesh["dp", "cp"]._flatten("dp_cp") if config.cp > 1 else mesh["dp"]
        """Over which parameters are sharded, and losses averaged."""
        self._layouts: dict[int, Layout] = {}

    def place(self, model: LanguageModel) -> LanguageModel:
        if self.data.size() == 1:  # else what is sharded is moved then, block by block
            model = model.to(self.device)
        if self.tp.size() > 1:
            parallelize(model, self.tp)
        return model

    def shard(self, model: LanguageModel) -> LanguageModel:
        return shard(model, self.data) if self.data.size() > 1 else model

    def rows(self, count: int) -> slice:
        part = -(-count // self.dp.size())
        first = min(count, part * self.dp.get_local_rank())
        return slice(first, min(count, first + part))

    @contextlib.contextmanager
    def sequences(self, length: int) -> Iterator[Callable[[Tensor], Tensor]]:
        if self.cp.size() == 1:
            yield lambda x: x
            return
        if length not in self._layouts:
            self._layouts[length] = Layout.head_tail(length, group=self.cp.get_group())
        layout = self._layouts[length]
        with context_parallel(layout):
            yield layout.shard

    def mean(self, loss: Tensor) -> Tensor:
        if self.data.size() > 1:
            dist.all_reduce(loss, group=self.data.get_group())
            loss /= self.data.size()
        return loss

    def total(self, value: float) -> float:
        sums = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(sums)
        return float(sums) * self.dp.size() / self.ranks.size  # the others have the same rows

    def parameters(self, model: nn.Module) -> OwnParameters:
        return LocalParameters(model)

    def gather(self, tensor: Tensor) -> Tensor:
        whole = _whole(tensor)
        return whole.cpu() if self.ranks.leads else torch.empty(0)  # else it would fill the GPU

    def spread(self, read: Callable[[], Tensor], into: Tensor) -> None:
        whole = torch.empty(into.shape, dtype=into.dtype, device=self.device)
        if self.ranks.leads:
            whole.copy_(read())
        dist.broadcast(whole, 0)
        if isinstance(into, DTensor):
            everywhere = [Replicate()] * into.device_mesh.ndim
            whole = DTensor.from_local(whole, into.device_mesh, everywhere, run_check=False)
        into.copy_(whole)


def _whole(tensor: Tensor) -> Tensor:
    """All parts of a tensor, on every process."""
    # one dimension after the other, the outermost first: FSDP2 split what was split by tp
    while isinstance(tensor, DTensor):
        placements = list(tensor.placements)
        split = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
        if not split:
            return tensor.to_local()
        placements[split[0]] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor
