"""Sliding-window attention, forward and backward, and the compressed branch, which is the same with
strided keys (:mod:`.bounds`): launches of the kernels of :mod:`.fwd`, :mod:`.bwd_dq` and
:mod:`.bwd_dkv`.

B batch, T query tokens, S keys, H query heads, K key/value heads, G heads per group, D key size,
V value size.

The gradient of q is one kernel, that of k and v another; neither uses atomics, so both are the
same in every run. In how many parts k's and v's are summed depends on the batch, but not where
``deterministic`` is set.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from nsa.backends.compiled import tiling
from nsa.backends.compiled.common import LOG2E, positive
from nsa.backends.compiled.window.bounds import TOKENS, Blocks
from nsa.backends.compiled.window.bwd_dkv import nsa_window_bwd_dkv
from nsa.backends.compiled.window.bwd_dq import nsa_window_bwd_dq
from nsa.backends.compiled.window.fwd import nsa_window_fwd
from nsa.backends.compiled.window.tiles import Constants, Tiles, constants, default_tiles
from nsa.core.operators import BUILDING

PROGRAMS = 1024
"""Programs of the kernel for dk and dv that a launch over few keys is split into, about."""


ROW_PROGRAMS = 256
"""The same for one row of a fixed-length batch, where the batch must not matter: what is summed
apart takes as much memory as there are rows."""


class Mix(NamedTuple):
    """The gated sum of the three branches, which the window's kernel can take too."""

    gates: Tensor
    """``[B, T, H, 3]``, contiguous."""
    compressed: Tensor
    """The branch's out ``[B, T, H, V]``."""
    selected: Tensor
    out: Tensor
    """``Σ gate * out``, summed in fp32, ``[B, T, H, V]``, contiguous; written."""


class RowStatistics(NamedTuple):
    """What the kernels for dk and dv need of every query row, fp32 ``[B, T, H]``, contiguous."""

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
    tiles: Tiles | None = None,
    mix: Mix | None = None,
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
        tiles: overrides those of :func:`default_tiles`.
        mix: also written, if this is the window.

    Returns:
        out ``[B, T, H, V]`` in q's dtype and lse fp32 ``[B, T, H]``, natural log; 0 and −inf for a
        query that sees no block.
    """
    B, T, H, D = q.shape
    K, V = v.shape[2], v.shape[3]
    out = torch.empty(B, T, H, V, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    q, scale, _ = positive(q, scale)
    q, k, v = map(addressable, (q, k, v))
    tiles = tiles or default_tiles(q, v).fwd
    C, options = launch_options(q, k, v, tiles, start, q_start, blocks)
    branches: tuple[Tensor | None, ...] = (None, None, None)
    if mix is not None:
        branches = (mix.compressed.contiguous(), mix.selected.contiguous(), mix.out)
    with torch.cuda.device_of(q):
        nsa_window_fwd[(triton.cdiv(T, C.TOKENS) * B * K,)](
            q,
            k,
            v,
            out,
            lse,
            branches,
            None if mix is None else mix.gates,
            (start, blocks.first),
            T,
            K,
            min(window, k.shape[1]),
            q_start,
            scale,
            scale * LOG2E,
            q.stride(),
            k.stride(),
            v.stride(),
            MIX=mix is not None,
            **options,
        )
    return out, lse


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
    q_tiles: Tiles | None = None,
    k_tiles: Tiles | None = None,
    splits: int | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`window_forward`, whose arguments and results come in unchanged.

    Args:
        dout: ``[B, T, H, V]``, the gradient of ``out``, in its dtype.
        q_tiles, k_tiles: override those of :func:`default_tiles`.
        splits: parts of the queries that dk and dv are summed over apart; None chooses.
        deterministic: that a fixed-length batch has as many as one row of it would have alone.

    Returns:
        dq, dk, dv, shaped like q, k, v and in their dtypes.
    """
    B, T, H, D = q.shape
    S, K = k.shape[1], v.shape[2]
    dq = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    if lse.numel() == 0 or S == 0:
        return dq.zero_(), k.new_zeros(k.shape), v.new_zeros(v.shape)
    out, lse = out.contiguous(), lse.contiguous()
    dout, q, k, v = map(addressable, (dout, q, k, v))
    positive_q, positive_scale, sign = positive(q, scale)
    delta = lse.new_empty(lse.shape)
    tiles = q_tiles or default_tiles(q, v).bwd_dq
    C, options = launch_options(q, k, v, tiles, start, q_start, blocks)
    with torch.cuda.device_of(q):
        nsa_window_bwd_dq[(triton.cdiv(T, C.TOKENS) * B * K,)](
            positive_q,
            k,
            v,
            out,
            dout,
            lse,
            delta,
            dq,
            (start, blocks.first),
            T,
            K,
            min(window, S),
            q_start,
            positive_scale * sign,
            positive_scale * LOG2E,
            positive_q.stride(),
            k.stride(),
            v.stride(),
            dout.stride(),
            **options,
        )
    dk, dv = key_gradients(
        dout,
        q,
        k,
        v,
        RowStatistics(lse, delta),
        window=window,
        start=start,
        scale=scale,
        q_start=q_start,
        blocks=blocks,
        tiles=k_tiles,
        splits=splits,
        deterministic=deterministic,
    )
    return dq, dk, dv


def key_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: RowStatistics,
    *,
    window: int,
    start: Tensor | None,
    scale: float,
    q_start: int = 0,
    blocks: Blocks = TOKENS,
    tiles: Tiles | None = None,
    splits: int | None = None,
    deterministic: bool = False,
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
    tiles = tiles or default_tiles(q, v).bwd_dkv
    C, options = launch_options(q, k, v, tiles, start, q_start, blocks)
    programs = triton.cdiv(S, C.BLOCK_N) * B * K
    if splits is None:
        most = ROW_PROGRAMS * B if deterministic else PROGRAMS
        splits = _splits(most // programs, min(window * blocks.stride, T), C.TOKENS)
    parts = [dk, dv]
    if splits > 1:
        parts = [x.new_empty(splits, *x.shape, dtype=torch.float32) for x in parts]
    with torch.cuda.device_of(q):
        nsa_window_bwd_dkv[(programs * splits,)](
            q,
            k,
            v,
            dout,
            *rows,
            *parts,
            (start, blocks.first),
            (blocks.seen_from, blocks.seen_until),
            T,
            S,
            K,
            min(window, S),
            q_start,
            splits,
            scale,
            scale * LOG2E,
            q.stride(),
            k.stride(),
            v.stride(),
            dout.stride(),
            SPLIT=splits > 1,
            WEIGHTED=rows.weight is not None,
            **options,
        )
    if splits > 1:
        dk, dv = ((x[0] if BUILDING.get() else x.sum(0)).to(dk.dtype) for x in parts)
    return dk, dv


def _splits(wanted: int, queries: int, tokens: int) -> int:
    """Parts of the queries of one block of keys: as many as wanted, each with enough tiles."""
    return max(1, min(wanted, queries // (tokens * 16)))


def addressable(x: Tensor) -> Tensor:
    """x ``[B, T, H, D]`` itself if offsets within a tile fit in int32, else a copy."""
    reach = 256 * x.stride(1) + x.shape[2] * x.stride(2) + x.shape[3] * x.stride(3)
    return x if reach < 2**31 else x.contiguous()


def launch_options(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    start: Tensor | None,
    q_start: int,
    blocks: Blocks,
) -> tuple[Constants, dict[str, Any]]:
    """The constants of a launch, and with them all that it takes by name."""
    assert k.shape[1] * blocks.stride + blocks.block > q_start + q.shape[1] or start is not None
    assert start is None or q_start == 0
    assert start is None or blocks.block == 1 or blocks.first is not None
    C = constants(q, v, tiles, packed=start is not None)
    options = {
        "LEAD": blocks.block - 1,
        "STRIDE": blocks.stride,
        "C": C,
        **tiling.launch_options(tiles.num_warps, tiles.num_stages, tiles.maxnreg),
    }
    return C, options
