"""A Llama-style decoder: embedding, pre-norm blocks of attention and SwiGLU, norm, head.

Shapes: B batch, T tokens, C vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nsa.backends import Resolution
from nsa.backends.shared.recompute import in_a_graph, recompute
from nsa.cache import LayerCache, NSACache
from nsa.core.compile import static_floats
from nsa.core.validate import check_factory, check_tensor
from nsa.errors import CacheError, ConfigError, ShapeError, require, show
from nsa.models.config import ModelConfig
from nsa.models.dense import DenseAttention
from nsa.models.dense_cache import DenseCache, DenseLayer
from nsa.models.generation import DEFAULT_CHUNK, Generation, Prompts
from nsa.models.sampling import GenerationConfig
from nsa.models.stopping import Stop
from nsa.module import NSAttention

_INIT_STD = 0.02
"""Standard deviation of every matrix at the start, as in GPT-2 and Llama."""


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (arXiv 2002.05202), without biases.

    ``factory``, here and below, is ``device`` and ``dtype`` of the parameters.
    """

    def __init__(self, dim: int, hidden_dim: int, **factory: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False, **factory)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False, **factory)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., dim]`` to ``[..., dim]``."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm layer: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        backend: str | None = None,
        recompute: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        assert config.hidden_dim is not None  # resolved by ModelConfig
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps, **factory)
        self.attention: NSAttention | DenseAttention
        if config.attention == "nsa":
            options: dict[str, Any] = {"backend": backend, "recompute": recompute}
            self.attention = NSAttention(config.dim, config.nsa, **options, **factory)
        else:
            self.attention = DenseAttention(config.dim, config.nsa, **factory)
        self.mlp_norm = nn.RMSNorm(config.dim, config.norm_eps, **factory)
        self.mlp = SwiGLU(config.dim, config.hidden_dim, **factory)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, **cached: Any
    ) -> Tensor:
        """Map ``[B, T, dim]`` to ``[B, T, dim]``; ``cached`` is what attention takes of a cache."""
        normed = self.attention_norm(x)
        x = x + self.attention(normed, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **cached)
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """Predicts the next token from those before it.

    Args:
        config: the sizes.
        backend: the NSA backend; None lets the settings decide. Must be None with
            ``attention="dense"``, which has no backends to choose from.
        activation_checkpointing: recompute each block in the backward pass in place of keeping its
            activations: less memory, about a third more time. Affects training only. The lists of
            selected blocks are kept, not recomputed, so that backward reads what forward read
            (the backend ``reference`` alone selects again: it is made of no operators).
        recompute: the same for NSA's φ and branches alone (:class:`nsa.NSAttention`): less memory
            is saved, and less is computed again.
        device: where the parameters live; "meta" makes shapes only (then ``to_empty`` and
            :meth:`reset_parameters`).
        dtype: of the parameters.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        backend: str | None = None,
        activation_checkpointing: bool = False,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require(isinstance(config, ModelConfig), "config", "a ModelConfig", config)
        check_factory(device, dtype)
        if config.attention == "dense" and backend is not None:
            raise ConfigError(
                f"backend: expected None with attention='dense', got {backend!r}; backends belong "
                "to attention='nsa'"
            )
        if recompute and (activation_checkpointing or config.attention == "dense"):
            other = (
                "activation_checkpointing=True" if activation_checkpointing else "dense attention"
            )
            raise ConfigError(
                f"recompute: expected False with {other}, got True; it is for attention='nsa' "
                "without activation_checkpointing, which recomputes the same and more"
            )
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(config.vocab_size, config.dim, **factory)
        self.blocks = nn.ModuleList(
            Block(config, backend=backend, recompute=recompute, **factory)
            for _ in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.dim, config.norm_eps, **factory)
        self.head: nn.Linear | None = None
        if not config.tied_embeddings:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every parameter anew: normal(0, 0.02), the projections that write into the residual
        stream smaller by ``sqrt(2 * num_layers)`` so that its variance does not grow with depth.

        φ and the gates keep the initialisation of their own layer.
        """
        for module in self.modules():
            if isinstance(module, (nn.RMSNorm, NSAttention)):
                module.reset_parameters()
        residual_std = _INIT_STD / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            parent, _, leaf = name.rpartition(".")
            own = "norm" in parent or ".compress_" in parent
            if leaf != "weight" or own or parent.endswith("attention.gate_proj"):
                continue
            writes_residual = parent.endswith((".o_proj", ".down_proj"))
            nn.init.normal_(parameter, std=residual_std if writes_residual else _INIT_STD)

    @property
    def resolution(self) -> Resolution | None:
        """The NSA backend that ran and why; None before a forward and for dense attention."""
        layers = (module for module in self.modules() if isinstance(module, NSAttention))
        return next((layer.resolution for layer in layers), None)

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block in place, as one graph, with the ``options`` of ``torch.compile``.

        The blocks are alike, so the first one's code serves all: compiling takes as long as for a
        model of one layer. Names of parameters stay as they are. What a block cannot compile raises
        when it is first run. With ``dynamic=True`` run the model under
        :func:`nsa.core.compile.static_floats`, or torch makes the first graph twice.
        """
        for block in self.blocks:
            block.compile(fullgraph=True, **options)

    def compile_loss(self, **options: Any) -> Callable[..., Tensor]:
        """Compile :meth:`loss` as one graph, from the embedding to the cross-entropy.

        Compiling takes longer the more layers there are; embedding, head and cross-entropy gain
        too. The model itself stays as it is. ``options`` are those of ``torch.compile``.

        Returns:
            A function with the signature of :meth:`loss`. With ``activation_checkpointing``,
            prefer it to a ``torch.compile`` of your own: a layer notes which backend ran
            (:attr:`resolution`), and torch refuses that inside a checkpoint unless it is told not
            to, as this function does. With ``dynamic=True`` it also makes the first graph in half
            the time (:func:`nsa.core.compile.static_floats`).
        """
        compiled = torch.compile(self.loss, fullgraph=True, **options)

        @functools.wraps(self.loss)
        def loss(tokens: Tensor, targets: Tensor, **packing: Any) -> Tensor:
            self._build_kernels(tokens, **packing)
            with static_floats(), in_a_graph():
                return compiled(tokens, targets, **packing)

        return loss

    def _build_kernels(self, tokens: Tensor, **packing: Any) -> None:
        """Build the layers' kernels side by side: compiled code launches, and so builds, them one
        after the other."""
        attention = self.blocks[0].attention
        if isinstance(attention, NSAttention) and tokens.ndim == 2:
            weight = self.embedding.weight
            # plain, even where the weight is sharded
            x = torch.empty(1, dtype=weight.dtype, device=weight.device)
            x = x.expand(*tokens.shape, weight.shape[1])
            attention.build_kernels(x, **packing)

    def num_parameters(self) -> int:
        """Count the trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        tokens: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: NSACache | DenseCache | None = None,
        counts: list[int] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Score every possible next token after each token.

        Args:
            tokens: int64 ``[B, T]``, values in ``[0, vocab_size)``.
            cu_seqlens: int32 ``[n_seq + 1]`` when ``tokens`` is ``[1, total]`` of sequences packed
                end to end; None for a regular batch.
            max_seqlen: length of the longest packed sequence; None means ``total``.
            cache: holds the tokens before these, and takes these: what :meth:`new_cache` makes. It
                is for regular batches, under ``torch.no_grad()``.
            counts: with a cache, how many of the T tokens, from the left, each sequence has; None:
                all. Logits past them mean nothing.
            last_only: score what follows the last token of each sequence alone.

        Returns:
            Logits ``[B, T, C]``, or ``[B, 1, C]``.

        Raises:
            ShapeError: for tokens of another shape or dtype, and for packed input to a dense model.
        """
        check_tensor("tokens", tokens)
        if tokens.ndim != 2 or tokens.dtype != torch.int64:
            raise ShapeError(
                f"tokens: expected int64 [B, T], got {_name(tokens.dtype)} {list(tokens.shape)}"
            )
        ids = self.config.vocab_size
        try:
            x = self.embedding(tokens)
        except IndexError:
            raise ShapeError(f"tokens: expected values in 0 … {ids - 1}, got others") from None
        checkpointing = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        selects = self.config.attention == "nsa"
        layers = self._layers_of(cache)
        for block, layer in zip(self.blocks, layers, strict=True):
            if layer is not None:
                x = block(x, cu_seqlens, max_seqlen, cache=layer, counts=counts)
            elif checkpointing:
                x = recompute(block, x, cu_seqlens, max_seqlen, selects=selects)
            else:
                x = block(x, cu_seqlens, max_seqlen)
        weight = self.embedding.weight if self.head is None else self.head.weight
        if last_only:
            x = _last(x, counts)
        return F.linear(self.norm(x), weight)

    def new_cache(self, batch_size: int, max_length: int, **options: Any) -> NSACache | DenseCache:
        """Make an empty cache for sequences of up to ``max_length`` tokens, on the model's device
        and in its dtype.

        Args:
            batch_size, max_length: of the sequences.
            options: of :class:`nsa.NSACache` besides; a dense model's cache has none.
        """
        dense = self.config.attention == "dense"
        require(not (dense and options), "options", "none for a dense model's cache", options)
        if not dense:
            sizes = {"batch_size": batch_size, "max_length": max_length}
            return NSACache.for_model(self, **sizes, **options)
        weight = self.embedding.weight
        return DenseCache(
            self.config.nsa,
            num_layers=len(self.blocks),
            batch_size=batch_size,
            max_length=max_length,
            device=weight.device,
            dtype=weight.dtype,
        )

    def generate(
        self,
        prompt: Prompts,
        config: GenerationConfig | None = None,
        *,
        context: int,
        max_length: int | None = None,
        stop: Stop = None,
        cache: bool | Mapping[str, Any] = True,
        chunk: int = DEFAULT_CHUNK,
        graph: bool | None = None,
    ) -> Generation:
        """Continue a prompt, or a batch of them: see :func:`nsa.models.generate`."""
        return Generation(
            self,
            prompt,
            GenerationConfig() if config is None else config,
            context=context,
            max_length=max_length,
            stop=stop,
            cache=cache,
            chunk=chunk,
            graph=graph,
        )

    def _layers_of(
        self, cache: NSACache | DenseCache | None
    ) -> Sequence[LayerCache | DenseLayer | None]:
        """One for each block."""
        if cache is None:
            return [None] * len(self.blocks)
        nsa = self.config.attention == "nsa"
        fits = isinstance(cache, NSACache if nsa else DenseCache)
        if not fits or len(cache.layers) != len(self.blocks):
            kind = "an NSACache" if nsa else "a DenseCache"
            got = f"one of {len(cache.layers)}" if fits else show(cache)
            raise CacheError(
                f"cache: expected {kind} of {len(self.blocks)} layers, as the model has, got {got}"
            )
        return cache.layers

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Compute the mean cross-entropy, a scalar: nats per token, in fp32 (or fp64 as the model).

        Args:
            targets: int64 ``[B, T]``: the token that follows each of ``tokens``; -100 is left out.
            tokens, cu_seqlens, max_seqlen: as in :meth:`forward`.

        Raises:
            ShapeError: when ``targets`` does not match ``tokens``, and as :meth:`forward`.
        """
        check_tensor("tokens", tokens)
        check_tensor("targets", targets)
        if targets.shape != tokens.shape or targets.dtype != torch.int64:
            raise ShapeError(
                f"targets: expected int64 {list(tokens.shape)} like tokens, got "
                f"{_name(targets.dtype)} {list(targets.shape)}"
            )
        logits = self(tokens, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        try:
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        except IndexError:
            ids = self.config.vocab_size
            raise ShapeError(
                f"targets: expected values in 0 … {ids - 1}, or -100, got others"
            ) from None


def _last(x: Tensor, counts: list[int] | None) -> Tensor:
    """``[B, 1, dim]``: of each sequence's last token."""
    if counts is None:
        return x[:, -1:]
    last = torch.tensor(counts, device=x.device).sub_(1).clamp_min_(0)
    return x[torch.arange(len(counts), device=x.device), last][:, None]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
