"""Published layouts of NSA checkpoints, and their translation to this library's.

A row of :data:`LAYOUTS` says what a code base calls its tensors and what its configuration means.
All of them are Llama-style decoders whose layers share keys and values between branches, take φ as
the mean of a block, and have one size for all blocks. What cannot be represented exactly is
refused. docs/transformers.md has the table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.errors import CheckpointError, MissingDependency, is_int, require_known, show


class Layout(NamedTuple):
    """One published layout."""

    source: str
    """The code that writes it."""
    model_type: str
    """Of its config.json."""
    heads: str
    """The key of config.json for the number of query heads."""
    kv_heads: str
    """The key for the number of key/value heads; null means as many as query heads."""
    num_initial: int
    """First blocks that its selection always takes."""
    num_local: int
    """Blocks up to the query's own that its selection always takes."""
    norm_eps: str
    """The key for what its norms add to the mean square."""
    renamed: tuple[tuple[str, str], ...]
    """Parts of names: this library's under transformers, then the layout's; the first that fits."""
    expected: Mapping[str, Any]
    """Keys that need one value, which is what a missing one means."""
    head_dim: str | None = None
    """The key for the head size; None: its code reads none, and the weights tell."""


_FLA = Layout(
    source="fla-org/flash-linear-attention, fla/models/nsa",
    model_type="nsa",
    heads="num_heads",
    kv_heads="num_kv_heads",
    num_initial=1,
    num_local=2,
    norm_eps="norm_eps",
    renamed=(
        ("model.embed_tokens.", "model.embeddings."),
        (".input_layernorm.", ".attn_norm."),
        (".post_attention_layernorm.", ".mlp_norm."),
        (".self_attn.gate_proj.", ".attn.g_proj."),
        (".self_attn.", ".attn."),
    ),
    expected={"qkv_bias": False, "hidden_act": "swish"},
)

LAYOUTS: Mapping[str, Layout] = {
    "fla": _FLA,
    "fla-own-block": _FLA._replace(num_initial=0, num_local=1),
    "llama-nsa": Layout(
        source="zhenyi4/ssa, configs/nsa-1b-init, on fla-org/native-sparse-attention",
        model_type="llama-nsa",
        heads="num_attention_heads",
        kv_heads="num_key_value_heads",
        num_initial=0,
        num_local=1,
        norm_eps="rms_norm_eps",
        renamed=((".self_attn.gate_proj.", ".self_attn.g_proj."),),
        expected={
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_act": "silu",
            "rope_scaling": None,
        },
        head_dim="head_dim",
    ),
}
"""By the name that :func:`translate` takes."""

REFUSED: Mapping[str, str] = {
    "lucidrains": "its compressed keys are not rotated while the selected ones are, learned memory "
    "keys stand before them, and φ has a position embedding per head and a ReLU",
    "nsa-117m": "its gate is an MLP",
}
"""Known layouts that no :class:`nsa.NSAConfig` describes, and why."""

_LAYER = {
    "input_layernorm.weight": ("width",),
    "self_attn.q_proj.weight": ("queries", "width"),
    "self_attn.k_proj.weight": ("keys", "width"),
    "self_attn.v_proj.weight": ("keys", "width"),
    "self_attn.gate_proj.weight": ("gates", "width"),
    "self_attn.o_proj.weight": ("width", "queries"),
    "post_attention_layernorm.weight": ("width",),
    "mlp.gate_proj.weight": ("hidden", "width"),
    "mlp.up_proj.weight": ("hidden", "width"),
    "mlp.down_proj.weight": ("width", "hidden"),
}
_MODEL = {"model.embed_tokens.weight": ("vocabulary", "width"), "model.norm.weight": ("width",)}
_HEAD = {"lm_head.weight": ("vocabulary", "width")}
_ATTENTION = "self_attn."


class Translated(NamedTuple):
    """A checkpoint in this library's layout."""

    config: NSAConfig
    """Of every layer."""
    tensors: dict[str, Tensor]
    """By the names of a converted Llama of :mod:`nsa.integrations.transformers`."""
    model_config: dict[str, Any]
    """The config.json that goes with them."""

    def layer(self, index: int) -> dict[str, Tensor]:
        """What ``load_state_dict`` of an :class:`nsa.NSAttention` takes: one layer's tensors."""
        layers = self.model_config["num_hidden_layers"]
        if not (is_int(index) and 0 <= index < layers):
            raise CheckpointError(f"index: expected a layer in 0 … {layers - 1}, got {show(index)}")
        prefix = f"model.layers.{index}.{_ATTENTION}"
        return {k.removeprefix(prefix): x for k, x in self.tensors.items() if k.startswith(prefix)}


def translate(
    layout: str,
    model_config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    exact: bool = True,
) -> Translated:
    """Translate a checkpoint of a published layout; tensors are handed on, not copied.

    Args:
        layout: a name of :data:`LAYOUTS`. It is not guessed: files do not say which blocks the code
            that trained them always selects.
        model_config: its config.json.
        tensors: all of its weights, on any device, the meta device included.
        exact: refuse a model whose own selection does not always list the best blocks, as that of
            these layouts does not where ``block_size < 2 * num_selected``; False: list the best.

    Raises:
        ConfigError: an unknown layout, or sizes that are no :class:`nsa.NSAConfig`.
        CheckpointError: what the layout, or this library, does not have, by its key or tensor.
    """
    if isinstance(layout, str) and layout in REFUSED:
        raise CheckpointError(
            f"layout: expected one that an NSAConfig describes, got {layout!r}: {REFUSED[layout]}; "
            "train such a model with its own code"
        )
    require_known("layout", layout, tuple(LAYOUTS))
    row = LAYOUTS[layout]
    _check_config(layout, row, model_config)
    layers = _int(model_config, "num_hidden_layers")
    tied = model_config.get("tie_word_embeddings", "lm_head.weight" not in tensors)
    shapes = {
        **_MODEL,
        **({} if tied else _HEAD),
        **{f"model.layers.{i}.{k}": shape for i in range(layers) for k, shape in _LAYER.items()},
    }
    found = dict(tensors)
    head = found.pop("lm_head.weight", None) if tied else None
    named = _take(layout, row, shapes, found)
    if head is not None:
        _check_tied(head, named["model.embed_tokens.weight"])
    config, sizes = _sizes(row, model_config, named)
    if exact:
        _check_selection(config)
    for ours, x in named.items():
        expected = [sizes[size] for size in shapes[ours]]
        if list(x.shape) != expected:
            raise CheckpointError(
                f"{_theirs(row, ours)}: expected {expected}, got {list(x.shape)}; config.json must "
                "be that of the weights"
            )
    for i in range(layers):
        gate = f"model.layers.{i}.{_ATTENTION}gate_proj"
        named[f"{gate}.bias"] = named[f"{gate}.weight"].new_zeros(sizes["gates"])
    return Translated(config, named, _llama(row, model_config, config, sizes, tied=tied))


def translate_folder(
    layout: str, source: str | Path, target: str | Path, *, exact: bool = True
) -> Translated:
    """Translate a folder of config.json and ``*.safetensors`` into one that
    ``AutoModelForCausalLM`` loads once :mod:`nsa.integrations.transformers` is imported.

    Raises:
        CheckpointError: as of :func:`translate`; files that are not there; a target with files.
        MissingDependency: there is no safetensors.
    """
    try:
        from safetensors.torch import load_file, save_file
    except ImportError as error:
        raise MissingDependency(
            "expected safetensors for checkpoints, got none; pip install 'nsa-torch[hf]'"
        ) from error
    source, target = Path(source), Path(target)
    files = sorted(source.glob("*.safetensors"))
    if not files or not (source / "config.json").is_file():
        raise CheckpointError(f"source: expected config.json and *.safetensors in {source}")
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"target: expected a new or empty folder, got files in {target}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(load_file(file))
    try:
        given = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"config.json: expected JSON, got {error}") from error
    made = translate(layout, given, tensors, exact=exact)
    target.mkdir(parents=True, exist_ok=True)
    whole = {name: x.contiguous() for name, x in made.tensors.items()}
    save_file(whole, target / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(made.model_config, indent=2) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")
    return made


def _check_config(layout: str, row: Layout, given: Mapping[str, Any]) -> None:
    if not isinstance(given, Mapping):
        raise CheckpointError(f"config.json: expected a table of values, got {show(given)}")
    if "nsa_config" in given:
        raise CheckpointError(
            "config.json: expected a published layout, got this library's own; load it with "
            "AutoModelForCausalLM.from_pretrained"
        )
    for key, value in {"model_type": row.model_type, **row.expected}.items():
        if given.get(key, value) != value:
            raise CheckpointError(
                f"{key}: expected {value!r} in config.json of layout {layout!r}, got "
                f"{show(given[key])}, which the layers here cannot represent"
            )
    if not (is_int(given.get("window_size")) and given["window_size"] >= 1):
        raise CheckpointError(
            f"window_size: expected an int >= 1, got {show(given.get('window_size'))}; a model "
            "without the window branch is not one of NSA's three branches"
        )


def _check_selection(config: NSAConfig) -> None:
    """Kernels of these layouts rank a block's length of blocks at a time and keep half of them."""
    block, listed = config.select_block, config.num_selected
    if block < 2 * listed:
        raise CheckpointError(
            f"block_size: expected at least 2 * {listed} selected blocks, got {block}: past "
            f"{block * block} tokens the selection that trained this model does not list the best "
            "blocks; pass exact=False for layers that do"
        )


def _int(given: Mapping[str, Any], key: str) -> int:
    value = given.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{key}: expected an int >= 1 in config.json, got {show(value)}")
    return value


def _number(given: Mapping[str, Any], key: str) -> float:
    value = given.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"{key}: expected a number in config.json, got {show(value)}")
    return float(value)


def _theirs(row: Layout, ours: str) -> str:
    """A tensor's name in the layout."""
    for part, other in row.renamed:
        if part in ours:
            return ours.replace(part, other)
    return ours


def _take(
    layout: str, row: Layout, shapes: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors by our names, each once and none left."""
    theirs = {_theirs(row, ours): ours for ours in shapes}
    fix = f"name another layout (known: {', '.join(LAYOUTS)}), or mend config.json"
    missing, surplus = theirs.keys() - tensors.keys(), tensors.keys() - theirs.keys()
    for names, got in ((missing, "none called"), (surplus, "one more,")):
        if names:
            others = f" and {len(names) - 1} others like it" if len(names) > 1 else ""
            raise CheckpointError(
                f"expected the {len(theirs)} tensors of layout {layout!r}, got {got} "
                f"{min(names)}{others}; {fix}"
            )
    return {ours: tensors[name] for name, ours in theirs.items()}


def _check_tied(head: Tensor, embedding: Tensor) -> None:
    """Some writers store the matrix that is head and embedding twice."""
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    if not same or not (head.is_meta or torch.equal(head, embedding)):
        raise CheckpointError(
            "lm_head.weight: expected the embedding, as tie_word_embeddings says, got another "
            "matrix; set tie_word_embeddings to false in config.json"
        )


def _rows(x: Tensor) -> int:
    return x.shape[0] if x.ndim else 0


def _sizes(
    row: Layout, given: Mapping[str, Any], named: Mapping[str, Tensor]
) -> tuple[NSAConfig, dict[str, int]]:
    heads, block = _int(given, row.heads), _int(given, "block_size")
    kv_heads = heads if given.get(row.kv_heads) is None else _int(given, row.kv_heads)
    width, first = _int(given, "hidden_size"), "model.layers.0."
    listed = 1 << (_int(given, "block_counts") - 1).bit_length()  # lists are powers of two wide
    if row.head_dim is None:
        head_dim = _rows(named[f"{first}{_ATTENTION}q_proj.weight"]) // heads
    elif given.get(row.head_dim) is None:
        head_dim = width // heads
    else:
        head_dim = _int(given, row.head_dim)
    config = NSAConfig(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        compress_block=block,
        compress_stride=block,
        select_block=block,
        num_selected=listed,
        num_initial=row.num_initial,
        num_local=row.num_local,
        window=_int(given, "window_size"),
        compression="mean",
        gate="sigmoid",
        independent_kv=False,
        rope_theta=_number(given, "rope_theta"),
    )
    hidden = _rows(named[f"{first}mlp.up_proj.weight"])
    if given.get("intermediate_size") is not None:  # null: by a formula of the code's
        hidden = _int(given, "intermediate_size")
    return config, {
        "width": width,
        "queries": heads * head_dim,
        "keys": kv_heads * head_dim,
        "gates": heads * 3,
        "hidden": hidden,
        "vocabulary": _int(given, "vocab_size"),
    }


def _llama(
    row: Layout, given: Mapping[str, Any], config: NSAConfig, sizes: dict[str, int], *, tied: bool
) -> dict[str, Any]:
    """The config.json of the converted model; its RoPE is the model's, not its layers'."""
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "torch_dtype")
    return {
        **{key: given[key] for key in kept if key in given},
        "architectures": ["NSALlamaForCausalLM"],
        "model_type": "nsa",
        "base_model_type": "llama",
        "nsa_config": {**json.loads(config.key), "rope_theta": None},
        "hidden_size": sizes["width"],
        "intermediate_size": sizes["hidden"],
        "num_hidden_layers": _int(given, "num_hidden_layers"),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": sizes["vocabulary"],
        "max_position_embeddings": _int(given, "max_position_embeddings"),
        "rms_norm_eps": _number(given, row.norm_eps),
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
