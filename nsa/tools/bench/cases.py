"""What ``bench`` times: problems, their data, and one call for each branch.

B batch, T tokens, H query heads, K key/value heads, D key size, V value size, n listed blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from nsa import nsa_attention
from nsa.backends import Resolution, load, resolve
from nsa.backends.protocol import STEPS, Problem
from nsa.config import KV, NSAConfig
from nsa.settings import Settings
from nsa.testing.inputs import Inputs

WHOLE = ("all", "all+select")
"""The three branches and their sum: with the block list given, and with the selection in it."""
BRANCHES = (*STEPS, *WHOLE)
DENSE = "dense"
"""The branch name of dense causal attention, the baseline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One problem to time."""

    config: NSAConfig
    device: torch.device
    dtype: torch.dtype
    length: int
    """T, the tokens of a row; of all sequences together where they are packed."""
    batch: int = 1
    sequences: int = 0
    """Packed sequences; 0 for a regular batch."""

    @property
    def heads(self) -> str:
        """The head layout as ``--heads`` takes it."""
        return heads_label(self.config)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every sequence. Packed ones are as 1 : 2 : 3 : …, since equal ones are rare."""
        if not self.sequences:
            return (self.length,) * self.batch
        n = self.sequences
        ends = [self.length * i * (i + 1) // (n * (n + 1)) for i in range(n + 1)]
        return tuple(end - start for start, end in pairwise(ends))

    @property
    def problem(self) -> Problem:
        return Problem(
            config=self.config,
            device=self.device,
            dtype=self.dtype,
            length=max(self.lengths),
            packed=self.sequences > 0,
            needs_grad=True,
        )

    def resolve(self, backend: str, settings: Settings) -> Resolution:
        """What the backend runs each step on.

        Raises:
            BackendUnavailable: it cannot run this.
        """
        problem = self.problem
        return resolve(
            problem.config,
            device=problem.device,
            dtype=problem.dtype,
            length=problem.length,
            packed=problem.packed,
            needs_grad=problem.needs_grad,
            backend=backend,
            settings=settings,
        )


@dataclass(frozen=True, slots=True)
class Timed:
    """A call to time, forward and backward."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...] = ()
    """What it is differentiated with respect to; nothing if it has no backward."""
    dout: Tensor | None = None
    """The gradient of its output."""


@dataclass(frozen=True, slots=True)
class Data:
    """One problem's tensors, the same for everything that is timed on it."""

    inputs: Inputs
    """With the block list that ``sdpa`` selects, which every backend is given."""
    lse: Tensor
    """``[B, T, H]`` of the compressed branch, which the selection is given."""


def heads_label(config: NSAConfig) -> str:
    """``Hq/Hkv:D``, or ``Hq/Hkv:Dk/Dv`` where the sizes differ."""
    sizes = f"{config.head_dim}"
    if config.dv != config.head_dim:
        sizes += f"/{config.dv}"
    return f"{config.num_heads}/{config.num_kv_heads}:{sizes}"


def make_data(shape: Shape) -> Data:
    """Random inputs, drawn on the device: normal, gates uniform."""
    inputs = random_inputs(shape)
    steps = load("sdpa")
    q, config, cu_seqlens = inputs.q.detach(), inputs.config, inputs.cu_seqlens
    longest = inputs.max_seqlen
    with torch.no_grad():
        lse = steps.compressed_attention(
            q, *inputs.compressed, config, cu_seqlens, max_seqlen=longest
        )[1]
        blocks = steps.select_blocks(
            q, inputs.compressed.k, config, cu_seqlens, max_seqlen=longest, lse=lse
        )
    return Data(replace(inputs, block_idx=blocks), lse)


def random_inputs(shape: Shape, seed: int = 0) -> Inputs:
    """As :func:`nsa.testing.make_inputs`, which draws on the CPU in fp64: too slow at length."""
    config, device = shape.config, shape.device
    B, T = shape.batch, shape.length
    H, K, D, V = config.num_heads, config.num_kv_heads, config.head_dim, config.dv
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=shape.dtype)

    def pair(rows: int) -> KV:
        k, v = normal(B, rows, K, D), normal(B, rows, K, V)
        return KV(k.requires_grad_(), v.requires_grad_())

    cu_seqlens = max_seqlen = None
    rows = config.num_compressed(T)
    if shape.sequences:
        ends = torch.tensor((0, *shape.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        cu_seqlens, max_seqlen = ends.to(device), max(shape.lengths)
        rows = T // config.compress_stride
    gates = torch.rand(B, T, H, 3, generator=generator, device=device, dtype=shape.dtype)
    return Inputs(
        q=normal(B, T, H, D).requires_grad_(),
        compressed=pair(rows),
        selected=pair(T),
        window=pair(T),
        gates=gates.requires_grad_(),
        dout=normal(B, T, H, V),
        config=config,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
    )


def timed_branch(branch: str, data: Data, resolution: Resolution, settings: Settings) -> Timed:
    """The call of one of :data:`BRANCHES` on what the resolution says runs it."""
    x, config, cu_seqlens, longest = (
        data.inputs,
        data.inputs.config,
        data.inputs.cu_seqlens,
        data.inputs.max_seqlen,
    )
    if branch in WHOLE:
        return _timed_whole(x, x.block_idx if branch == "all" else None, resolution.backend)
    steps = load(resolution.per_branch[branch], settings)
    blocks = x.block_idx
    assert blocks is not None
    if branch == "select":
        q, k = x.q.detach(), x.compressed.k.detach()
        return Timed(
            lambda: steps.select_blocks(q, k, config, cu_seqlens, max_seqlen=longest, lse=data.lse)
        )
    if branch == "compressed":
        return Timed(
            lambda: steps.compressed_attention(
                x.q, *x.compressed, config, cu_seqlens, max_seqlen=longest
            )[0],
            (x.q, *x.compressed),
            x.dout,
        )
    if branch == "selected":
        return Timed(
            lambda: steps.selected_attention(
                x.q, *x.selected, blocks, config, cu_seqlens, max_seqlen=longest
            )[0],
            (x.q, *x.selected),
            x.dout,
        )
    return Timed(
        lambda: steps.window_attention(x.q, *x.window, config, cu_seqlens, max_seqlen=longest)[0],
        (x.q, *x.window),
        x.dout,
    )


def _timed_whole(x: Inputs, blocks: Tensor | None, backend: str) -> Timed:
    def call() -> Tensor:
        return nsa_attention(
            x.q,
            x.compressed,
            x.selected,
            x.window,
            x.gates,
            x.config,
            cu_seqlens=x.cu_seqlens,
            max_seqlen=x.max_seqlen,
            block_idx=blocks,
            backend=backend,
        )

    return Timed(call, x.leaves(), x.dout)
