"""Native sparse attention in torchtitan: an override of its grouped-query attention.

    --override.imports nsa.integrations.torchtitan.sparse_attention

B batch, T tokens, C size of the model, H query heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nsa.attention import nsa_attention
from nsa.compression import PHI, compress_both
from nsa.config import KV, NSAConfig
from nsa.core.inputs import BRANCHES
from nsa.errors import ConfigError, MissingDependency, ShapeError, require_fields, show
from nsa.gates import GATES

try:
    from torchtitan.config import derive, override
    from torchtitan.models.common.attention import GQAttention, VarlenAttention, VarlenMetadata
except ModuleNotFoundError as error:
    raise MissingDependency(
        f"torchtitan: expected 0.3 or later, got no {error.name}; pip install torchtitan"
    ) from error


class SparseAttention(GQAttention):
    """torchtitan's attention with its scores and values replaced: projections, norms of q and k,
    and RoPE stay, as do their names in checkpoints. The branches share keys and values.

    ``gate_proj``, ``compress_k`` and ``compress_v`` are new.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        """As of torchtitan's attention."""

        nsa: NSAConfig
        """Of the same heads, with ``independent_kv=False`` and without ``rope_theta``."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config.nsa
        phi = PHI[self.config.compression]
        H, D = self.config.num_heads, self.config.head_dim
        self.gate_proj = nn.Linear(config.dim, H * len(BRANCHES))
        self.compress_k, self.compress_v = phi(self.config, D), phi(self.config, D)

    def reset_parameters(self) -> None:
        """Draw what is new; torchtitan calls it, and draws the rest itself."""
        self.gate_proj.reset_parameters()
        nn.init.zeros_(self.gate_proj.bias)
        for phi in (self.compress_k, self.compress_v):
            phi.reset_parameters()

    def parallelize(self, parallel_dims: Any) -> None:
        """Refuse to split heads: those of a group read the same blocks.

        Raises:
            ConfigError: tensor or context parallelism is requested.
        """
        for name in ("tp", "cp"):
            if getattr(parallel_dims, f"{name}_enabled"):
                raise ConfigError(
                    f"parallelism: expected none inside a layer of NSA, got {name}; use FSDP "
                    "or pipeline parallelism"
                )
        super().parallelize(parallel_dims)

    def forward(
        self, x_BTC: Tensor, attention_masks: Any = None, positions: Tensor | None = None
    ) -> Tensor:
        """What a block calls; ``attention_masks`` are the documents' offsets, or None.

        Raises:
            ShapeError: other masks.
        """
        B, T = x_BTC.shape[:2]
        q, k, v = self.qkv_linear(x_BTC)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rope(q, k, positions)
        gates = self.gate_proj(x_BTC).unflatten(-1, (-1, len(BRANCHES)))
        gates = GATES[self.config.gate].activate(gates)
        packed: dict[str, Any] = {}
        if attention_masks is not None:
            if not isinstance(attention_masks, VarlenMetadata):
                raise ShapeError(
                    "attention_masks: expected offsets of documents, got "
                    f"{type(attention_masks).__name__}; take a model of attn_backend='varlen'"
                )
            packed = {
                "cu_seqlens": attention_masks.cu_seq_q.int(),
                "max_seqlen": attention_masks.max_q,
            }
            q, k, v, gates = (part.flatten(0, 1)[None] for part in (q, k, v, gates))
        phi_k, phi_v = self.compress_k, self.compress_v
        compressed = KV(*compress_both(phi_k, phi_v, k, v, packed.get("cu_seqlens")))
        shared = KV(k, v)
        out = nsa_attention(q, compressed, shared, shared, gates, self.config, **packed)
        return self.wo(out.reshape(B, T, -1))


@override(target=GQAttention.Config, exact=True, description="Native sparse attention")
def sparse_attention(config: GQAttention.Config, **fields: Any) -> SparseAttention.Config:
    """Replace a model's attention.

    Args:
        fields: of :class:`nsa.NSAConfig`, but its heads, which are the model's:
            ``override.imports = [("nsa.integrations.torchtitan.sparse_attention",
            {"window": 256})]``.

    Raises:
        ConfigError: a field that is unknown, or a value that breaks a rule.
    """
    given = {
        "num_heads": config.n_heads,
        "num_kv_heads": config.n_kv_heads or config.n_heads,
        "head_dim": config.head_dim or config.dim // config.n_heads,
        "independent_kv": False,
        "rope_theta": None,
    }
    require_fields(NSAConfig, fields)
    for name in given.keys() & fields.keys():
        raise ConfigError(f"{name}: expected none, the model has its own, got {show(fields[name])}")
    return derive(
        config,
        SparseAttention.Config,
        nsa=NSAConfig(**given, **fields),
        # not called: by its type torchtitan knows that offsets of documents are wanted
        inner_attention=VarlenAttention.Config(),
    )
