"""Attention modules of a transformers model: found, and held to what a converted layer computes.

D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nsa.config import NSAConfig
from nsa.core.rope import Angles, apply_rope
from nsa.errors import ConfigError, show

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")


def find_attention(model: nn.Module) -> dict[str, nn.Module]:
    """The self-attention modules of a model, by name.

    Raises:
        ConfigError: there is none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if all(hasattr(module, part) for part in (*PROJECTIONS, "layer_idx"))
    }
    if not found:
        raise ConfigError(
            f"model: expected attention modules with {', '.join(PROJECTIONS)}, as of Llama, got "
            f"{type(model).__name__} without"
        )
    return found


def check_attention(name: str, attention: Any) -> None:
    """Refuse a module that computes something else than a converted layer's branches do.

    Raises:
        ConfigError: names the part that would be lost.
    """
    known = (*PROJECTIONS, *NORMS)
    others = [part for part, _ in attention.named_children() if part not in known]
    others += [part for part, _ in attention.named_parameters(recurse=False)]
    dropout = getattr(attention, "attention_dropout", 0.0)
    for part in PROJECTIONS:
        projection = getattr(attention, part)
        if not isinstance(getattr(projection, "weight", None), Tensor):
            raise ConfigError(
                f"{name}.{part}: expected a projection with a weight, got "
                f"{type(projection).__name__}: convert before quantising"
            )
        if hasattr(projection.weight, "placements"):  # a DTensor, without the import of its package
            raise ConfigError(
                f"{name}.{part}: expected a whole weight, got a sharded one: convert the whole "
                "model, then shard it (fully_shard)"
            )
    for good, expected, got in (
        (not others, f"no parts but {', '.join(known)}", ", ".join(others)),
        (getattr(attention, "is_causal", True), "causal attention", "another"),
        (not dropout, "attention_dropout=0 (set it in model.config and model)", dropout),
        (not attention.q_proj.weight.is_meta, "weights in memory", "offloaded ones"),
        (
            attention.q_proj.weight.is_meta or _is_plain(attention),
            "softmax of heads, normed one by one if at all, that RoPE rotates by halves",
            "another attention",
        ),
    ):
        if not good:
            raise ConfigError(f"{name}: expected {expected}, got {got}: it cannot be converted")


def fitting(attention: Any, config: NSAConfig) -> NSAConfig:
    """The configuration of the layer that replaces a module: heads and scale are the module's.

    Raises:
        ConfigError: a configuration of other heads, or of another scale.
    """
    D = int(attention.head_dim)
    for name, expected, got in (
        ("num_heads", attention.q_proj.out_features // D, config.num_heads),
        ("num_kv_heads", attention.k_proj.out_features // D, config.num_kv_heads),
        ("head_dim", D, config.head_dim),
        ("value_dim", D, config.dv),
    ):
        if got != expected:
            raise ConfigError(f"{name}: expected the model's {expected}, got {got}")
    scale = float(attention.scaling)
    if config.scale is not None and config.scale != scale:
        raise ConfigError(f"scale: expected None or the model's {scale}, got {show(config.scale)}")
    return replace(config, scale=None if scale == D**-0.5 else scale, rope_theta=None)


def default_config(attention: Any, *, independent_kv: bool) -> NSAConfig:
    """The paper's configuration with a module's heads."""
    D = int(attention.head_dim)
    return NSAConfig(
        num_heads=attention.q_proj.out_features // D,
        num_kv_heads=attention.k_proj.out_features // D,
        head_dim=D,
        independent_kv=independent_kv,
    )


def check_model(model: object) -> PreTrainedModel:
    """Refuse what is no transformers model of one decoder.

    Raises:
        ConfigError: names what to give instead.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"model: expected a transformers model, got {type(model).__name__}; convert before "
            "PEFT, torch.compile or a wrapper of distributed training"
        )
    config = model.config
    if config.get_text_config(decoder=True) is not config or config.is_encoder_decoder:
        raise ConfigError(
            f"model: expected a decoder of text, got {type(model).__name__}, which is made of "
            "several models: convert its language model"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError("model: expected one RoPE for all layers, got one for each type of layer")
    return model


@torch.no_grad()
def _is_plain(attention: Any) -> bool:
    """Whether the module gives what its parts say, for the last of three tokens.

    It is tried, since what else a module does (caps, clips, layers without RoPE, other rotations)
    has many names.
    """
    weight, D = attention.q_proj.weight, int(getattr(attention, "head_dim", 0))
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.get_default_dtype()
    here: dict[str, Any] = {"dtype": dtype, "device": weight.device}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, attention.q_proj.in_features, generator=generator, dtype=torch.float32)
    angle = torch.linspace(0.0, 3.0, 3 * (D // 2), dtype=torch.float32).view(1, 3, D // 2)
    cos, sin = (torch.cat([part, part], -1).to(**here) for part in (angle.cos(), angle.sin()))
    try:
        x = x.to(**here)
        logits, _ = _plain(attention, x, cos, sin)
        x = x * (2 / logits.float().std().clamp_min(1e-6)).sqrt().to(dtype)  # so that they matter
        _, expected = _plain(attention, x, cos, sin)
        place = torch.arange(3, device=weight.device)[None]
        with _eager(attention.config):
            found = attention(
                x, position_embeddings=(cos, sin), attention_mask=None, position_ids=place
            )
    except (AttributeError, TypeError, ValueError, RuntimeError):  # other arguments or shapes
        return False
    error = (found[0][:, -1].float() - expected.float()).norm()
    return bool(error <= max(1e-3, 16 * torch.finfo(dtype).eps) * expected.float().norm())


@contextmanager
def _eager(config: Any) -> Iterator[None]:
    """Attention as the model's own code writes it: others want lists, half types or a GPU."""
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def _plain(attention: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The last query's scores, and what it gives."""
    D = int(attention.head_dim)
    q, k, v = (getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, D)) for name in "qkv")
    norms = [getattr(attention, name, None) for name in NORMS]
    angles = Angles(*(part[0, :, None, : D // 2] for part in (cos, sin)))
    q, k = (
        apply_rope(heads if norm is None else norm(heads), 1.0, angles)
        for heads, norm in zip((q, k), norms, strict=True)
    )
    group = q.shape[2] // k.shape[2]
    k, v = (heads.repeat_interleave(group, 2) for heads in (k, v))
    scores = (q[:, -1:] * k).float().sum(-1, keepdim=True) * float(attention.scaling)
    out = (scores.softmax(1) * v.float()).sum(1).to(x.dtype)
    return scores, attention.o_proj(out.flatten(1))
