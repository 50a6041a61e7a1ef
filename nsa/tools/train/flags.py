"""The flags of ``train`` and the configuration that they resolve to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, get_args

from nsa.config import Compression, Gate, NSAConfig
from nsa.errors import ConfigError
from nsa.models import ModelConfig
from nsa.models.config import PRESETS, Attention
from nsa.registry import names
from nsa.tools.common.cli import Parser, choose_device, integer, number
from nsa.training.config import COMPILE_MODES, PRECISIONS, RunConfig, TrainConfig, flag
from nsa.training.config import PRESETS as TRAIN_PRESETS
from nsa.training.data import STDLIB

_EXAMPLES = """\
examples:
  python -m nsa.tools.train --preset tiny --out runs/demo
  python -m nsa.tools.train --preset small --data books/ --seq-len 4096 --out runs/books
  python -m nsa.tools.train --out runs/books --resume
"""

_MODEL_FLAGS = ("dim", "num_layers", "hidden_dim")
_NSA_FLAGS = (
    "num_heads", "num_kv_heads", "head_dim", "window", "num_selected", "num_initial", "num_local",
    "select_block", "compress_block", "compress_stride",
)  # fmt: skip
_TRAIN_INTEGERS = (
    "seq_len", "batch_size", "accumulate", "steps", "warmup", "seed", "eval_every", "eval_windows",
    "save_every", "log_every", "keep",
)  # fmt: skip
_TRAIN_NUMBERS = ("lr", "min_lr", "weight_decay", "beta1", "beta2", "grad_clip")
_HELP = {
    "seq_len": "length of a sequence",
    "batch_size": "sequences in one forward pass",
    "accumulate": "forward passes in one step",
    "steps": "steps of the whole run",
    "warmup": "steps of linear warm-up",
    "seed": "of the initial weights and the order of the data",
    "eval_every": "steps between validations",
    "eval_windows": "sequences in one validation",
    "save_every": "steps between checkpoints",
    "log_every": "steps between lines of metrics",
    "keep": "checkpoints kept",
    "lr": "learning rate after the warm-up",
    "min_lr": "what the cosine ends at, as a share of --lr",
    "weight_decay": "of matrices (AdamW)",
    "beta1": "decay of the mean gradient (AdamW)",
    "beta2": "decay of the mean squared gradient (AdamW)",
    "grad_clip": "largest norm of the gradient",
    "dim": "width of the residual stream",
    "num_layers": "blocks",
    "hidden_dim": "width of the SwiGLU",
    "num_heads": "query heads",
    "num_kv_heads": "key/value heads",
    "head_dim": "size of a head",
    "window": "tokens of the sliding window",
    "num_selected": "selection blocks each query reads",
    "num_initial": "selection blocks at the start that are always read",
    "num_local": "selection blocks up to the query's own that are always read",
    "select_block": "tokens in a selection block",
    "compress_block": "tokens in a compressed block",
    "compress_stride": "tokens between compressed blocks",
}


def train_parser() -> Parser:
    """Every flag of ``train``; one that is not given is None, so that presets can fill it."""
    parser = Parser(
        prog="python -m nsa.tools.train",
        description="Train a byte-level language model with Native Sparse Attention.",
    )
    parser.epilog = _EXAMPLES
    add = parser.add_argument
    add("--out", metavar="DIR", help="the run's folder (default: runs/train)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--preset", choices=PRESETS, help="model and training defaults (default: tiny)")
    add(
        "--data",
        metavar="PATH",
        help=f"a file or folder of text (default: {STDLIB}, Python's own standard library)",
    )
    add("--attention", choices=get_args(Attention), help="nsa, or dense for comparison")
    add(
        "--backend",
        choices=names(),
        help="what computes NSA (default: the settings decide)",
    )
    add("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--precision", choices=PRECISIONS, help="bf16 autocast, or none (default: bf16 on CUDA)")
    add(
        "--activation-checkpointing",
        action="store_const",
        const=True,
        help="recompute activations in the backward pass: less memory, more time",
    )
    add(
        "--compile",
        choices=COMPILE_MODES,
        help="torch.compile each block, or model, loss and all, as one graph (default: none)",
    )
    add(
        "--compile-cache",
        metavar="FILE",
        help="with --compile: start from the compiled code in FILE, if there, and keep it there; "
        "torch runs what FILE holds, so use only your own",
    )
    training = parser.add_argument_group("training (lengths in bytes, counts in steps)")
    for name in _TRAIN_INTEGERS:
        training.add_argument(flag(name), type=integer, metavar="N", help=_HELP[name])
    for name in _TRAIN_NUMBERS:
        training.add_argument(flag(name), type=number, metavar="X", help=_HELP[name])
    model = parser.add_argument_group("model")
    for name in (*_MODEL_FLAGS, *_NSA_FLAGS):
        model.add_argument(flag(name), type=integer, metavar="N", help=_HELP[name])
    model.add_argument(
        "--compression", choices=get_args(Compression), help="how blocks are compressed"
    )
    model.add_argument("--gate", choices=get_args(Gate), help="activation of the branch gates")
    return parser


def new_config(given: Mapping[str, Any]) -> RunConfig:
    """The preset with the flags that were given."""
    preset = given.get("preset", "tiny")
    nsa = NSAConfig.preset(preset, **_pick(given, NSAConfig))
    model = ModelConfig.preset(preset, nsa=nsa, **_pick(given, ModelConfig))
    device = choose_device(given.get("device", "auto"))
    values = {
        **TRAIN_PRESETS[preset],
        "data": STDLIB,
        "precision": "bf16" if device.type == "cuda" else "fp32",
        "backend": None,
        **_pick(given, TrainConfig),
        "device": str(device),
    }
    values["data"] = _absolute(values["data"])
    return _checked(RunConfig(model=model, train=TrainConfig(**values)))


def continued_config(stored: RunConfig, given: Mapping[str, Any]) -> RunConfig:
    """The configuration to go on with: the stored one, unless flags say something else."""
    if "preset" in given:
        return new_config(given)
    nsa = replace(stored.model.nsa, **_pick(given, NSAConfig))
    model = stored.model.replace(nsa=nsa, **_pick(given, ModelConfig))
    values = _pick(given, TrainConfig)
    values["device"] = str(choose_device(given.get("device", stored.train.device)))
    if "data" in values:
        values["data"] = _absolute(values["data"])
    return _checked(RunConfig(model=model, train=replace(stored.train, **values)))


def _pick(given: Mapping[str, Any], cls: type) -> dict[str, Any]:
    names = {field.name for field in fields(cls)}
    return {name: value for name, value in given.items() if name in names}


def _absolute(data: str) -> str:
    return data if data in ("", STDLIB) else os.path.abspath(data)


def _checked(config: RunConfig) -> RunConfig:
    """Rules between the parts."""
    if config.model.attention == "dense" and config.train.backend is not None:
        raise ConfigError(
            f"--backend: expected none with --attention dense, got {config.train.backend!r}"
        )
    return config
