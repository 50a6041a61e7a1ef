"""Steps of decode whose sequences are known in full, and the rules that their results obey."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsa import NSAConfig, reference
from nsa.config import KV
from nsa.core.inputs import DecodeInputs
from nsa.testing import Inputs, expected, make_inputs
from nsa.testing.selection import _sequence_faults


@dataclass
class Step:
    """A step of sequences that are known in full, and the cache as it is then."""

    sequences: list[Inputs]
    """Each to the end of the step."""
    inputs: DecodeInputs
    config: NSAConfig

    def faults(self, lists: Tensor) -> list[str]:
        """The acceptance rule of :func:`nsa.testing.selection_faults`."""
        found = []
        S = lists.shape[1]
        for b, x in enumerate(self.sequences):
            q, k = x.q.detach(), x.compressed.k.detach()
            chosen = reference.select_blocks(q, k, self.config)
            chosen[:, -S:] = lists[b]
            found += _sequence_faults(q, k, chosen, self.config)
        return found

    def check(self, out: Tensor, lists: Tensor) -> None:
        """Holds the output, with the lists that were read, to the accuracy rule."""
        S = lists.shape[1]
        for b, x in enumerate(self.sequences):
            T = x.q.shape[1]
            blocks = lists.new_full((1, T, *lists.shape[2:]), -1)
            blocks[:, -S:] = lists[b]
            gates = x.gates.detach().clone()
            gates[:, :-S] = 0.0  # nothing but the step's rows counts
            want = expected(replace(x, gates=gates.requires_grad_(), block_idx=blocks))["out"]
            found = torch.zeros_like(want.truth)
            found[:, -S:] = out[b]
            assert want.error(found) <= want.bound, f"{b}: {want.error(found)} > {want.bound}"


def make_step(
    config: NSAConfig,
    lengths: tuple[int, ...],
    S: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    page_blocks: int = 1,
    surplus: int = 3,
) -> Step:
    """Sequences of ``lengths`` tokens before the step; all that means nothing is no number.

    Pages are in no order, and there is room for ``surplus`` more blocks, pages and ring rows.
    """
    generator = torch.Generator().manual_seed(sum(lengths))
    sequences = [
        make_inputs(config, length=length + S, dtype=dtype, seed=7 * b + length)
        for b, length in enumerate(lengths)
    ]
    L, K, B = page_blocks * config.select_block, config.num_kv_heads, len(lengths)
    pages = -(-max(x.q.shape[1] for x in sequences) // L) + surplus
    N = max(x.compressed.k.shape[1] for x in sequences) + surplus
    R = config.window + S - 1 + surplus

    def nowhere(*size: int) -> KV:
        k = torch.full((*size, K, config.head_dim), float("nan"), dtype=dtype)
        return KV(k, torch.full((*size, K, config.dv), float("nan"), dtype=dtype))

    compressed, pool, ring = nowhere(B, N), nowhere(B * pages + 1, L), nowhere(B, R)
    free = torch.randperm(B * pages + 1, generator=generator, dtype=torch.int32)
    table = torch.full((B, pages), 2**30, dtype=torch.int32)
    for b, x in enumerate(sequences):
        T = x.q.shape[1]
        table[b, : -(-T // L)] = free[b * pages :][: -(-T // L)]
        token = torch.arange(T)
        for part in range(2):
            compressed[part][b, : x.compressed[part].shape[1]] = x.compressed[part][0].detach()
            pool[part][table[b, token // L].long(), token % L] = x.selected[part][0].detach()
            late = token[-R:]
            ring[part][b, late % R] = x.window[part][0, late].detach()
    q = torch.cat([x.q.detach()[:, -S:] for x in sequences])
    gates = torch.cat([x.gates.detach()[:, -S:] for x in sequences])
    position = torch.tensor(lengths, dtype=torch.int32)
    return Step(sequences, DecodeInputs(q, position, gates, compressed, pool, table, ring), config)


def of_sequence(inputs: DecodeInputs, b: int) -> DecodeInputs:
    """The step of one sequence alone; of none past the last."""
    part = slice(b, b + 1)
    return inputs._replace(
        q=inputs.q[part],
        position=inputs.position[part],
        gates=inputs.gates[part],
        compressed=KV(*(x[part] for x in inputs.compressed)),
        page_table=inputs.page_table[part],
        window=KV(*(x[part] for x in inputs.window)),
    )


def on_device(inputs: DecodeInputs, device: str) -> DecodeInputs:
    """A copy there."""

    def move(x: Tensor | KV | None) -> Tensor | KV | None:
        return KV(*map(move, x)) if isinstance(x, KV) else None if x is None else x.to(device)

    return DecodeInputs(*map(move, inputs))
