"""The layer that stands in the place of a transformers attention module.

B batch, T tokens, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from nsa.cache import LayerCache
from nsa.config import NSAConfig
from nsa.core.inputs import BRANCHES
from nsa.core.rope import Angles
from nsa.errors import CacheError, ShapeError
from nsa.integrations.transformers.batch import Aligned, Packed
from nsa.integrations.transformers.cache import NewTokens, NSACacheLayer
from nsa.module import NSAttention


class NSASelfAttention(NSAttention):
    """NSA with the projections, the norms of q and k, and the RoPE of a transformers model.

    Args:
        dense: the attention module that it replaces; its projections and norms are used as they
            are. With ``independent_kv`` the window's keys and values are the dense ones, the other
            branches' are copies.
        config: of heads as the module's, without ``rope_theta``: q and k are rotated by the angles
            that the model hands to its layers.
        backend: as of :class:`nsa.NSAttention`.

    What is new, ``gate_proj``, ``compress_k`` and ``compress_v``, is where q_proj's weight is.
    """

    def __init__(self, dense: nn.Module, config: NSAConfig, *, backend: str | None = None) -> None:
        q_proj = cast(nn.Linear, dense.q_proj)
        weight = q_proj.weight
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.get_default_dtype()
        super().__init__(q_proj.in_features, config, backend=backend, device="meta", dtype=dtype)
        self.q_proj = q_proj
        for name in ("k_proj", "v_proj"):
            setattr(self, name, _per_branch(cast(nn.Module, getattr(dense, name)), config))
        self.o_proj = cast(nn.Linear, dense.o_proj)
        self.q_norm: nn.Module | None = getattr(dense, "q_norm", None)
        self.k_norm: nn.Module | None = getattr(dense, "k_norm", None)
        self.layer_idx = cast(int, dense.layer_idx)
        for module in self.new_modules().values():
            module.to_empty(device=weight.device)
        self.train(dense.training)

    def new_modules(self) -> dict[str, nn.Module]:
        """What the dense module has not, by name."""
        names = ("gate_proj", "compress_k", "compress_v")
        return {name: cast(nn.Module, getattr(self, name)) for name in names}

    def copied_modules(self) -> dict[str, nn.Module]:
        """Copies of dense projections, by name."""
        if not self.config.independent_kv:
            return {}
        return {
            f"{name}.{branch}": cast(nn.ModuleDict, getattr(self, name))[branch]
            for name in ("k_proj", "v_proj")
            for branch in BRANCHES[:-1]
        }

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        nsa_batch: Packed | Aligned | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """What transformers calls; see its attention modules.

        Args:
            hidden_states: ``[B, T, dim]``.
            position_embeddings: cosines and sines ``[B, T, D]`` or ``[1, T, D]``.
            attention_mask: None; the model's own is in ``nsa_batch``.
            cache: a transformers cache with a :class:`NSACacheLayer` for this layer.
            nsa_batch: where the tokens are; None: everywhere, and a row is a sequence.
        """
        if attention_mask is not None:
            raise ShapeError(
                "attention_mask: expected to be seen by the model first; call the model that "
                "convert() returned, not one of its layers"
            )
        x = hidden_states
        cos_sin = _half(position_embeddings, x)
        if cache is not None:
            return self._with_cache(x, cos_sin, cache, cast("Aligned | None", nsa_batch)), None
        if nsa_batch is None:
            return super().forward(x, angles=_angles(cos_sin)), None
        packed = cast(Packed, nsa_batch)
        out = super().forward(
            packed.pack(x),
            cu_seqlens=packed.cu_seqlens.to(x.device),
            max_seqlen=packed.max_seqlen,
            angles=_angles([packed.pack(part.expand(*x.shape[:2], -1)) for part in cos_sin]),
        )
        return packed.unpack(out, *x.shape[:2]), None

    def _with_cache(
        self, x: Tensor, cos_sin: list[Tensor], cache: Any, aligned: Aligned | None
    ) -> Tensor:
        layers, index = cache.layers, self.layer_idx
        if index >= len(layers) or not isinstance(layers[index], NSACacheLayer):
            got = type(layers[index]).__name__ if index < len(layers) else "none"
            raise CacheError(
                f"cache: expected an NSACacheLayer for layer {index}, got {got}; make the cache "
                "of the model's configuration: DynamicCache(config=model.config)"
            )
        counts = None
        if aligned is not None:
            shape = x.shape[:2]
            cos_sin = [aligned.align(part.expand(*shape, -1)) for part in cos_sin]
            x, counts = aligned.align(x), aligned.counts

        def attend(layer: LayerCache) -> Tensor:
            return super(NSASelfAttention, self).forward(
                x, cache=layer, counts=counts, angles=_angles(cos_sin)
            )

        out, _ = cache.update(x, x, index, NewTokens(self.config, attend, aligned))
        return cast(Tensor, out) if aligned is None else aligned.restore(out)

    def _weight(self) -> Tensor | None:
        """None where weights come when their modules are called: accelerate offloads so."""
        weight = super()._weight()
        return None if weight is None or weight.is_meta else weight

    def _projections(self) -> dict[str, nn.Module]:
        projections: dict[str, Any] = dict(super()._projections())
        norms = {"q": self.q_norm, "k": self.k_norm}
        for name in projections:
            norm = norms.get(name[0])
            if norm is not None:
                projections[name] = _Normed(projections[name], norm, self.config.head_dim)
        return projections


class _Normed:
    """A projection and the norm of its heads, as one thing that is called."""

    def __init__(self, projection: nn.Module, norm: nn.Module, head_dim: int) -> None:
        self.projection, self.norm, self.head_dim = projection, norm, head_dim

    def __call__(self, x: Tensor) -> Tensor:
        heads = self.projection(x).unflatten(-1, (-1, self.head_dim))
        return self.norm(heads).flatten(-2)


def _per_branch(projection: nn.Module, config: NSAConfig) -> nn.Module:
    if not config.independent_kv:
        return projection
    dense = BRANCHES[-1]
    return nn.ModuleDict(
        {name: projection if name == dense else copy.deepcopy(projection) for name in BRANCHES}
    )


def _half(position_embeddings: tuple[Tensor, Tensor] | None, x: Tensor) -> list[Tensor]:
    """Cosines and sines ``[B, T, D/2]`` or ``[1, T, D/2]``; transformers has each twice."""
    if position_embeddings is None:
        raise ShapeError("position_embeddings: expected cosines and sines, got None")
    return [part[..., : part.shape[-1] // 2].to(x.device) for part in position_embeddings]


def _angles(cos_sin: list[Tensor]) -> Angles:
    cos, sin = (part[0] if part.shape[0] == 1 else part for part in cos_sin)
    return Angles(cos.unsqueeze(-2), sin.unsqueeze(-2))
