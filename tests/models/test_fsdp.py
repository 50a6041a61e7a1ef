"""FSDP2 (``torch.distributed.fsdp.fully_shard``) over the language model: a step changes nothing.

Blocks and the root are sharded, as people do it; parameters are DTensors outside a forward pass.
"""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from nsa import NSAConfig
from nsa.models import LanguageModel, ModelConfig

CONFIG = ModelConfig(
    dim=16,
    num_layers=2,
    vocab_size=32,
    nsa=NSAConfig(
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        compress_block=4,
        compress_stride=2,
        select_block=8,
        num_selected=4,
        window=9,
    ),
)
ON_GPU = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning")]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])


def join(rank: int, size: int, store: dist.Store, device: str = "cpu") -> None:
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        store=store,
        rank=rank,
        world_size=size,
        timeout=dt.timedelta(seconds=60),
        device_id=None if device == "cpu" else torch.device(device, 0),
    )


@pytest.fixture
def alone(device: str) -> Iterator[None]:
    """A process group of this process."""
    join(0, 1, dist.HashStore(), device)
    yield
    dist.destroy_process_group()


def pair(
    backend: str,
    device: str = "cpu",
    *,
    compiler: str | None = None,
    policy: MixedPrecisionPolicy | None = None,
) -> tuple[LanguageModel, LanguageModel]:
    """A plain model and a sharded one with the same parameters, its blocks compiled or not."""
    torch.manual_seed(0)
    plain = LanguageModel(CONFIG, backend=backend, device=device)
    sharded = LanguageModel(CONFIG, backend=backend, device=device)
    sharded.load_state_dict(plain.state_dict())
    if compiler is not None:
        sharded.compile_blocks(dynamic=False, backend=compiler)
    mesh = init_device_mesh(device, (dist.get_world_size(),))  # else the GPU, where there is one
    options = {"mesh": mesh} if policy is None else {"mesh": mesh, "mp_policy": policy}
    for block in sharded.blocks:
        fully_shard(block, **options)
    fully_shard(sharded, **options)
    return plain, sharded


def batch(device: str = "cpu", packed: bool = False) -> tuple[list[Tensor], dict[str, object]]:
    generator = torch.Generator().manual_seed(1)
    shape = (1, 80) if packed else (2, 40)
    inputs = [torch.randint(32, shape, generator=generator).to(device) for _ in range(2)]
    if not packed:
        return inputs, {}
    cu_seqlens = torch.tensor([0, 33, 33, 80], dtype=torch.int32, device=device)
    return inputs, {"cu_seqlens": cu_seqlens, "max_seqlen": 47}


def whole(x: Tensor | None) -> Tensor:
    assert isinstance(x, DTensor)
    return x.full_tensor()


def agree(plain: LanguageModel, sharded: LanguageModel) -> None:
    """Gradients, then parameters after a step of AdamW."""
    want, got = dict(plain.named_parameters()), dict(sharded.named_parameters())
    assert want.keys() == got.keys()
    for name, x in want.items():
        torch.testing.assert_close(whole(got[name].grad), x.grad, rtol=1e-4, atol=1e-6)
    for model in (plain, sharded):
        torch.optim.AdamW(model.parameters(), lr=0.1, eps=1e-3).step()
    for name, x in want.items():
        torch.testing.assert_close(whole(got[name].detach()), x.detach(), rtol=1e-3, atol=1e-3)


@DEVICES
@pytest.mark.parametrize("packed", [False, True], ids=["regular", "packed"])
@pytest.mark.parametrize("backend", ["sdpa", "compiled"])
def test_a_sharded_step_is_the_step(backend: str, packed: bool, device: str, alone: None) -> None:
    plain, sharded = pair(backend, device)
    inputs, packing = batch(device, packed)
    want, got = plain.loss(*inputs, **packing), sharded.loss(*inputs, **packing)
    torch.testing.assert_close(got, want)
    want.backward()
    got.backward()
    agree(plain, sharded)


@DEVICES
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's, of FSDP's inputs
def test_blocks_compiled_and_sharded(device: str, alone: None) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, sharded = pair("compiled", device, compiler="aot_eager")
    inputs, _ = batch(device)
    want, got = plain.loss(*inputs), sharded.loss(*inputs)
    torch.testing.assert_close(got, want)
    want.backward()
    got.backward()
    agree(plain, sharded)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()


@DEVICES
@pytest.mark.parametrize("backend", ["sdpa", "compiled"])
def test_mixed_precision(backend: str, device: str, alone: None) -> None:
    """Parameters lowered by FSDP in place of autocast: a bf16 model with fp32 gradients."""
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    plain, sharded = pair(backend, device, policy=policy)
    plain.to(torch.bfloat16)
    inputs, _ = batch(device)
    want, got = plain.loss(*inputs), sharded.loss(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0.0)
    want.backward()
    got.backward()
    for mine, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
        grad = whole(mine.grad)
        assert grad.dtype == torch.float32
        assert theirs.grad is not None
        torch.testing.assert_close(grad, theirs.grad.float(), rtol=0.05, atol=1e-3)


# Two processes: this one and a child


def half(rank: int, path: str) -> None:
    """A step on one row of the batch; of two ranks FSDP averages the gradients."""
    join(rank, 2, dist.FileStore(path, 2))
    try:
        plain, sharded = pair("sdpa")
        inputs, _ = batch()
        loss = sharded.loss(*(x[rank : rank + 1] for x in inputs))
        loss.backward()
        plain.loss(*inputs).backward()
        local = next(iter(sharded.parameters()))
        assert isinstance(local, DTensor)
        assert local.to_local().shape[0] == local.shape[0] // 2  # or nothing would be sharded
        agree(plain, sharded)
    finally:
        dist.destroy_process_group()


def test_two_ranks_are_one_batch(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    # torch's threads may outlive the group: an exit that waits for none of them cannot abort
    code = "import os, sys; from tests.models.test_fsdp import half; half(1, sys.argv[1])"
    code += "; os._exit(0)"
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", code, path], cwd=root, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            half(0, path)
        finally:
            _, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
