"""A whole sequence through steps of decode, from caches that are laid out here.

B sequences, T tokens, S of them in a step, L tokens of a page.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.backends.protocol import Decoder
from nsa.config import KV, NSAConfig
from nsa.core.inputs import DecodeInputs
from nsa.testing.inputs import Inputs
from nsa.testing.parity import ParityRow
from nsa.testing.selection import list_faults
from nsa.testing.tolerances import expected


def paged(kv: KV, size: int, seed: int = 0) -> tuple[KV, Tensor]:
    """Keys and values ``[B, T, …]`` in pages of ``size`` tokens, in any order among others that are
    nobody's, and the table."""
    B, T = kv.k.shape[:2]
    M = max(1, -(-T // size))
    order = torch.randperm(B * M + 2, generator=torch.Generator().manual_seed(seed))
    table = order[: B * M].view(B, M).to(kv.k.device)

    def pool(x: Tensor) -> Tensor:
        pages = torch.full((B * M + 2, size, *x.shape[2:]), 7.0, dtype=x.dtype, device=x.device)
        padded = x.new_full((B, M * size, *x.shape[2:]), 5.0)
        padded[:, :T] = x
        pages[table.flatten()] = padded.view(B * M, size, *x.shape[2:])
        return pages

    return KV(pool(kv.k), pool(kv.v)), table.int()


def ring(kv: KV, rows: int, end: int) -> KV:
    """What a ring holds after token ``end - 1``."""

    def turned(x: Tensor) -> Tensor:
        out = x.new_full((x.shape[0], rows, *x.shape[2:]), 3.0)
        t = torch.arange(max(0, end - rows), end, device=x.device)
        out[:, t % rows] = x[:, t]
        return out

    return KV(turned(kv.k), turned(kv.v))


def step_inputs(inputs: Inputs, start: int, S: int, *, size: int, spare: int = 3) -> DecodeInputs:
    """The step of tokens ``start … start + S - 1``, the same for every sequence."""
    leaves = inputs.with_leaves(tuple(x.detach() for x in inputs.leaves()))
    here = slice(start, start + S)
    pages, table = paged(leaves.selected, size)
    q = leaves.q[:, here]
    block_idx = leaves.block_idx
    if inputs.config.select_share > 1 and block_idx is None:
        raise ValueError("lists that queries share are given, or come from steps before")
    return DecodeInputs(
        q,
        torch.full((q.shape[0],), start, dtype=torch.int32, device=q.device),
        leaves.gates[:, here],
        leaves.compressed,
        pages,
        table,
        ring(leaves.window, inputs.config.window + S - 1 + spare, start + S),
        None if block_idx is None else block_idx[:, here],
    )


def decode_whole(decoder: Decoder, inputs: Inputs, S: int, *, size: int) -> tuple[Tensor, Tensor]:
    """Every token of a regular batch, S at a time: the output and the lists."""
    T = inputs.q.shape[1]
    outs, lists = [], []
    for start in range(0, T, S):
        step = step_inputs(inputs, start, min(S, T - start), size=size)
        out, listed = decoder.decode_attention(step, inputs.config)
        outs.append(out)
        lists.append(listed)
    return torch.cat(outs, 1), torch.cat(lists, 1)


def random_step(
    config: NSAConfig,
    B: int,
    T: int,
    S: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
) -> DecodeInputs:
    """The last S of T tokens of B sequences: random keys and values in pages of one block, in no
    order; drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    K, H, size = config.num_kv_heads, config.num_heads, config.select_block
    drawn = {"dtype": dtype, "device": device, "generator": generator}

    def keys(*shape: int) -> KV:
        sizes = (config.head_dim, config.dv)
        return KV(*(torch.randn(*shape, K, each, **drawn) for each in sizes))  # type: ignore[call-overload]

    pages = -(-T // size)
    order = torch.randperm(B * pages, generator=torch.Generator().manual_seed(seed))
    return DecodeInputs(
        torch.randn(B, S, H, config.head_dim, **drawn),  # type: ignore[call-overload]
        torch.full((B,), T - S, dtype=torch.int32, device=device),
        torch.rand(B, S, H, 3, **drawn),  # type: ignore[call-overload]
        keys(B, config.num_compressed(T)),
        keys(B * pages, size),
        order.view(B, pages).to(device, torch.int32),
        keys(B, config.window + S - 1),
    )


def decode_parity(decoder: Decoder, inputs: Inputs, S: int = 8) -> tuple[ParityRow, list[str]]:
    """Hold steps of decode to the oracle's whole sequence: the output where ``inputs.block_idx`` is
    given, and what is wrong with the lists where it is not."""
    size = 2 * inputs.config.select_block
    out, _ = decode_whole(decoder, inputs, S, size=size)
    want = expected(inputs)["out"]
    row = ParityRow("decode", want.error(out), want.bound)
    config = replace(inputs.config, select_share=1)  # what queries share is a cache's to keep
    free = replace(inputs, block_idx=None, config=config)
    _, lists = decode_whole(decoder, free, S, size=size)
    lists = F.pad(lists, (0, config.num_selected - lists.shape[-1]), value=-1)
    return row, list_faults(lists, free)
