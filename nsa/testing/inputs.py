"""Random inputs of any shape, for tests, ``diagnose`` and ``bench``.

B batch, T tokens, N compressed blocks, H query heads, K key/value heads, D key size, V value size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nsa.config import KV, NSAConfig
from nsa.core.inputs import BRANCHES, AttentionInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The arguments of :func:`nsa.nsa_attention`, and an output gradient to go with them."""

    q: Tensor
    compressed: KV
    selected: KV
    window: KV
    gates: Tensor
    dout: Tensor
    """``[B, T, H, V]``, the gradient of the output."""
    config: NSAConfig
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    block_idx: Tensor | None = None

    NAMES = ("q", *(f"{branch}.{part}" for branch in BRANCHES for part in "kv"), "gates")
    """Names of :meth:`leaves`, in order."""

    def leaves(self) -> tuple[Tensor, ...]:
        """Every tensor that gets a gradient."""
        return self.record.differentiable

    @property
    def record(self) -> AttentionInputs:
        """What a backend is given."""
        kvs = (self.compressed, self.selected, self.window)
        packing = (self.cu_seqlens, self.max_seqlen)
        return AttentionInputs(self.q, *kvs, self.gates, *packing, self.block_idx)

    def with_leaves(self, leaves: tuple[Tensor, ...]) -> Inputs:
        """The same problem over other tensors, in the order of :meth:`leaves`."""
        q, ck, cv, sk, sv, wk, wv, gates = leaves
        return replace(
            self, q=q, gates=gates, compressed=KV(ck, cv), selected=KV(sk, sv), window=KV(wk, wv)
        )

    def attend(self, attention: Callable[..., Tensor], **options: Any) -> Tensor:
        """Call :func:`nsa.nsa_attention`, or a function that takes the same, on this problem."""
        kvs = (self.compressed, self.selected, self.window)
        return attention(
            self.q,
            *kvs,
            self.gates,
            self.config,
            cu_seqlens=self.cu_seqlens,
            max_seqlen=self.max_seqlen,
            block_idx=self.block_idx,
            **options,
        )

    def branch(self, branch: str) -> tuple[Any, ...]:
        """The arguments of a step of that name; the block list must be given."""
        blocks = (self.block_idx,) if branch == "selected" else ()
        return (self.q, *getattr(self, branch), *blocks, self.config, self.cu_seqlens)

    def cast(self, dtype: torch.dtype) -> Inputs:
        """Fresh leaves in another dtype, each ready for a gradient."""
        leaves = tuple(x.detach().to(dtype).requires_grad_() for x in self.leaves())
        return replace(self.with_leaves(leaves), dout=self.dout.to(dtype))


def make_inputs(
    config: NSAConfig,
    *,
    length: int | None = None,
    batch: int = 1,
    lengths: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    surplus: bool = False,
    native: bool = False,
) -> Inputs:
    """Normally distributed inputs, uniform gates; the same numbers on every device.

    Args:
        config: heads, sizes, blocks.
        length: T of a regular batch of ``batch`` rows, in tokens.
        lengths: the sequences of a packed batch, instead of ``length``; zeros are legal.
        surplus: packed only: fill the compressed rows past the last block with NaN.
        native: draw in the dtype on the device: fast at any length, other numbers on each.
    """
    if (length is None) == (lengths is None):
        raise ValueError("expected either length or lengths, got both or neither")
    cu_seqlens = max_seqlen = None
    if lengths is not None:
        length, batch = sum(lengths), 1
        ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        cu_seqlens, max_seqlen = ends.to(device), max(lengths)
        used = sum(config.num_compressed(n) for n in lengths)
        rows = length // config.compress_stride
    else:
        assert length is not None
        used = rows = config.num_compressed(length)
    drawn: dict[str, Any] = {"dtype": dtype, "device": device}
    if not native:
        drawn = {"dtype": torch.float64, "device": "cpu"}
    drawn["generator"] = torch.Generator(drawn["device"]).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, **drawn)

    def finish(x: Tensor) -> Tensor:
        return x.to(device=device, dtype=dtype).requires_grad_()

    H, K, D, V = config.num_heads, config.num_kv_heads, config.head_dim, config.dv
    compressed = [normal(batch, rows, K, D), normal(batch, rows, K, V)]
    if surplus:
        for x in compressed:
            x[:, used:] = float("nan")
    gates = torch.rand(batch, length, H, 3, **drawn)
    return Inputs(
        q=finish(normal(batch, length, H, D)),
        compressed=KV(*map(finish, compressed)),
        selected=KV(finish(normal(batch, length, K, D)), finish(normal(batch, length, K, V))),
        window=KV(finish(normal(batch, length, K, D)), finish(normal(batch, length, K, V))),
        gates=finish(gates),
        dout=normal(batch, length, H, V).to(device=device, dtype=dtype),
        config=config,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
    )


def random_blocks(inputs: Inputs, width: int, seed: int = 0) -> Tensor:
    """Any legal list of that width: blocks past the query and rows without a visible token too.

    Returns:
        int32 ``[B, T, K, width]``, strictly ascending, then −1.
    """
    config, q = inputs.config, inputs.q
    B, T = q.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    if inputs.cu_seqlens is None:
        per_token = torch.full((T,), T)
    else:
        lengths = inputs.cu_seqlens.cpu().long().diff()
        per_token = torch.repeat_interleave(lengths, lengths)
    blocks_T = -(-per_token // config.select_block)
    J = max(1, int(blocks_T.max()) if T else 1)
    order = torch.rand(B, T, config.num_kv_heads, J, generator=generator)
    order = order.masked_fill(torch.arange(J) >= blocks_T[:, None, None], 2.0)
    drawn = order.argsort(-1)[..., :width]
    count = torch.randint(0, width + 1, (B, T, config.num_kv_heads, 1), generator=generator)
    keep = (torch.arange(drawn.shape[-1]) < count) & (order.gather(-1, drawn) < 2.0)
    ascending = drawn.masked_fill(~keep, J).sort(-1).values
    listed = ascending.masked_fill(ascending == J, -1)
    listed = torch.nn.functional.pad(listed, (0, width - listed.shape[-1]), value=-1)
    return listed.to(device=q.device, dtype=torch.int32)
