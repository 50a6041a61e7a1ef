"""Converted models as classes of their own, which transformers' Auto classes save and load.

The configuration and the model of any decoder get a subclass when they are first needed:
``LlamaForCausalLM`` becomes ``NSALlamaForCausalLM``, of ``NSALlamaConfig``. All have the model type
``"nsa"``: who has not imported this package gets an error by transformers, not a dense model whose
weights are missing.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, cast

import transformers
from huggingface_hub.dataclasses import strict
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.auto_factory import _get_model_class
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nsa.config import NSAConfig
from nsa.errors import CheckpointError, ConfigError, require_fields, show
from nsa.integrations.transformers.attention import NSASelfAttention
from nsa.integrations.transformers.batch import LAYER_TYPE, describe_batch
from nsa.integrations.transformers.dense import find_attention, fitting
from nsa.integrations.transformers.listed import listed_attention
from nsa.integrations.transformers.starts import Start, begin

MODEL_TYPE = "nsa"
ATTENTION = "nsa_layers"
"""Of a converted model, for transformers: it makes no masks for a name that it has none for."""
HEADS = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)
"""The Auto classes that find converted models."""


class NSAModelConfig(PreTrainedConfig):
    """What ``AutoConfig`` finds for ``"model_type": "nsa"``: it hands on to the class for the model
    that was converted."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of a converted model."""
        base = config_dict.get("base_model_type")
        if base is None and "nsa_config" not in config_dict:
            raise CheckpointError(
                "base_model_type: expected a converted model, got none; a checkpoint of "
                "flash-linear-attention goes through nsa.integrations.checkpoints.translate_folder"
            )
        if base not in CONFIG_MAPPING:
            raise CheckpointError(
                f"base_model_type: expected a model type of transformers, got {show(base)}; "
                f"this is transformers {transformers.__version__}"
            )
        dense = CONFIG_MAPPING[base]
        register_models(dense)
        return config_class(dense).from_dict(config_dict, **kwargs)


class _Converted:
    """What every converted model has."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model = cast(PreTrainedModel, self)
        # heads for classification are put on what AutoModel makes, which is one of these
        if not any(isinstance(module, NSASelfAttention) for module in model.modules()):
            replace_attention(model, read_config(config))

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        if attn_implementation not in (None, ATTENTION):
            raise ConfigError(
                f"attn_implementation: expected None for a converted model, got "
                f"{attn_implementation!r}; convert(backend=...) or NSA_BACKEND choose what runs"
            )
        return ATTENTION

    @classmethod
    def from_pretrained(
        cls,
        *args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As of transformers, but a checkpoint that lacks parts of the NSA layers is refused.

        Raises:
            CheckpointError: it was not saved from a model of this configuration.
            ConfigError: heads are to be split over devices, for which there is no plan.
        """
        distributed = kwargs.get("distributed_config")
        for name in ("tp_plan", "tp_size"):
            given = kwargs.get(name) or getattr(distributed, name, None)
            if given and given != 1:
                raise ConfigError(
                    f"{name}: expected None for a converted model, whose heads are not split over "
                    f"devices, got {show(given)}; fully_shard splits its parameters"
                )
        model, found = super().from_pretrained(  # type: ignore[misc]
            *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        layers = [n for n, part in model.named_modules() if isinstance(part, NSASelfAttention)]
        lacks = [
            name
            for name in found["missing_keys"]
            if name.startswith(tuple(f"{n}." for n in layers))
        ]
        if lacks:
            raise CheckpointError(
                f"expected the weights of a model of this nsa_config, got none for {min(lacks)} "
                f"and {len(lacks) - 1} others; load a dense model as it is, then convert() it"
            )
        if found["mismatched_keys"] and not ignore_mismatched_sizes:
            name, got, expected = min(found["mismatched_keys"])
            raise CheckpointError(
                f"{name}: expected {list(expected)}, got {list(got)}; nsa_config and sizes in "
                "config.json must be those of the weights"
            )
        return (model, found) if output_loading_info else model


@cache
def config_class(base: Any) -> Any:
    """The configuration class of converted models of a kind."""

    def __post_init__(self: Any, **kwargs: Any) -> None:
        super(made, self).__post_init__(**kwargs)
        self.layer_types = [LAYER_TYPE] * self.num_hidden_layers

    def validate_layer_type(self: Any) -> None:
        """Every layer is of one type, which transformers does not know."""

    def to_dict(self: Any) -> dict[str, Any]:
        """Without the types of layers: Trainer reads config.json as that of any model."""
        return {k: v for k, v in super(made, self).to_dict().items() if k != "layer_types"}

    made: Any = type(
        f"NSA{base.__name__}",
        (base,),
        {
            "__module__": __name__,
            "__annotations__": {"nsa_config": dict | None, "base_model_type": str},
            "__post_init__": __post_init__,
            "validate_layer_type": validate_layer_type,
            "to_dict": to_dict,
            "model_type": MODEL_TYPE,
            "base_model_tp_plan": None,  # heads of branches are not split over devices
            "nsa_config": None,
            "base_model_type": base.model_type,
        },
    )
    return strict(made)  # collects the validators anew


@cache
def model_class(base: Any) -> Any:
    """The class of converted models of a kind."""
    namespace = {
        "__module__": __name__,
        "config_class": config_class(base.config_class),
        "_can_compile_fullgraph": False,  # caches keep lengths on the host
    }
    return type(f"NSA{base.__name__}", (_Converted, base), namespace)


@cache
def register_models(base: Any) -> None:
    """Let the Auto classes find the converted models of a kind of configuration."""
    for head in HEADS:
        auto = getattr(transformers, head)
        if base in auto._model_mapping:
            dense = _get_model_class(base(), auto._model_mapping)
            auto.register(config_class(base), model_class(dense))


def __getattr__(name: str) -> Any:
    """``NSALlamaForCausalLM`` and its like, so that they can be imported, and pickled."""
    base = getattr(transformers, name.removeprefix("NSA"), None)
    if name.startswith("NSA") and isinstance(base, type):
        if issubclass(base, PreTrainedModel):
            return model_class(base)
        if issubclass(base, PreTrainedConfig):
            return config_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def read_config(config: Any) -> NSAConfig:
    """The ``nsa_config`` of a model's configuration.

    Raises:
        ConfigError: there is none, or it is not one.
    """
    given = getattr(config, "nsa_config", None)
    if not isinstance(given, dict):
        raise ConfigError(
            f"nsa_config: expected the fields of an NSAConfig in the model's configuration, got "
            f"{show(given)}; convert(model) writes them"
        )
    require_fields(NSAConfig, given, "fields of nsa_config")
    return NSAConfig(**given)


def write_config(config: Any, layer: NSAConfig) -> None:
    """Make a model's configuration, in place, that of the converted model."""
    base: Any = type(config)
    register_models(base)
    config.__class__ = config_class(base)
    config.base_model_type = base.model_type
    config.nsa_config = json.loads(layer.key)
    config.layer_types = [LAYER_TYPE] * config.num_hidden_layers
    config._attn_implementation = ATTENTION


def replace_attention(
    model: PreTrainedModel, config: NSAConfig, *, start: Start = "paper", backend: str | None = None
) -> dict[str, NSASelfAttention]:
    """Put an NSA layer into the place of each attention module; returns them by name."""
    layers = {}
    for name, dense in find_attention(model).items():
        layer = NSASelfAttention(dense, fitting(dense, config), backend=backend)
        begin(layer, start)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        layers[name] = layer
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.tp_plan = None  # what it was made with names projections, and the head with them
    model.base_model.register_forward_pre_hook(describe_batch, with_kwargs=True)
    return layers


def register() -> None:
    """Let transformers know of converted models, and of ``attn_implementation="nsa"``."""
    AutoConfig.register(MODEL_TYPE, NSAModelConfig, exist_ok=True)
    AttentionInterface.register(ATTENTION, listed_attention)
    AttentionInterface.register("nsa", listed_attention)
    AttentionMaskInterface.register("nsa", sdpa_mask)
