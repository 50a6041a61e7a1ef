"""Small random transformers models, and the library's own model of the same weights.

B sequences, T tokens, C vocabulary.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from nsa import NSACache, NSAConfig, NSAttention
from nsa.integrations.transformers import NSASelfAttention
from nsa.models.generation import generate
from nsa.models.sampling import GenerationConfig

VOCABULARY, DIM = 61, 32
CONFIG = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    compress_block=8,
    compress_stride=4,
    select_block=8,
    num_selected=3,
    num_local=1,
    window=16,
)
SHARED = replace(CONFIG, independent_kv=False)
KINDS = ("Llama", "Qwen3", "Mistral")


def dense(kind: str = "Llama", seed: int = 0, **options: Any) -> Any:
    """A model of one of KINDS, whose logits are far enough apart for a greedy choice."""
    import transformers

    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": DIM,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": CONFIG.num_heads,
        "num_key_value_heads": CONFIG.num_kv_heads,
        "head_dim": CONFIG.head_dim,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        **options,
    }
    if kind == "Mistral":
        options.setdefault("sliding_window", None)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith("norm.weight"):  # ones would hide a norm that is left out
                x.uniform_(0.5, 1.5)
    return model


def tokens(B: int, T: int, seed: int = 0) -> Tensor:
    """Random ones, of which none is padding."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (B, T), generator=made)


def new_parts(model: nn.Module, seed: int = 1) -> None:
    """Draw what conversion added anew, so that every part of every layer counts."""
    torch.manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, NSASelfAttention):
            for part in (*layer.new_modules().values(), *layer.copied_modules().values()):
                for x in part.parameters():
                    nn.init.normal_(x, std=0.3)


class Own(nn.Module):
    """A converted model as the library generates with one: NSAttention with a RoPE of its own, one
    cache for all layers, no part of transformers' attention, masks or caches."""

    resolution = None

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, SimpleNamespace(vocab_size=VOCABULARY)
        theta = model.config.rope_parameters["rope_theta"]
        self.layers = nn.ModuleList()
        for block in model.model.layers:
            theirs = block.self_attn
            layer = NSAttention(DIM, replace(theirs.config, rope_theta=theta), backend="sdpa")
            for name in ("q_proj", "k_proj", "v_proj", "o_proj", *theirs.new_modules()):
                setattr(layer, name, getattr(theirs, name))
            if theirs.q_norm is not None:
                layer.q_proj = HeadNorm(layer.q_proj, theirs.q_norm)
                keys = layer.k_proj
                layer.k_proj = (
                    nn.ModuleDict({b: HeadNorm(keys[b], theirs.k_norm) for b in keys})
                    if isinstance(keys, nn.ModuleDict)
                    else HeadNorm(keys, theirs.k_norm)
                )
            self.layers.append(layer)

    def new_cache(self, batch_size: int, max_length: int) -> NSACache:
        return NSACache(
            self.layers[0].config,
            num_layers=len(self.layers),
            batch_size=batch_size,
            max_length=max_length,
        )

    def forward(
        self,
        tokens: Tensor,
        *,
        cache: NSACache | None = None,
        counts: list[int] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        inner = self.model.model
        x = inner.embed_tokens(tokens)
        for i, (block, layer) in enumerate(zip(inner.layers, self.layers, strict=True)):
            options = {} if cache is None else {"cache": cache.layers[i], "counts": counts}
            x = x + layer(block.input_layernorm(x), **options)
            x = x + block.mlp(block.post_attention_layernorm(x))
        if last_only:
            last = torch.tensor(counts or [x.shape[1]] * len(x)) - 1
            x = x[torch.arange(len(x)), last.clamp_min(0)][:, None]
        return self.model.lm_head(inner.norm(x))

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """Greedy continuations."""
        config = GenerationConfig(max_new_tokens=new, temperature=0)
        made: list[list[int]] = [[] for _ in prompts]
        for row, token in generate(self, prompts, config, context=256):
            made[row].append(token)
        return made


class HeadNorm(nn.Module):
    """A projection, and a norm of every head of it."""

    def __init__(self, projection: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.projection, self.norm = projection, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.projection(x).unflatten(-1, (-1, CONFIG.head_dim))).flatten(-2)
