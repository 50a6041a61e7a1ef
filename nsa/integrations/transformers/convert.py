"""Native sparse attention into a model that exists, in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from transformers import PreTrainedModel

from nsa import registry
from nsa.config import NSAConfig
from nsa.core.validate import check_config
from nsa.errors import ConfigError, require_known
from nsa.integrations.transformers.attention import NSASelfAttention
from nsa.integrations.transformers.dense import (
    check_attention,
    check_model,
    default_config,
    find_attention,
    fitting,
)
from nsa.integrations.transformers.models import (
    MODEL_TYPE,
    model_class,
    replace_attention,
    write_config,
)
from nsa.integrations.transformers.starts import Start, check_start, dense_length

Trainable = Literal["new", "attention", "all"]


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` did; parameters by their names in the model."""

    model: PreTrainedModel
    """The model that was given."""
    config: NSAConfig
    """Of its layers, as in ``model.config.nsa_config``."""
    new: tuple[str, ...]
    """Parameters that the dense model has not: gates and φ."""
    copied: tuple[str, ...]
    """Copies of dense keys' and values' projections, one for each branch but the window."""
    trainable: tuple[str, ...]
    """Parameters that get gradients."""
    dense_length: int | None
    """Tokens of the longest input on which the model still is the dense one; None: of none."""


def convert(
    model: PreTrainedModel,
    config: NSAConfig | None = None,
    *,
    start: Start = "paper",
    trainable: Trainable = "new",
    backend: str | None = None,
) -> Conversion:
    """Replace every self-attention of a transformers model by NSA, in place.

    The projections, norms of q and k, and RoPE stay the model's own; gates and φ are new.

    Args:
        model: a decoder of text whose attention has ``q_proj``, ``k_proj``, ``v_proj`` and
            ``o_proj``, such as Llama, Qwen3 and Mistral.
        config: heads must be the model's; ``scale`` may be None, and ``rope_theta`` is not looked
            at. None: the defaults with the model's heads, and with keys and values that branches
            share for ``start="dense-equal"``.
        start: ``"paper"``: gates half open, φ the mean of a block. ``"dense-equal"``: on inputs of
            at most ``Conversion.dense_length`` tokens outputs and gradients are the dense model's.
        trainable: which parameters get gradients: ``"new"``, all of ``"attention"``, or ``"all"``.
        backend: as of :class:`nsa.NSAttention`.

    Raises:
        ConfigError: a model, configuration or start that does not fit; nothing has changed.
    """
    check_model(model)
    require_known("trainable", trainable, get_args(Trainable))
    if backend is not None:
        require_known("backend", backend, registry.names())
    if model.config.model_type == MODEL_TYPE:
        raise ConfigError("model: expected a dense model, got one that is converted already")
    attention = find_attention(model)
    for name, dense in attention.items():
        check_attention(name, dense)
    if config is None:
        first = next(iter(attention.values()))
        config = default_config(first, independent_kv=start != "dense-equal")
    check_config(config)
    check_start(start, config)
    fitted = {fitting(dense, config) for dense in attention.values()}
    if len(fitted) != 1:
        raise ConfigError("model: expected heads of one size in all layers, got several")
    config = fitted.pop()
    layers = replace_attention(model, config, start=start, backend=backend)
    write_config(model.config, config)
    kind: Any = type(model)
    model.__class__ = model_class(kind)
    new = _names(layers, NSASelfAttention.new_modules)
    copied = _names(layers, NSASelfAttention.copied_modules)
    _set_trainable(model, layers, new, trainable)
    return Conversion(
        model,
        config,
        new,
        copied,
        tuple(name for name, x in model.named_parameters() if x.requires_grad),
        dense_length(config) if start == "dense-equal" else None,
    )


def _names(layers: dict[str, NSASelfAttention], parts: Any) -> tuple[str, ...]:
    return tuple(
        f"{layer}.{part}.{name}"
        for layer, module in layers.items()
        for part, inner in parts(module).items()
        for name, _ in inner.named_parameters()
    )


def _set_trainable(
    model: nn.Module, layers: dict[str, NSASelfAttention], new: tuple[str, ...], which: Trainable
) -> None:
    chosen = set(new)
    for name, x in model.named_parameters():
        inside = any(name.startswith(f"{layer}.") for layer in layers)
        x.requires_grad_(which == "all" or name in chosen or (which == "attention" and inside))
