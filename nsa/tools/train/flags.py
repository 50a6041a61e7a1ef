"""The flags of ``train`` and the configuration that they resolve to."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from nsa.config import NSAConfig
from nsa.distributed.mesh import MeshConfig
from nsa.models import ModelConfig
from nsa.models.config import PRESETS
from nsa.tools.common.cli import Parser, add_backend_and_device, add_fields, choose_device
from nsa.training.config import PRESETS as TRAIN_PRESETS
from nsa.training.config import RunConfig, TrainConfig
from nsa.training.data import STDLIB

_EXAMPLES = """\
examples:
  python -m nsa.tools.train --preset tiny --out runs/demo
  python -m nsa.tools.train --preset small --data books/ --seq-len 4096 --out runs/books
  python -m nsa.tools.train --out runs/books --resume
  torchrun --nproc-per-node 4 -m nsa.tools.train --dp 2 --tp 2 --out runs/books
"""


def train_parser() -> Parser:
    """Every flag of ``train``; one that is not given has no value, so that presets can fill it."""
    parser = Parser(
        prog="python -m nsa.tools.train",
        description="Train a byte-level language model with Native Sparse Attention.",
        epilog=_EXAMPLES,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--out", metavar="DIR", help="the run's folder (default: runs/train)")
    add("--resume", action="store_true", help="resume the run in --out")
    add("--preset", choices=PRESETS, help="model and training defaults (default: tiny)")
    add(
        "--compile-cache",
        metavar="FILE",
        help="with --compile: start from the compiled code in FILE, if there, and keep it there; "
        "torch runs what FILE holds, so use only your own",
    )
    add_backend_and_device(parser)
    training = parser.add_argument_group("training (lengths in bytes, counts in steps)")
    add_fields(
        training,
        TrainConfig,
        leave_out=("backend", "device"),
        show_defaults=True,
        data={"metavar": "PATH"},
    )
    mesh = parser.add_argument_group("mesh (under torchrun; changes speed and memory alone)")
    add_fields(mesh, MeshConfig, show_defaults=True)
    model = parser.add_argument_group("model")
    add_fields(model, ModelConfig, leave_out=("nsa", "vocab_size", "tied_embeddings", "norm_eps"))
    hidden = ("value_dim", "scale", "independent_kv", "rope_theta")
    add_fields(model, NSAConfig, leave_out=hidden)
    return parser


def run_config(given: Mapping[str, Any], stored: RunConfig | None = None) -> RunConfig:
    """Resolve the flags that were given, over a preset or over the configuration of a stored run.

    Raises:
        ConfigError: a value is out of range.
    """
    if stored is None or "preset" in given:
        preset = given.get("preset", "tiny")
        model = ModelConfig.preset(preset)
        train = {"data": STDLIB, "device": "auto", **TRAIN_PRESETS[preset]}
        if stored is not None:  # of the data, and in no preset
            train["split"] = stored.train.split
    else:
        model, train = stored.model, asdict(stored.train)
    nsa = replace(model.nsa, **_pick(given, NSAConfig))
    model = model.replace(nsa=nsa, **_pick(given, ModelConfig))
    train |= _pick(given, TrainConfig)
    device = choose_device(train["device"])
    train["device"] = str(device)
    train.setdefault("precision", "bf16" if device.type == "cuda" else "fp32")
    if train["data"] not in ("", STDLIB):
        train["data"] = os.path.abspath(train["data"])
    return RunConfig(model=model, train=TrainConfig(**train))


def mesh_config(given: Mapping[str, Any]) -> MeshConfig:
    """The sizes of the mesh.

    Raises:
        ConfigError: a value is out of range.
    """
    return MeshConfig(**_pick(given, MeshConfig))


def _pick(given: Mapping[str, Any], config: type) -> dict[str, Any]:
    names = {field.name for field in fields(config)}
    return {name: value for name, value in given.items() if name in names}
