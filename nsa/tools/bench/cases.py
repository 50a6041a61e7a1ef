"""What ``bench`` times: the data of a problem, and one call for each branch.

B batch, T tokens, H query heads, K key/value heads, D key size, V value size, n listed blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nsa import nsa_attention
from nsa.backends import Resolution, load
from nsa.backends.protocol import STEPS
from nsa.config import NSAConfig
from nsa.settings import Settings
from nsa.testing.inputs import Inputs
from nsa.tools.common.problems import Trial, run_branch

WHOLE = ("all", "all+select")
"""The three branches and their sum: with the block list given, and with the selection in it."""
BRANCHES = (*STEPS, *WHOLE)
DENSE = "dense"
"""The branch name of dense causal attention, the baseline."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A call to time, forward and backward."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...] = ()
    """What it is differentiated with respect to; nothing if it has no backward."""
    dout: Tensor | None = None
    """The gradient of its output."""
    forward_only: bool = False
    """Whether somebody else's backward is missing, so that no time stands for both passes."""


@dataclass(frozen=True, slots=True)
class Data:
    """One problem's tensors, the same for everything that is timed on it."""

    inputs: Inputs
    """With the block list that ``sdpa`` selects, which every backend is given."""
    lse: Tensor
    """``[B, T, H]`` of the compressed branch, which the selection is given."""


def heads_label(config: NSAConfig) -> str:
    """The layout as ``--heads`` takes it: ``Hq/Hkv:D``, ``Hq/Hkv:Dk/Dv`` where the sizes differ."""
    sizes = f"{config.head_dim}"
    if config.dv != config.head_dim:
        sizes += f"/{config.dv}"
    return f"{config.num_heads}/{config.num_kv_heads}:{sizes}"


def make_data(trial: Trial) -> Data:
    """Random inputs, drawn on the device: normal, gates uniform."""
    inputs = trial.bare_inputs(native=True)
    steps = load("sdpa")
    with torch.no_grad():
        _, lse = run_branch(steps, "compressed", inputs)
        blocks = run_branch(steps, "select", inputs, lse=lse)
    return Data(replace(inputs, block_idx=blocks), lse)


def timed_branch(branch: str, data: Data, resolution: Resolution, settings: Settings) -> Timed:
    """The call of one of :data:`BRANCHES` on what the resolution says runs it."""
    x = data.inputs
    if branch in WHOLE:
        inputs = (x.q, x.compressed, x.selected, x.window, x.gates)
        options: dict[str, Any] = {
            "cu_seqlens": x.cu_seqlens,
            "max_seqlen": x.max_seqlen,
            "block_idx": x.block_idx if branch == "all" else None,
            "backend": resolution.backend,
        }
        return Timed(lambda: nsa_attention(*inputs, x.config, **options), x.leaves(), x.dout)
    steps = load(resolution.per_branch[branch], settings)
    if branch == "select":
        return Timed(lambda: run_branch(steps, branch, x, lse=data.lse))
    leaves = (x.q, *getattr(x, branch))
    return Timed(lambda: run_branch(steps, branch, x)[0], leaves, x.dout)
