"""The peer: the selected branch of ``fla-core`` (flash-linear-attention), if it is installed.

Written against version 0.6.0. Its list of blocks is ours: −1, past the end of a short list, is
skipped by its kernels. It differs in three ways, of which each is either met or refused here: the
width of the list must be a power of two, which more −1 make it; the heads of a group must be a
power of two of at least 16; a query must see some key, which lists that a selection made allow.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from nsa.testing.inputs import Inputs
from nsa.tools.bench.baselines import Baseline, Unsupported
from nsa.tools.bench.cases import Timed
from nsa.tools.common.machine import version_of

NAME = "fla"
_DISTRIBUTIONS = ("fla-core", "flash-linear-attention")
_LEAST_GROUP = 16
_BROKEN = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError)
"""What importing a package that does not fit this machine may raise."""


def installed() -> str | None:
    """Name and version of the distribution, without importing it; None if there is none."""
    for name in _DISTRIBUTIONS:
        version = version_of(name)
        if version is not None:
            return f"{name} {version}"
    return None


def find_fla(device: torch.device) -> Baseline:
    """The peer's selected branch.

    Raises:
        Unsupported: it is not there, or not for this machine.
    """
    found = installed()
    if found is None:
        raise Unsupported("fla is not installed: pip install fla-core")
    if device.type != "cuda":
        raise Unsupported(f"{found} needs a CUDA device, got {device.type}")
    try:
        module = importlib.import_module("fla.ops.nsa.parallel")
        function = module.ParallelNSAFunction
    except _BROKEN as error:
        text = " ".join(str(error).split())
        raise Unsupported(f"{found} does not import ({type(error).__name__}: {text})") from error
    return fla_selected(module, function)


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

    return Baseline(NAME, "selected", timed, lambda: forget_tuning(module))


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
