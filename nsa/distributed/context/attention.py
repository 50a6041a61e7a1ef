"""Attention of one rank's rows over keys of all ranks.

What moves, in this order: rows next to the segments (those that φ's last blocks and the window's
first rows read), compressed keys and values of all ranks, selected keys and values of all ranks.
The last is most of the bytes; it goes on while the compressed branch and selection are computed,
which takes longer than the transfer wherever links are as fast as NVLink
(docs/context_parallel.md). So all key/value heads travel at once: head by head there would be
nothing left to hide, and kernels would run on a fraction of the heads.

B batch, T rows of the whole batch, N compressed blocks of it, H query heads, K key/value heads,
D key size, V value size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nsa.attention import Search, read, search
from nsa.backends.dispatch import Resolution
from nsa.cached_attention import Projected
from nsa.config import KV, NSAConfig
from nsa.core import validate
from nsa.core.inputs import AttentionInputs
from nsa.distributed.context.layout import Layout
from nsa.distributed.context.plan import Call, Plan, plan_of
from nsa.distributed.context.transfers import ExchangeRows, GatherRows

Phi = Callable[[Tensor, Tensor, "Tensor | None"], tuple[Tensor, Tensor]]
"""φ of keys and of values ``[B, T, K, …]``, with ``cu_seqlens``."""


def attend(
    layout: Layout,
    projected: Projected,
    phi: Phi,
    chosen: Resolution,
    config: NSAConfig,
    *,
    gates_in_unit_interval: bool = False,
    check: bool = False,
    nvtx: bool = False,
) -> Tensor:
    """φ and the gated sum of the branches.

    Args:
        layout: whose rows are whose.
        projected: of this rank's rows.
        phi: compresses keys and values.
        chosen, config: what runs, and what is computed.
        gates_in_unit_interval, nvtx: as of :func:`nsa.attention.run`.
        check: whether values are looked at, as ``NSA_CHECK=1`` asks.

    Returns:
        ``[B, rows, H, V]``.
    """
    q, tokens, selected, window, gates = projected
    plan = plan_of(layout, config)
    halos = _halos(layout, plan, tokens, window)
    compressed = _compress(layout, plan, tokens, halos, phi, q.dtype)
    blocks, keys = GatherRows(plan.blocks, layout.group), GatherRows(layout.parts, layout.group)
    sent_blocks = blocks.send(*compressed)
    sent_keys = keys.send(*selected)
    compressed = KV(*blocks.receive(sent_blocks))
    calls: list[tuple[AttentionInputs, Search]] = []
    for call, q_call, gates_call in zip(
        plan.calls, _by_call(q, plan), _by_call(gates, plan), strict=True
    ):
        halo = halos[call.halo]
        near = KV(*(_window_keys(x, call, y) for x, y in zip(window, halo, strict=True)))
        inputs = AttentionInputs(
            q_call,
            KV(*(_rows(x, call.blocks) for x in compressed)),
            near,  # until those of all ranks are here
            near,
            gates_call,
            *_packing(layout, call, q.device),
            q_start=call.q_start,
            window_start=call.window_start,
        )
        calls.append((inputs, search(chosen, inputs, config, nvtx=nvtx)))
    selected = KV(*keys.receive(sent_keys))
    outs = []
    for call, (given, found) in zip(plan.calls, calls, strict=True):
        inputs = given._replace(selected=KV(*(_rows(x, call.keys) for x in selected)))
        if check:
            validate.check_values(inputs, config)
        unit = gates_in_unit_interval
        outs.append(read(chosen, inputs, found, config, gates_in_unit_interval=unit, nvtx=nvtx))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _halos(layout: Layout, plan: Plan, tokens: KV, window: KV) -> list[KV]:
    """The rows after each segment that φ reads, then those before each that the window reads."""
    if plan.exchange is None:
        return [KV(*(x[:, :0] for x in tokens))] * (2 * len(plan.phi_inputs))
    transfer = ExchangeRows(plan.exchange, layout.group)
    found = transfer.receive(transfer.send(*tokens, *window))
    return [KV(*found[i : i + 2]) for i in range(0, len(found), 2)]


def _compress(
    layout: Layout, plan: Plan, tokens: KV, halos: list[KV], phi: Phi, dtype: torch.dtype
) -> KV:
    """The blocks that begin in this rank's segments, in their order: ``[B, blocks, K, …]``."""
    streams = [
        KV(*(torch.cat([x[:, given.rows], y], dim=1) for x, y in zip(tokens, halo, strict=True)))
        for given, halo in zip(plan.phi_inputs, halos, strict=False)
    ]
    if layout.packed:
        k, v = (torch.cat(parts, dim=1) for parts in zip(*streams, strict=True))
        lengths = tuple(n for given in plan.phi_inputs for n in given.lengths)
        made = [phi(k, v, layout.cu_seqlens(lengths, k.device))]
        count = sum(given.blocks for given in plan.phi_inputs)
    else:
        made = [phi(k, v, None) for k, v in streams]
        count = None
    k, v = (torch.cat(parts, dim=1)[:, :count].to(dtype) for parts in zip(*made, strict=True))
    return KV(k, v)


def _by_call(x: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """The rows of each call, which stand in order."""
    if len(plan.calls) == 1:
        return (x,)
    return x.split([call.rows.stop - call.rows.start for call in plan.calls], dim=1)


def _rows(x: Tensor, rows: slice) -> Tensor:
    """Without a view, and so without a gradient padded with zeros, where it is all of them."""
    return x if (rows.start, rows.stop) == (0, x.shape[1]) else x[:, rows]


def _window_keys(x: Tensor, call: Call, halo: Tensor) -> Tensor:
    own = _rows(x, call.rows)
    if call.window_start == 0 and call.rows.start > 0:
        return own
    # the first call even without rows: every rank takes part in the exchange's backward
    return torch.cat([halo, own], dim=1)


def _packing(layout: Layout, call: Call, device: torch.device) -> tuple[Tensor | None, int | None]:
    if call.lengths is None:
        return None, None
    return layout.cu_seqlens(call.lengths, device), max(call.lengths)
