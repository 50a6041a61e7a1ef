"""Attention modules of a transformers model: found, and held to what a converted layer computes.

D head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

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
    """Refuse a module that computes more than causal softmax attention over rotated heads.

    Raises:
        ConfigError: names the part that a converted layer would lose.
    """
    known = (*PROJECTIONS, *NORMS)
    others = [part for part, _ in attention.named_children() if part not in known]
    others += [part for part, _ in attention.named_parameters(recurse=False)]
    dropout = getattr(attention, "attention_dropout", 0.0)
    softcap = getattr(attention, "attn_logit_softcapping", None)
    for good, expected, got in (
        (not others, f"no parts but {', '.join(known)}", ", ".join(others)),
        (getattr(attention, "is_causal", True), "causal attention", "another"),
        (not dropout, "attention_dropout=0 (set it in model.config and model)", dropout),
        (softcap is None, "logits that are not capped", f"attn_logit_softcapping={softcap}"),
        (_norms_heads(attention), "norms of one head", "norms of all heads at once"),
        (_rotates_halves(attention), "RoPE that rotates halves, as Llama's", "another"),
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


def _norms_heads(attention: Any) -> bool:
    norms = [getattr(attention, name, None) for name in NORMS]
    weights = [getattr(norm, "weight", None) for norm in norms]
    return all(weight is None or weight.numel() == attention.head_dim for weight in weights)


def _rotates_halves(attention: Any) -> bool:
    """Whether the module's file rotates as this library does, by trying."""
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        return False
    D = int(attention.head_dim)
    x = torch.linspace(-1.0, 1.0, 3 * D, dtype=torch.float32, device="cpu").view(
        1, 1, 3, D
    )  # one head
    angle = torch.linspace(0.0, 3.0, 3 * (D // 2), dtype=torch.float32, device="cpu").view(
        1, 3, D // 2
    )
    cos, sin = (torch.cat([part, part], -1) for part in (angle.cos(), angle.sin()))
    try:
        found, _ = cast(Callable[..., tuple[Tensor, Tensor]], rotate)(x, x, cos, sin)
    except (TypeError, ValueError, RuntimeError):  # one of other arguments or shapes
        return False
    angles = Angles(angle[0].cos()[:, None], angle[0].sin()[:, None])
    expected = apply_rope(x.transpose(1, 2), 1.0, angles).transpose(1, 2)
    return found.shape == expected.shape and torch.allclose(found, expected, atol=1e-6)
