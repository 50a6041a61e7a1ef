"""Attention over a band of keys, forward and backward: the window (paper §3.3.3) and, with keys
that stand ``stride`` tokens apart, the compressed branch (Eq. 7-8). Launches of its kernels:
:mod:`.band_forward`, :mod:`.band_queries`, :mod:`.band_keys`.

B batch, T query tokens, S keys, H query heads, K key/value heads, G heads per group, D key size,
V value size.

The gradient of q is one kernel, that of k and v another; neither uses atomics, so both are
deterministic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from nsa.backends.compiled.window.bounds import LOG2E, TOKENS, Blocks
from nsa.backends.compiled.window.bwd_dkv import key_gradient
from nsa.backends.compiled.window.bwd_dq import query_gradient
from nsa.backends.compiled.window.fwd import forward
from nsa.backends.compiled.window.tiles import (
    WindowTiles,
    forward_tiles,
    key_gradient_tiles,
    query_gradient_tiles,
)

PROGRAMS = 1024
"""Programs of the kernel for dk and dv that a launch over few keys is split into, about."""


class Mix(NamedTuple):
    """The other two branches, for the gated sum of the three."""

    gates: Tensor
    """``[B, T, H, 3]``"""
    compressed: Tensor
    """``[B, T, H, V]``"""
    selected: Tensor


class Rows(NamedTuple):
    """What the kernel for dk and dv needs of every query row, fp32 ``[B, T, H]``, contiguous."""

    lse: Tensor
    delta: Tensor
    """The sum of ``dout * out``."""
    weight: Tensor | None = None
    """Of the row's probabilities, or None for 1."""


def window_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    start: Tensor | None,
    scale: float,
    q_start: int = 0,
    blocks: Blocks = TOKENS,
    tiles: WindowTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the last ``window`` keys, the query's own included.

    Args:
        q: ``[B, T, H, D]``, fp16, bf16 or fp32; query head h reads key head h // G.
        k, v: ``[B, S, K, D]`` and ``[B, S, K, V]``, q's dtype; S reaches the last query's position.
        window: keys, at least 1.
        start: None for a regular batch; packed (B = 1): int32 ``[T]``, the first key of each
            token's sequence, which does not decrease.
        q_start: number of q's first token; 0 when packed.
        blocks: what a key stands for.
        tiles: overrides :func:`forward_tiles`.

    Returns:
        out ``[B, T, H, V]`` in q's dtype and lse fp32 ``[B, T, H]``, natural log; 0 and −inf for a
        query that sees no block.
    """
    out, lse, _ = _forward(q, k, v, window, start, scale, q_start, blocks, tiles, None)
    return out, lse


def window_and_mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix: Mix,
    *,
    window: int,
    start: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`window_forward` of the window, and ``Σ gate * out`` of the three branches, summed in
    fp32, ``[B, T, H, V]`` in q's dtype: out, lse, sum."""
    return _forward(q, k, v, window, start, scale, 0, TOKENS, None, mix)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    start: Tensor | None,
    scale: float,
    q_start: int,
    blocks: Blocks,
    tiles: WindowTiles | None,
    mix: Mix | None,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, D = q.shape
    K, V = v.shape[2], v.shape[3]
    out = torch.empty(B, T, H, V, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    mixed = out if mix is None else torch.empty_like(out)
    if lse.numel() == 0:
        return out, lse, mixed
    q, scale, _ = positive(q, scale)
    q, k, v = map(addressable, (q, k, v))
    tiles = tiles or forward_tiles(q.dtype, max(D, V))
    shape, options = launch_shape(q, k, v, tiles, start, q_start, blocks)
    others = (out, out) if mix is None else (mix.compressed.contiguous(), mix.selected.contiguous())
    gates = q if mix is None else mix.gates
    with torch.cuda.device_of(q):
        forward[(triton.cdiv(T, shape["TOKENS"]) * B * K,)](
            q,
            k,
            v,
            out,
            lse,
            lse if start is None else start,
            lse if blocks.first is None else blocks.first,
            *others,
            mixed,
            gates,
            T,
            K,
            min(window, k.shape[1]),
            q_start,
            scale,
            scale * LOG2E,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *gates.stride(),
            MIX=mix is not None,
            **shape,
            **options,
        )
    return out, lse, mixed


def window_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    window: int,
    start: Tensor | None,
    scale: float,
    q_start: int = 0,
    blocks: Blocks = TOKENS,
    q_tiles: WindowTiles | None = None,
    k_tiles: WindowTiles | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`window_forward`, whose arguments and results come in unchanged.

    Args:
        dout: ``[B, T, H, V]``, the gradient of ``out``, in its dtype.
        q_tiles, k_tiles: override :func:`query_gradient_tiles` and :func:`key_gradient_tiles`.
        splits: parts of the queries that dk and dv are summed over apart; None chooses.

    Returns:
        dq, dk, dv, shaped like q, k, v and in their dtypes.
    """
    B, T, H, D = q.shape
    S, K, V = k.shape[1], v.shape[2], v.shape[3]
    dq = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    if lse.numel() == 0 or S == 0:
        return dq.zero_(), k.new_zeros(k.shape), v.new_zeros(v.shape)
    out, lse = out.contiguous(), lse.contiguous()
    dout, q, k, v = map(addressable, (dout, q, k, v))
    positive_q, positive_scale, sign = positive(q, scale)
    delta = torch.empty_like(lse)
    tiles = q_tiles or query_gradient_tiles(q.dtype, max(D, V))
    shape, options = launch_shape(q, k, v, tiles, start, q_start, blocks)
    with torch.cuda.device_of(q):
        query_gradient[(triton.cdiv(T, shape["TOKENS"]) * B * K,)](
            positive_q,
            k,
            v,
            out,
            dout,
            lse,
            delta,
            dq,
            lse if start is None else start,
            lse if blocks.first is None else blocks.first,
            T,
            K,
            min(window, S),
            q_start,
            positive_scale * sign,
            positive_scale * LOG2E,
            *positive_q.stride(),
            *k.stride(),
            *v.stride(),
            *dout.stride(),
            **shape,
            **options,
        )
    dk, dv = key_gradients(
        dout,
        q,
        k,
        v,
        Rows(lse, delta),
        window=window,
        start=start,
        scale=scale,
        q_start=q_start,
        blocks=blocks,
        tiles=k_tiles,
        splits=splits,
    )
    return dq, dk, dv


def key_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    *,
    window: int,
    start: Tensor | None,
    scale: float,
    q_start: int = 0,
    blocks: Blocks = TOKENS,
    tiles: WindowTiles | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """dk and dv, of k's and v's dtypes; arguments as of :func:`window_backward`."""
    B, T, _, D = q.shape
    S, K, V = k.shape[1], v.shape[2], v.shape[3]
    assert blocks.first is None or (blocks.seen_from is not None and blocks.seen_until is not None)
    dk = torch.empty(B, S, K, D, dtype=k.dtype, device=q.device)
    dv = torch.empty(B, S, K, V, dtype=v.dtype, device=q.device)
    if q.numel() == 0 or S == 0:
        return dk.zero_(), dv.zero_()
    q, scale, _ = positive(q, scale)
    dout, q, k, v = map(addressable, (dout, q, k, v))
    tiles = tiles or key_gradient_tiles(q.dtype, max(D, V))
    shape, options = launch_shape(q, k, v, tiles, start, q_start, blocks)
    programs = triton.cdiv(S, tiles.keys) * B * K
    if splits is None:
        splits = _splits(programs, min(window * blocks.stride, T), shape["TOKENS"])
    parts = [dk, dv]
    if splits > 1:
        parts = [x.new_empty(splits, *x.shape, dtype=torch.float32) for x in parts]
    lse, weight = rows.lse, rows.weight
    with torch.cuda.device_of(q):
        key_gradient[(programs * splits,)](
            q,
            k,
            v,
            dout,
            lse,
            rows.delta,
            lse if weight is None else weight,
            *parts,
            lse if start is None else start,
            lse if blocks.first is None else blocks.first,
            lse if blocks.seen_from is None else blocks.seen_from,
            lse if blocks.seen_until is None else blocks.seen_until,
            T,
            S,
            K,
            min(window, S),
            q_start,
            splits,
            scale,
            scale * LOG2E,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *dout.stride(),
            SPLIT=splits > 1,
            WEIGHTED=weight is not None,
            **shape,
            **options,
        )
    if splits > 1:
        dk, dv = (x.sum(0).to(dk.dtype) for x in parts)
    return dk, dv


def _splits(programs: int, queries: int, tokens: int) -> int:
    """Parts of the queries of one block of keys: enough programs, each with enough tiles."""
    return max(1, min(PROGRAMS // programs, queries // (tokens * 16)))


def positive(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """q and a scale above 0 with the same scores; q is the new one times the third result."""
    if scale > 0:  # the running maximum is taken before scaling
        return q, scale, 1.0
    return (-q, -scale, -1.0) if scale < 0 else (torch.zeros_like(q), 1.0, 0.0)


def addressable(x: Tensor) -> Tensor:
    """x ``[B, T, H, D]`` itself if offsets within a tile fit in int32, else a copy."""
    reach = 256 * x.stride(1) + x.shape[2] * x.stride(2) + x.shape[3] * x.stride(3)
    return x if reach < 2**31 else x.contiguous()


def launch_shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: WindowTiles,
    start: Tensor | None,
    q_start: int,
    blocks: Blocks,
) -> tuple[dict[str, Any], dict[str, int]]:
    """The constants of a launch, and its options."""
    G, D, V = q.shape[2] // k.shape[2], q.shape[3], v.shape[3]
    strided = blocks[:2] != (1, 1)
    assert k.shape[1] * blocks.stride + blocks.block > q_start + q.shape[1] or start is not None
    assert start is None or q_start == 0
    assert start is None or not strided or blocks.first is not None
    rows = max(tiles.rows, triton.next_power_of_2(G))
    constants = {
        "G": G,
        "D": D,
        "V": V,
        "TOKENS": rows // G,
        "ROWS": rows,
        "KEYS": tiles.keys,
        "DIM": max(16, triton.next_power_of_2(D)),
        "VDIM": max(16, triton.next_power_of_2(V)),
        "LEAD": blocks.block - 1,
        "STRIDE": blocks.stride,
        "STRIDED": strided,
        "PACKED": start is not None,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # tf32: no effect on 16 bits
    }
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    if tiles.maxnreg is not None:
        options["maxnreg"] = tiles.maxnreg
    return constants, options
