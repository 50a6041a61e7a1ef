"""Values that the parts of a converted layer start with which the dense layer did not have.

Both starts let φ be the mean of a block, which the MLP can be exactly: ``x = GELU(x) − GELU(−x)``,
and its hidden layer is twice as wide as a head.

``"paper"``: gates half open, as in a new layer. The compressed branch reads mean keys and values.

``"dense-equal"``: gates of one half, and φ of values starts at zero. As long as the window and the
selected blocks hold all tokens that a query sees, both branches are the dense layer's attention,
and half of each is all of it; the compressed branch adds nothing. The gradients of what came from
the dense layer are the dense model's, too. Nothing new is stuck: φ of values gets gradients from
the first step on, and what it adds then moves the gates.

L tokens of a block, D head size.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from nsa.compression import LinearCompress, MLPCompress
from nsa.config import NSAConfig
from nsa.errors import ConfigError, require_known, show
from nsa.module import NSAttention

Start = Literal["paper", "dense-equal"]


def check_start(start: object, config: NSAConfig) -> None:
    """Refuse an unknown start, and a dense one that the configuration rules out.

    Raises:
        ConfigError: names what to change.
    """
    require_known("start", start, get_args(Start))
    if start != "dense-equal":
        return
    for name, good, expected in (
        ("gate", config.gate == "sigmoid", "'sigmoid', whose halves add up to the dense layer"),
        ("compression", config.compression != "mean", "'mlp' or 'linear', which can start at 0"),
        ("select_schedule", config.select_schedule is None, "None"),
        ("select_mass", config.select_mass in (None, 1), "None"),
        ("select_regions", config.select_regions is None, "None"),
    ):
        if not good:
            got = show(getattr(config, name))
            raise ConfigError(f"{name}: expected {expected} for start='dense-equal', got {got}")


def dense_length(config: NSAConfig) -> int:
    """Tokens of the longest input on which a ``"dense-equal"`` start gives the dense model."""
    return min(config.window, config.num_selected * config.select_block)


@torch.no_grad()
def begin(layer: NSAttention, start: Start) -> None:
    """Set the new parameters of a converted layer."""
    nn.init.zeros_(layer.gate_proj.weight)
    nn.init.zeros_(layer.gate_proj.bias)
    if start == "paper":
        layer.gate_proj.reset_parameters()
        nn.init.zeros_(layer.gate_proj.bias)
    for phi in (layer.compress_k, layer.compress_v):
        last = _let_it_be_the_mean(phi, layer.config.compress_block)
        if start == "dense-equal" and phi is layer.compress_v and last is not None:
            nn.init.zeros_(last.weight)


def _let_it_be_the_mean(phi: nn.Module, L: int) -> nn.Linear | None:
    """Returns φ's last layer; None: φ has no parameters."""
    if isinstance(phi, MLPCompress):
        D = phi.down.out_features
        nn.init.zeros_(phi.position)
        mean = _mean(phi.up.weight, L, D)
        phi.up.weight.copy_(torch.cat([mean, -mean]))
        one = torch.eye(D, dtype=phi.down.weight.dtype, device=phi.down.weight.device)
        phi.down.weight.copy_(torch.cat([one, -one], dim=1))
        for layer in (phi.up, phi.down):
            nn.init.zeros_(layer.bias)
        return phi.down
    if isinstance(phi, LinearCompress):
        phi.proj.weight.copy_(_mean(phi.proj.weight, L, phi.proj.out_features))
        nn.init.zeros_(phi.proj.bias)
        return phi.proj
    return None


def _mean(weight: Tensor, L: int, D: int) -> Tensor:
    """``[D, L·D]``"""
    return torch.eye(D, dtype=weight.dtype, device=weight.device).repeat(1, L) / L
