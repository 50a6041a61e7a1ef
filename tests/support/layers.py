"""The layer written out by hand over the oracle, for tests of NSAttention.

B batch, T tokens, H query heads, K key/value heads, D key size, V value size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nsa import KV, NSAConfig, NSAttention, Resolution, module, reference
from nsa.core.inputs import AttentionInputs

DIM = 12
CONFIG = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    value_dim=6,
    compress_block=4,
    compress_stride=2,
    select_block=6,
    num_selected=3,
    num_local=1,
    window=7,
    rope_theta=100.0,
)
BRANCHES = ("compressed", "selected", "window")
LENGTHS = (13, 0, 3, 21)

VARIANTS = {
    "paper": CONFIG,
    "linear": replace(CONFIG, compression="linear"),
    "mean": replace(CONFIG, compression="mean"),
    "softmax gate": replace(CONFIG, gate="softmax"),
    "shared kv": replace(CONFIG, independent_kv=False),
    "no rope": replace(CONFIG, rope_theta=None),
    "odd": replace(
        CONFIG,
        compression="linear",
        gate="softmax",
        independent_kv=False,
        num_heads=3,
        num_kv_heads=1,
        value_dim=None,
        scale=0.2,
    ),
}


class Problem(NamedTuple):
    """Input of the layer, and the gradient of its output."""

    x: Tensor
    dout: Tensor
    cu_seqlens: Tensor | None


def problem(
    lengths: tuple[int, ...] | None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Problem:
    """Packed sequences of these lengths, or two rows of 37 tokens."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, 37, DIM) if lengths is None else (1, sum(lengths), DIM)
    x, dout = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    cu_seqlens = None
    if lengths is not None:
        cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)
    return Problem(x.to(device, dtype).requires_grad_(), dout.to(device, dtype), cu_seqlens)


def make_layer(
    config: NSAConfig = CONFIG, *, dtype: torch.dtype = torch.float64, backend: str | None = None
) -> NSAttention:
    """A layer whose every parameter, biases and position embedding included, is drawn anew."""
    layer = NSAttention(DIM, config, backend=backend, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() == 2 else 1
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn * fan_in**-0.5)
    return layer.to(dtype)


def by_hand(layer: NSAttention, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """What the layer should compute, from nothing but its parameters and the oracle."""
    config, weights = layer.config, dict(layer.named_parameters())

    def project(name: str, size: int) -> Tensor:
        y = F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
        return y.unflatten(-1, (-1, size))

    def rotated(y: Tensor) -> Tensor:
        theta = config.rope_theta
        return y if theta is None else reference.apply_rope(y, theta, cu_seqlens)

    def compressed(y: Tensor, name: str) -> Tensor:
        phi = {
            key.removeprefix(f"{name}."): value
            for key, value in weights.items()
            if key.startswith(f"{name}.")
        }
        return reference.compress(y, phi, config, cu_seqlens).to(y.dtype)

    pairs = {}
    for branch in BRANCHES:
        suffix = f".{branch}" if config.independent_kv else ""
        k = rotated(project(f"k_proj{suffix}", config.head_dim))
        pairs[branch] = KV(k, project(f"v_proj{suffix}", config.dv))
    tokens = pairs["compressed"]
    pairs["compressed"] = KV(compressed(tokens.k, "compress_k"), compressed(tokens.v, "compress_v"))
    logits = project("gate_proj", 3)
    gates = logits.sigmoid() if config.gate == "sigmoid" else logits.softmax(-1)
    q = rotated(project("q_proj", config.head_dim))
    with torch.autocast(q.device.type, enabled=False):  # attention is never lowered
        out = reference.nsa_attention(
            q, *(pairs[branch] for branch in BRANCHES), gates, config, cu_seqlens=cu_seqlens
        )
    return F.linear(out.flatten(2), weights["o_proj.weight"])


def gradients(layer: NSAttention, out: Tensor, case: Problem) -> dict[str, Tensor]:
    """The gradient of x and of every parameter."""
    leaves = {"x": case.x, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(out, list(leaves.values()), case.dout.to(out.dtype))
    return dict(zip(leaves, grads, strict=True))


def by_part(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """One vector for each part of the layer: the truth for φ's last bias of keys is exactly 0."""
    parts: dict[str, list[Tensor]] = {}
    for name, x in found.items():
        parts.setdefault(name.split(".")[0], []).append(x.detach().double().flatten())
    return {name: torch.cat(vectors) for name, vectors in parts.items()}


def agree(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Norms of the differences, relative to the norms."""
    assert got.keys() == want.keys()
    wrong = {
        name: error
        for name, x in want.items()
        if not (error := (got[name] - x).norm().item()) <= tolerance * x.norm().item() + 1e-12
    }
    assert not wrong


def seen_by_attention(monkeypatch: pytest.MonkeyPatch) -> list[AttentionInputs]:
    """A list that grows by one entry for each forward of any layer: what it gave to attention."""
    seen: list[AttentionInputs] = []
    run = module.run

    def watched(
        resolution: Resolution, inputs: AttentionInputs, *args: Any, **kwargs: Any
    ) -> Tensor:
        seen.append(inputs)
        return run(resolution, inputs, *args, **kwargs)

    monkeypatch.setattr(module, "run", watched)
    return seen
