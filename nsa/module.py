"""NSAttention: the layer, projections and gates included.

B batch, T tokens, H query heads, K key/value heads, D key size, V value size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nsa.attention import check_values, needs_grad, run
from nsa.backends import Resolution
from nsa.backends.dispatch import Plan, plan
from nsa.compression import Compress, compress_both
from nsa.config import KV, NSAConfig
from nsa.core import validate
from nsa.core.compile import fused
from nsa.core.linear import is_plain
from nsa.core.packing import token_members
from nsa.core.rope import apply_rope
from nsa.errors import ConfigError
from nsa.settings import current_settings

BRANCHES = ("compressed", "selected", "window")


class NSAttention(nn.Module):
    """Causal self-attention by Native Sparse Attention (arXiv 2502.11089).

    Args:
        dim: width of the model.
        config: heads, blocks, window, compression, gate, RoPE.
        backend: a name of the backend table; None obeys the settings in force now.
        device, dtype: of the parameters; the meta device works.

    Parameters are named ``q_proj``, ``k_proj.{compressed,selected,window}``, ``v_proj.{…}`` (plain
    ``k_proj`` and ``v_proj`` when ``independent_kv=False``), ``o_proj``, ``gate_proj`` (head-major,
    branch minor), ``compress_k`` and ``compress_v``.

    The settings are bound when the layer is built; :attr:`resolution` tells what ran last.
    """

    def __init__(
        self,
        dim: int,
        config: NSAConfig,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
            raise ConfigError(f"dim: expected an int >= 1, got {dim!r}")
        self.dim, self.config, self.backend = dim, config, backend
        self.settings = current_settings()
        self._plan: Plan | None = None
        H, K, D, V = config.num_heads, config.num_kv_heads, config.head_dim, config.dv

        def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        def per_branch(make: Callable[[], nn.Linear]) -> nn.Module:
            if not config.independent_kv:
                return make()
            return nn.ModuleDict({branch: make() for branch in BRANCHES})

        self.q_proj = linear(dim, H * D)
        self.k_proj = per_branch(lambda: linear(dim, K * D))
        self.v_proj = per_branch(lambda: linear(dim, K * V))
        self.gate_proj = linear(dim, H * len(BRANCHES), bias=True)
        self.compress_k = Compress(config, D, device=device, dtype=dtype)
        self.compress_v = Compress(config, V, device=device, dtype=dtype)
        self.o_proj = linear(H * V, dim)
        self.reset_parameters()

    @property
    def resolution(self) -> Resolution | None:
        """What ran the last forward, and why; None before the first."""
        return None if self._plan is None else self._plan.resolution

    def reset_parameters(self) -> None:
        """Draws the weights anew; every gate starts half open."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, Compress)):
                module.reset_parameters()
        nn.init.zeros_(self.gate_proj.bias)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, backend={self.backend!r}, {self.config}"

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> Tensor:
        """Attends within each sequence.

        Args:
            x: ``[B, T, dim]``, or ``[1, total, dim]`` packed.
            cu_seqlens: int32 ``[n_seq + 1]`` for packed input, on x's device.
            max_seqlen: an upper bound of the packed lengths, in tokens.

        Returns:
            ``[B, T, dim]``.

        Raises:
            ShapeError: inputs that do not fit.
            DataError: values that are not finite (``NSA_CHECK=1`` only).
            BackendUnavailable: the backend asked for cannot run this.
        """
        settings = self.settings
        validate.check_layer_input(x, self.dim, self.q_proj.weight)
        validate.check_packing(x, cu_seqlens, max_seqlen, check=settings.check)
        if settings.check:
            validate.check_finite({"x": x})
        if not torch.compiler.is_compiling() and self._choose(x, cu_seqlens, max_seqlen) == (
            "compiled"
        ):
            return _FUSED(self, x, cu_seqlens, max_seqlen)
        return self._attend(x, cu_seqlens, max_seqlen)

    def _choose(self, x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> str:
        """The name of the backend, before anything has been projected."""
        autocast = torch.is_autocast_enabled(x.device.type)
        chosen = plan(
            self.config,
            device=x.device,
            dtype=torch.get_autocast_dtype(x.device.type) if autocast else x.dtype,
            length=x.shape[1] if max_seqlen is None else max_seqlen,
            packed=cu_seqlens is not None,
            needs_grad=torch.is_grad_enabled(),
            backend=self.backend,
            settings=self.settings,
        )
        return chosen.backend

    def _attend(self, x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> Tensor:
        """Projections, branches and gates, of checked input."""
        settings, config = self.settings, self.config
        T = x.shape[1]
        projected = self._project(x)
        q = self._rotate(
            projected["q"].unflatten(-1, (config.num_heads, config.head_dim)), cu_seqlens
        )
        tokens, selected, window = self._keys_and_values(projected, cu_seqlens)
        gates = self._gates(projected["gate"])
        self._plan = plan(
            config,
            device=q.device,
            dtype=q.dtype,
            length=T if max_seqlen is None else max_seqlen,
            packed=cu_seqlens is not None,
            needs_grad=needs_grad(
                q,
                *tokens,
                *selected,
                *window,
                gates,
                *self.compress_k.parameters(),
                *self.compress_v.parameters(),
            ),
            backend=self.backend,
            settings=settings,
        )
        k_cmp, v_cmp = compress_both(
            self.compress_k, self.compress_v, *tokens, cu_seqlens, by=self._plan.backend
        )
        compressed = KV(k_cmp.to(q.dtype), v_cmp.to(q.dtype))
        if settings.check:
            check_values(q, compressed, selected, window, gates, config, cu_seqlens)
        out = run(
            self._plan,
            q,
            compressed,
            selected,
            window,
            gates,
            config,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            block_idx=None,
            settings=settings,
            within_one=True,
        )
        return self.o_proj(out.flatten(2))

    def _linears(self) -> dict[str, nn.Module]:
        """The projections of the layer's input: "q", "k" and "v" or "k.<branch>" …, "gate"."""
        linears: dict[str, nn.Module] = {"q": self.q_proj}
        for name, proj in (("k", self.k_proj), ("v", self.v_proj)):
            if isinstance(proj, nn.ModuleDict):
                linears.update({f"{name}.{branch}": proj[branch] for branch in BRANCHES})
            else:
                linears[name] = proj
        linears["gate"] = self.gate_proj
        return linears

    def _project(self, x: Tensor) -> dict[str, Tensor]:
        """What :meth:`_linears` make of x: one product where they are nothing but linear maps.

        All but that of q are so narrow that reading x is most of their work, and in the backward
        pass each would write a gradient of x. A projection that is more than a linear map
        (:func:`nsa.core.linear.is_plain`) is called as it is, and then so are all.
        """
        linears = self._linears()
        together = all(is_plain(linear, bias=name == "gate") for name, linear in linears.items())
        if not torch.compiler.is_compiling() and x.shape[0] * x.shape[1] < _FEW:
            together = False
        if not together:
            return {name: linear(x) for name, linear in linears.items()}
        weights = [cast(nn.Linear, linear).weight for linear in linears.values()]
        sizes = [weight.shape[0] for weight in weights]
        spare = -sum(sizes) % _ALIGNED  # so that every row of the result begins aligned
        weights.append(weights[0].new_zeros(spare, self.dim))
        product = F.linear(x, torch.cat(weights))
        parts = dict(zip(linears, product.split([*sizes, spare], -1), strict=False))
        parts["gate"] = parts["gate"] + self.gate_proj.bias.to(product.dtype)
        return parts

    def _keys_and_values(
        self, projected: dict[str, Tensor], cu_seqlens: Tensor | None
    ) -> tuple[KV, ...]:
        """Those of every branch, in the order of BRANCHES; one pair for all when shared."""
        if not self.config.independent_kv:
            return (self._kv(projected["k"], projected["v"], cu_seqlens),) * len(BRANCHES)
        return tuple(
            self._kv(projected[f"k.{branch}"], projected[f"v.{branch}"], cu_seqlens)
            for branch in BRANCHES
        )

    def _kv(self, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> KV:
        k = k.unflatten(-1, (self.config.num_kv_heads, self.config.head_dim))
        # a copy: a part that is kept for the backward pass would keep the whole product
        v = v.contiguous().unflatten(-1, (self.config.num_kv_heads, self.config.dv))
        return KV(self._rotate(k, cu_seqlens), v)

    def _rotate(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        theta = self.config.rope_theta
        if theta is None:
            return x.contiguous()
        positions = None if cu_seqlens is None else token_members(cu_seqlens, x.shape[1]).rank
        return apply_rope(x, theta, positions)

    def _gates(self, logits: Tensor) -> Tensor:
        logits = logits.unflatten(-1, (self.config.num_heads, len(BRANCHES)))
        if self.config.gate == "sigmoid":
            return logits.sigmoid()
        return logits.softmax(-1)


_ALIGNED = 64
"""Elements."""
_FEW = 256
"""Rows of x below which the weights are not joined, outside a trace: on a CPU (dim 768) 64 rows
took 2.65 ms in place of 1.53, 2048 rows the same."""
_FUSED = fused(NSAttention._attend)
