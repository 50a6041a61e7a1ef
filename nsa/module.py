"""NSAttention: the layer, projections and gates included.

B batch, T tokens, H query heads, K key/value heads, D key size, V value size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nsa.attention import compiles_itself, launches_itself, rehearse, run
from nsa.backends.dispatch import Resolution, decoding, plan
from nsa.backends.protocol import Problem
from nsa.backends.shared.recompute import in_a_graph, recompute
from nsa.cache import LayerCache
from nsa.cached_attention import Projected, attend, check_cache
from nsa.compression import PHI, Compress, compress_both, rehearse_compression
from nsa.config import KV, MOST, NSAConfig
from nsa.core import validate
from nsa.core.build import build_once, kind, launches_soon, on_meta
from nsa.core.compile import compile_glue
from nsa.core.dtypes import accumulation_dtype, autocast_dtype
from nsa.core.inputs import BRANCHES, AttentionInputs, Probe
from nsa.core.linear import ROW_ALIGNMENT, joined_product, project, side_by_side
from nsa.core.packing import packed_tokens, packing_kept
from nsa.core.rope import Angles, apply_rope, rope_table
from nsa.core.sharding import active
from nsa.core.split_heads.op import DTYPES, split_heads, widths
from nsa.errors import CheckpointError, ShapeError, is_int, require, show
from nsa.gates import GATES
from nsa.settings import current_settings


class NSAttention(nn.Module):
    """Causal self-attention by Native Sparse Attention (arXiv 2502.11089).

    Args:
        dim: width of the model.
        config: heads, blocks, window, compression, gate, RoPE.
        backend: a name of the backend table; None obeys the settings in force now.
        recompute: keep no compressed keys and values and no branch's output for the backward pass,
            which computes them again from the projections, for the same gradients to the bit. The
            lists of selected blocks are kept. docs/memory.md has the price.
        device, dtype: of the parameters; the meta device works.

    Parameters are named ``q_proj``, ``k_proj.{compressed,selected,window}``, ``v_proj.{…}`` (plain
    ``k_proj`` and ``v_proj`` when ``independent_kv=False``), ``o_proj``, ``gate_proj`` (head-major,
    branch minor), ``compress_k`` and ``compress_v``. Any module may stand in the place of one: it
    is called, and asked for nothing more; keys and values take the dtype of q.

    The settings are bound when the layer is built; :attr:`resolution` tells what ran last.
    """

    # None, not (): torch guards no graph by an empty tuple (2.13)
    probes: tuple[Probe, ...] | None = None
    """What watches this layer; :func:`nsa.inspection.record` and its like put it here."""

    _version = 1
    """Of the parameters' names and shapes; whoever changes them raises it, with a migration in
    :meth:`_load_from_state_dict`."""

    def __init__(
        self,
        dim: int,
        config: NSAConfig,
        *,
        backend: str | None = None,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require(is_int(dim) and dim >= 1, "dim", "an int >= 1", dim)
        require(dim <= MOST["dim"], "dim", f"at most {MOST['dim']}", dim)
        require(isinstance(recompute, bool), "recompute", "True or False", recompute)
        validate.check_config(config)
        validate.check_factory(device, dtype)
        self.dim, self.config, self.backend, self.recompute = dim, config, backend, recompute
        self.settings = current_settings()
        self._resolution: Resolution | None = None
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
        phi = PHI[config.compression]
        self.compress_k = phi(config, D, device=device, dtype=dtype)
        self.compress_v = phi(config, V, device=device, dtype=dtype)
        self.o_proj = linear(H * V, dim)
        self.reset_parameters()

    @property
    def resolution(self) -> Resolution | None:
        """What ran the last forward, and why; None before the first."""
        return self._resolution

    def reset_parameters(self) -> None:
        """Draws the weights anew; every gate starts half open."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, Compress)):
                module.reset_parameters()
        for module in self.gate_proj.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Load what a layer of this version or before saved: ``state_dict`` is migrated in place.

        safetensors keeps no versions: its tensors are taken for those of version 1.
        """
        version = local_metadata.get("version", 1)
        if not (is_int(version) and 1 <= version <= self._version):
            raise CheckpointError(
                f"state_dict of {prefix[:-1] or type(self).__name__}: expected a version up to "
                f"{self._version}, got {show(version)}; upgrade nsa-torch"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, backend={self.backend!r}, {self.config}"

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: LayerCache | None = None,
        counts: list[int] | None = None,
        angles: Angles | None = None,
    ) -> Tensor:
        """Attends within each sequence.

        Args:
            x: ``[B, T, dim]``, or ``[1, total, dim]`` packed.
            cu_seqlens: int32 ``[n_seq + 1]`` for packed input, on x's device.
            max_seqlen: an upper bound of the packed lengths, in tokens.
            cache: this layer's of an :class:`nsa.NSACache`, for a regular batch without gradients:
                x are the next tokens of its sequences, which are added to it.
            counts: with a cache, how many of the T tokens, from the left, each sequence has; None:
                all. Rows of the output past them mean nothing.
            angles: cosines and sines ``[T, 1, D/2]`` or ``[B, T, 1, D/2]`` that q and keys are
                rotated by, in place of those of ``rope_theta``.

        Returns:
            ``[B, T, dim]``.

        Raises:
            CacheError: a cache that does not fit, or has no room.
            ShapeError: inputs that do not fit.
            DataError: values that are not finite (``NSA_CHECK=1`` only).
            BackendUnavailable: the backend requested cannot run this.
        """
        settings = self.settings
        validate.check_layer_input(x, self.dim, self._weight())
        check = settings.check and not x.is_meta
        max_seqlen = validate.check_packing(x, cu_seqlens, max_seqlen, check=check)
        if check:
            validate.check_finite({"x": x})
        if angles is not None:
            validate.check_angles(*angles, x, self.config)
        dtype = autocast_dtype(x.device) or x.dtype
        if cache is not None or counts is not None:
            if active() is not None:
                raise ShapeError("cache: expected None under context_parallel, got one")
            if cu_seqlens is not None:
                raise ShapeError("cu_seqlens: expected None with a cache, whose rows are sequences")
            return self._attend_cached(x, check_cache(cache, x, self.config), counts, angles)
        sharding = active()
        if sharding is not None:
            sharding.check_call(self, x, cu_seqlens=cu_seqlens, angles=angles)
        chosen = self._plan_for(x, dtype, cu_seqlens, max_seqlen)
        if sharding is None:
            self._build_kernels(x, chosen, dtype, cu_seqlens, max_seqlen, angles)
        if sharding is None and compiles_itself(chosen, x.device):
            with in_a_graph() if self.recompute else nullcontext():
                return _ATTEND_COMPILED(self, x, chosen, dtype, cu_seqlens, max_seqlen, angles)
        # what is recomputed must not find what the forward pass kept outside of it
        with packing_kept(None if self.recompute else cu_seqlens):
            return self._attend(x, chosen, dtype, cu_seqlens, max_seqlen, angles)

    def build_kernels(
        self, x: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> None:
        """Build the Triton kernels that a call and its backward launch on a GPU, side by side.

        A first call outside ``torch.compile`` does so itself. Code that ``torch.compile`` makes
        builds each kernel when it first launches it: call this before. Arguments as of
        :meth:`forward`; only x's shape, dtype and device matter.

        Raises:
            ShapeError, BackendUnavailable: as of :meth:`forward`.
        """
        validate.check_layer_input(x, self.dim, self._weight())
        max_seqlen = validate.check_packing(x, cu_seqlens, max_seqlen, check=False)
        dtype = autocast_dtype(x.device) or x.dtype
        chosen = self._plan_for(x, dtype, cu_seqlens, max_seqlen)
        self._build_kernels(x, chosen, dtype, cu_seqlens, max_seqlen)

    def _plan_for(
        self, x: Tensor, dtype: torch.dtype, cu_seqlens: Tensor | None, max_seqlen: int | None
    ) -> Resolution:
        """What runs queries of this dtype."""
        length = x.shape[1] if max_seqlen is None else max_seqlen
        packed = cu_seqlens is not None
        sharding = active()
        if sharding is not None:
            length, packed = sharding.longest, sharding.packed
        grad, sharded = torch.is_grad_enabled(), sharding is not None
        problem = Problem(self.config, x.device, dtype, length, packed, grad, sharded)
        return plan(problem, self.backend, self.settings)

    def _attend(
        self,
        x: Tensor,
        chosen: Resolution,
        dtype: torch.dtype,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        angles: Angles | None = None,
    ) -> Tensor:
        """Projections, branches and gates, of checked input and expected ``dtype`` of queries."""
        sharding = active()
        positions: Tensor | Angles | None = angles
        if sharding is not None:
            positions = sharding.positions(x.device)
        elif angles is None and cu_seqlens is not None and self.config.rope_theta is not None:
            positions = packed_tokens(cu_seqlens, x.shape[1]).position
        by_kernel = launches_itself(chosen, x) and _of_one_row(angles)
        projected = (self._project_by_kernel if by_kernel else self._project)(x, positions)
        if projected.q.dtype != dtype:  # a projection that decides itself, a quantised one, say
            chosen = self._plan_for(x, projected.q.dtype, cu_seqlens, max_seqlen)
        self._resolution = chosen
        attend = self._branches if sharding is None else partial(sharding.attend, self)
        branches = partial(attend, chosen)
        if self.recompute and torch.is_grad_enabled():
            branches = partial(recompute, branches)
        out = branches(*projected, cu_seqlens, max_seqlen)
        return self.o_proj(out.flatten(2))

    def _attend_cached(
        self, x: Tensor, layer: LayerCache, counts: list[int] | None, angles: Angles | None
    ) -> Tensor:
        """The same of the next tokens of a cache's sequences."""
        if angles is None:
            angles = layer.angles(x.shape[1], accumulation_dtype(x))
        projected = self._project(x, angles)
        q = projected.q
        longest = layer.cache.max_length
        problem = Problem(self.config, q.device, q.dtype, longest, packed=False, needs_grad=False)
        chosen, decoder = decoding(
            plan(problem, self.backend, self.settings),
            problem,
            e4m3=layer.cache.selected_dtype == "e4m3",
        )
        self._resolution = chosen
        phi = partial(compress_both, self.compress_k, self.compress_v)
        out = attend(layer, projected, counts, chosen, decoder, phi)
        return self.o_proj(out.flatten(2))

    def _project(self, x: Tensor, positions: Tensor | Angles | None) -> Projected:
        """Apply the projections, RoPE at ``positions`` and the activation of the gates.

        The product of all projections dies here: what is kept of it are copies.
        """
        return self._heads(project(x, self._projections()), positions)

    def _project_by_kernel(self, x: Tensor, positions: Tensor | Angles | None) -> Projected:
        """The same in one kernel, whatever module makes a part, as long as all have one dtype."""
        config, projections = self.config, self._projections()
        sizes = widths(config)
        joined = joined_product(x, projections, sizes)
        if joined is None:
            parts = project(x, projections)
            product = side_by_side(parts, sizes)
            if product is None or product.dtype not in DTYPES:
                return self._heads(parts, positions)
            joined = product, None
        projected = self._split(*joined, positions)
        gates = GATES[self.config.gate].activate(projected.gates)
        return projected._replace(gates=gates)

    def _split(
        self, product: Tensor, bias: Tensor | None, positions: Tensor | Angles | None
    ) -> Projected:
        """With logits in place of gates."""
        config, angles, dtype = self.config, None, accumulation_dtype(product)
        if isinstance(positions, Angles):
            angles = Angles(*(x.squeeze(1).to(dtype) for x in positions))
        elif config.rope_theta is not None:
            if positions is None:
                positions = torch.arange(product.shape[1], device=product.device)
            angles = Angles(*rope_table(positions, config.head_dim, config.rope_theta, dtype))
        q, keys, values, logits = split_heads(product, bias, angles, config)
        copies = len(BRANCHES) // len(keys)
        tokens, selected, window = map(KV, keys * copies, values * copies)
        return Projected(q, tokens, selected, window, logits)

    def _build_kernels(
        self,
        x: Tensor,
        chosen: Resolution,
        dtype: torch.dtype,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        angles: Angles | None = None,
    ) -> None:
        if not (launches_itself(chosen, x) and _of_one_row(angles) and launches_soon(x)):
            return
        config, grad = self.config, torch.is_grad_enabled()

        def rehearsal() -> None:
            columns = sum(widths(config))
            columns += -columns % ROW_ALIGNMENT
            product = x.new_empty(*x.shape[:2], columns, dtype=dtype, device="meta")
            product.requires_grad_(grad)
            cu = on_meta(cu_seqlens)
            # made without arithmetic: torch's, on meta tensors, would import its compiler
            positions: Tensor | Angles = torch.empty(x.shape[1], dtype=torch.int64, device="meta")
            if angles is not None:
                positions = Angles(*(on_meta(y) for y in angles))
            bias = on_meta(getattr(self.gate_proj, "bias", None), grad=grad)
            q, tokens, selected, window, gates = self._split(product, bias, positions)
            compressed = KV(*(rehearse_compression(y, config, cu, grad=grad) for y in tokens))
            given = AttentionInputs(
                q, compressed, selected, window, gates, cu_seqlens=cu, max_seqlen=max_seqlen
            )
            unit = GATES[config.gate].in_unit_interval
            rehearse(chosen, given, config, gates_in_unit_interval=unit)

        key = (config, chosen, dtype, grad, kind(x), kind(cu_seqlens), angles is not None)
        build_once(key, x.device, rehearsal)

    def _heads(self, projected: dict[str, Tensor], positions: Tensor | Angles | None) -> Projected:
        config = self.config
        q = projected["q"].unflatten(-1, (config.num_heads, config.head_dim))
        q = self._rotate(q, positions)
        tokens, selected, window = self._keys_and_values(projected, positions, q.dtype)
        logits = projected["gate"].unflatten(-1, (config.num_heads, len(BRANCHES)))
        if logits.dtype != torch.float32:
            logits = logits.to(q.dtype)
        return Projected(q, tokens, selected, window, GATES[config.gate].activate(logits))

    def _branches(
        self,
        chosen: Resolution,
        q: Tensor,
        tokens: KV,
        selected: KV,
        window: KV,
        gates: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
    ) -> Tensor:
        """φ and the gated sum of the branches, ``[B, T, H, V]``."""
        with packing_kept(cu_seqlens):
            settings, config = self.settings, self.config
            k_cmp, v_cmp = compress_both(self.compress_k, self.compress_v, *tokens, cu_seqlens)
            inputs = AttentionInputs(
                q,
                KV(k_cmp.to(q.dtype), v_cmp.to(q.dtype)),
                selected,
                window,
                gates,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
            )
            if settings.check and not q.is_meta:
                validate.check_values(inputs, config)
            return run(
                chosen,
                inputs,
                config,
                gates_in_unit_interval=GATES[config.gate].in_unit_interval,
                nvtx=settings.nvtx,
                probes=self.probes,
            )

    def _projections(self) -> dict[str, nn.Module]:
        """What the layer's input goes through: "q", "k" and "v" or "k.<branch>" …, "gate".

        Linear layers, or whatever stands in their places: it is called, and asked for nothing more.
        """
        projections: dict[str, nn.Module] = {"q": self.q_proj}
        for name, proj in (("k", self.k_proj), ("v", self.v_proj)):
            if isinstance(proj, nn.ModuleDict):
                projections.update({f"{name}.{branch}": proj[branch] for branch in BRANCHES})
            else:
                projections[name] = proj
        projections["gate"] = self.gate_proj
        return projections

    def _weight(self) -> Tensor | None:
        """That of the first projection which has one."""
        weight = getattr(self.q_proj, "weight", None)
        if isinstance(weight, Tensor):
            return weight
        found = (getattr(module, "weight", None) for module in self._projections().values())
        return next((weight for weight in found if isinstance(weight, Tensor)), None)

    def _keys_and_values(
        self,
        projected: dict[str, Tensor],
        positions: Tensor | Angles | None,
        dtype: torch.dtype,
    ) -> tuple[KV, ...]:
        """Those of every branch, in the order of BRANCHES; one pair for all when shared."""
        if not self.config.independent_kv:
            return (self._kv(projected["k"], projected["v"], positions, dtype),) * len(BRANCHES)
        return tuple(
            self._kv(projected[f"k.{branch}"], projected[f"v.{branch}"], positions, dtype)
            for branch in BRANCHES
        )

    def _kv(
        self, k: Tensor, v: Tensor, positions: Tensor | Angles | None, dtype: torch.dtype
    ) -> KV:
        k = k.to(dtype).unflatten(-1, (self.config.num_kv_heads, self.config.head_dim))
        # a copy: a part that is kept for the backward pass would keep the whole product
        v = v.to(dtype).contiguous().unflatten(-1, (self.config.num_kv_heads, self.config.dv))
        return KV(self._rotate(k, positions), v)

    def _rotate(self, x: Tensor, positions: Tensor | Angles | None) -> Tensor:
        """RoPE at ``positions``, or by angles; see :func:`apply_rope`."""
        theta = self.config.rope_theta
        if theta is None and not isinstance(positions, Angles):
            return x.contiguous()
        return apply_rope(x, theta or 0.0, positions)


def _of_one_row(angles: Angles | None) -> bool:
    """Whether all sequences share a row of them: the kernel that splits heads takes no other."""
    return angles is None or angles.cos.ndim == 3


_ATTEND_COMPILED = compile_glue(
    NSAttention._attend, lambda layer, x, chosen, dtype, *packing: (chosen, layer.config, dtype)
)
"""The same as one graph, where :func:`nsa.attention.compiles_itself`."""
