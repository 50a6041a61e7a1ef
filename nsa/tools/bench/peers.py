"""Kernels of other libraries for branches of NSA, measured where they are installed.

``fla-core`` (flash-linear-attention): the selected branch, written against version 0.6.0. Its list
of blocks is ours: −1, past the end of a short list, is skipped by its kernels. It differs in three
ways, of which each is either met or refused here: the width of the list must be a power of two,
which more −1 make it; the heads of a group must be a power of two of at least 16; a query must see
some key, which lists that a selection made allow.

``nvidia-cudnn-frontend``: the forward pass of the selected branch and of the window, written
against version 1.32.0, which has no backward of either; what it has for the compressed branch and
its scores runs from compute capability 10.0 on, and is not measured here.

B batch, T tokens, H query heads, K key/value heads, D key size, V value size, n listed blocks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.testing.inputs import Inputs
from nsa.tools.bench.baselines import Baseline, Unsupported
from nsa.tools.bench.cases import Timed
from nsa.tools.common.failures import failures, one_line
from nsa.tools.common.machine import version_of

_LEAST_GROUP = 16
"""Of fla."""


class Peer(NamedTuple):
    """A library with kernels for some branches."""

    distributions: tuple[str, ...]
    """It is one of these; the first is what to install."""
    branches: tuple[str, ...]
    baselines: Callable[[], dict[str, Baseline]]
    """By branch. Raises what an import raises where the library is broken."""


def installed(name: str) -> str | None:
    """Name and version of a peer's distribution, without importing it; None if there is none."""
    for distribution in PEERS[name].distributions:
        version = version_of(distribution)
        if version is not None:
            return f"{distribution} {version}"
    return None


def find_peer(name: str, device: torch.device) -> dict[str, Baseline]:
    """What a peer computes, by branch.

    Raises:
        Unsupported: it is not there, or not for this machine.
    """
    found = installed(name)
    if found is None:
        raise Unsupported(f"{name} is not installed: {how_to_install(name)}")
    if device.type != "cuda":
        raise Unsupported(f"{found} needs a CUDA device, got {device.type}")
    broken: tuple[type[Exception], ...] = (*failures(), ImportError, OSError)
    try:
        return PEERS[name].baselines()
    except broken as error:
        raise Unsupported(f"{found} does not import ({one_line(error)})") from error


def how_to_install(name: str) -> str:
    """A command."""
    return f"pip install {PEERS[name].distributions[0]}"


def _fla() -> dict[str, Baseline]:
    module = importlib.import_module("fla.ops.nsa.parallel")
    return {"selected": fla_selected(module, module.ParallelNSAFunction)}


def fla_selected(module: ModuleType, function: Any) -> Baseline:
    """The function inside ``parallel_nsa``, which itself pools keys and values first, whether or
    not anything uses that."""

    def timed(inputs: Inputs) -> Timed:
        config, listed = inputs.config, inputs.block_idx
        assert listed is not None
        group = config.group
        if group < _LEAST_GROUP or group & (group - 1):
            raise Unsupported(
                f"fla takes 16, 32, 64, … query heads on a key/value head, got {group}"
            )
        width = 1 << (listed.shape[-1] - 1).bit_length()
        lists = F.pad(listed, (0, width - listed.shape[-1]), value=-1)
        cu_seqlens = None if inputs.cu_seqlens is None else inputs.cu_seqlens.long()
        leaves = (inputs.q, *inputs.selected)
        call = (lists, width, config.select_block, config.softmax_scale, cu_seqlens)
        return Timed(lambda: function.apply(*leaves, *call), leaves, inputs.dout)

    return Baseline("fla", "selected", timed, lambda: forget_tuning(module))


def forget_tuning(module: ModuleType) -> None:
    """Makes its kernels choose their options anew.

    They remember the choice for a head size, whatever the length, and keep it on disk: it would be
    the one that was best for the small problem of the parity check.
    """
    for value in vars(module).values():
        layer = value  # a kernel is wrapped in what picks its options, each inside the next
        while layer is not None:
            if hasattr(layer, "configs") and isinstance(getattr(layer, "cache", None), dict):
                layer.cache.clear()
                layer.cache_results = False
            layer = getattr(layer, "fn", None)


def _cudnn_frontend() -> dict[str, Baseline]:
    module = importlib.import_module("cudnn.native_sparse_attention")
    cudnn = importlib.import_module("cudnn")
    name = "cudnn-frontend"
    selected = partial(cudnn_selected, module.SelectionAttention)
    window = partial(cudnn_window, module.SlidingWindowAttention, cudnn.create_handle())
    calls = {"selected": selected, "window": window}
    return {branch: Baseline(name, branch, timed) for branch, timed in calls.items()}


def cudnn_selected(kernel: Any, inputs: Inputs) -> Timed:
    """``SelectionAttention``: sequences are always packed, a list has a count beside it."""
    config, listed = inputs.config, inputs.block_idx
    assert listed is not None
    q, k, v = (x.detach().flatten(0, 1) for x in (inputs.q, *inputs.selected))
    listed = listed.flatten(0, 1)
    counts = (listed >= 0).sum(-1, dtype=torch.int32)
    cu_seqlens, longest = _packed(inputs)
    rest = (listed, counts, cu_seqlens, cu_seqlens)

    def results() -> tuple[Tensor, Tensor, Tensor]:
        total, most = (q.new_empty(q.shape[:2], dtype=torch.float32) for _ in range(2))
        return q.new_empty(*q.shape[:2], v.shape[-1]), total, most

    built = kernel(
        *(q, k, v, *results(), *rest),
        max_s_q=longest,
        max_s_k=longest,
        block_size=config.select_block,
        scale_softmax=config.softmax_scale,
        is_causal=True,
    )
    _build(built)

    def forward() -> Tensor:
        written = results()
        built.execute(q, k, v, *written, *rest)
        return written[0].view(*inputs.q.shape[:2], *written[0].shape[1:])

    return Timed(forward, forward_only=True)


def cudnn_window(kernel: Any, handle: Any, inputs: Inputs) -> Timed:
    """``SlidingWindowAttention``, cuDNN's own: a batch as ``[B, H, T, D]``, or packed sequences."""
    config = inputs.config
    q, k, v = (x.detach() for x in (inputs.q, *inputs.window))
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    packing: dict[str, Tensor] = {}
    most: dict[str, int] = {}
    if inputs.cu_seqlens is None:
        tensors = [x.transpose(1, 2) for x in (q, k, v, out)]
    else:
        cu_seqlens, longest = _packed(inputs)
        tensors = [x[0] for x in (q, k, v, out)]
        packing = dict.fromkeys(("seq_len_q", "seq_len_kv"), cu_seqlens.diff())
        for name, x in zip("qkvo", tensors, strict=True):
            packing[f"{name}_ragged_offset"] = cu_seqlens.long() * x.stride(0)
        most = dict.fromkeys(("max_seq_len_q", "max_seq_len_kv"), longest)
    given = {f"{name}_tensor": x for name, x in packing.items()}
    built = kernel(
        *tensors,
        **{f"sample_{name}": x for name, x in packing.items()},
        **most,
        left_bound=config.window,
        right_bound=0,
        attn_scale=config.softmax_scale,
        cudnn_handle=handle,
    )
    _build(built)

    def forward() -> Tensor:
        written = torch.empty_like(out)
        o = written.transpose(1, 2) if inputs.cu_seqlens is None else written[0]
        built.execute(*tensors[:3], o, **given)
        return written

    return Timed(forward, forward_only=True)


def _packed(inputs: Inputs) -> tuple[Tensor, int]:
    """cu_seqlens int32 ``[n_seq + 1]`` and the longest, of a regular batch as well."""
    B, T = inputs.q.shape[:2]
    if inputs.cu_seqlens is None:
        return torch.arange(0, B * T + 1, T, dtype=torch.int32, device=inputs.q.device), T
    assert inputs.max_seqlen is not None
    return inputs.cu_seqlens, inputs.max_seqlen


def _build(kernel: Any) -> None:
    """Compiles a kernel of cudnn-frontend, which says itself what it does not take."""
    try:
        taken = kernel.check_support()
        if taken:
            kernel.compile()
    except Exception as error:  # its own class for graphs is no RuntimeError
        raise Unsupported(f"cudnn-frontend: {one_line(error)}") from error
    if not taken:
        raise Unsupported("cudnn-frontend: its graph does not take this (its log says why)")


PEERS = {
    "fla": Peer(("fla-core", "flash-linear-attention"), ("selected",), _fla),
    "cudnn-frontend": Peer(("nvidia-cudnn-frontend",), ("selected", "window"), _cudnn_frontend),
}
