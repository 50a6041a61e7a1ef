"""The gated sum of the three branches (paper Eq. 5), forward and backward: launches.

Separately, each branch's backward needs the gradient of its own output, which is the gate times
that of the sum: written three times, read twice each. Here gates act on the probabilities instead,
and every kernel reads the one gradient of the sum. dq of all branches is one tensor: :mod:`.bwd_dq`
writes the compressed branch's and the window's, and the selected branch adds its own.

B batch, T tokens, N compressed blocks, H query heads, K key/value heads, D key size, V value size,
n listed blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from nsa.backends.compiled.common import LOG2E, positive, rows_contiguous
from nsa.backends.compiled.gated.bwd_dq import nsa_gated_bwd_dq
from nsa.backends.compiled.selected.launch import selected_dkv, selected_dq, selected_forward
from nsa.backends.compiled.selected.tiles import default_tiles
from nsa.backends.compiled.window.bounds import TOKENS, Blocks
from nsa.backends.compiled.window.launch import (
    Mix,
    RowStatistics,
    addressable,
    key_gradients,
    launch_options,
    window_forward,
)
from nsa.backends.compiled.window.tiles import Tiles
from nsa.backends.compiled.window.tiles import default_tiles as window_tiles


class Layout(NamedTuple):
    """Geometry, and where packed sequences are."""

    blocks: Blocks
    """What a compressed key stands for."""
    select_block: int
    window: int
    scale: float
    start: Tensor | None = None
    """Packed: int32 ``[T]``, the first token of each token's sequence."""
    cmp_start: Tensor | None = None
    """Packed: int32 ``[T]``, the first compressed block of each token's sequence."""
    sequences: int = 1
    """At most so many packed ones."""
    share: int = 1
    """So many tokens have one list, as of :func:`selected_forward`."""
    q_start: int = 0
    """The position of q's first row; 0 when packed."""
    window_start: int = 0
    """How many keys of the window come before q's first row; 0 when packed."""


class Branches(NamedTuple):
    """A tensor of each branch, in the order of the gates."""

    compressed: Tensor
    selected: Tensor
    window: Tensor


def gated_forward(
    q: Tensor,
    k: Branches,
    v: Branches,
    gates: Tensor,
    out_cmp: Tensor,
    block_idx: Tensor,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The selected branch, the window, and the sum.

    Args:
        q: ``[B, T, H, D]``.
        k, v: ``[B, N, K, D]`` and ``[B, N, K, V]`` of the compressed branch, which are not read,
            then ``[B, S, K, D]`` and ``[B, S, K, V]``, S being ``q_start + T`` and
            ``window_start + T``.
        gates: ``[B, T, H, 3]``.
        out_cmp: ``[B, T, H, V]``.
        block_idx: int32 ``[B, T, K, n]``.

    Returns:
        The sum, out of the selected branch and of the window, ``[B, T, H, V]`` in q's dtype, and
        their lse, fp32 ``[B, T, H]``.
    """
    start, scale = layout.start, layout.scale
    out_slc, lse_slc = selected_forward(
        q,
        k.selected,
        v.selected,
        block_idx,
        start=start,
        select_block=layout.select_block,
        scale=scale,
        q_start=layout.q_start,
        share=layout.share,
        sequences=None if start is None else layout.sequences,
    )
    mix = Mix(gates.contiguous(), out_cmp, out_slc, out=out_slc.new_empty(out_slc.shape))
    out_win, lse_win = window_forward(
        q,
        k.window,
        v.window,
        window=layout.window,
        start=start,
        scale=scale,
        q_start=layout.window_start,
        mix=mix,
    )
    return mix.out, out_slc, out_win, lse_slc, lse_win


def gated_backward(
    dout: Tensor,
    q: Tensor,
    k: Branches,
    v: Branches,
    gates: Tensor,
    out: Branches,
    lse: Branches,
    block_idx: Tensor,
    layout: Layout,
    *,
    gates_in_unit_interval: bool,
    dq_dtype: torch.dtype,
    deterministic: bool = False,
) -> tuple[Tensor, Branches, Branches, Tensor]:
    """Gradients of the sum.

    Args:
        dout: ``[B, T, H, V]``, the gradient of the sum.
        out, lse: of every branch.
        gates_in_unit_interval: that every gate is in 0…1, which saves a product for every score.
        dq_dtype: fp32, or q's dtype.
        deterministic: that every sum has one order, in every run and every batch.

    Returns:
        dq in ``dq_dtype``; dk and dv, in fp32 for the selected branch, else in k's dtype; and the
        gradient of the gates in their dtype.
    """
    B, T, H, D = q.shape
    dq = torch.empty(B, T, H, D, dtype=dq_dtype, device=q.device)
    weighted = not gates_in_unit_interval
    stats = torch.empty(3 if weighted else 2, 3, B, T, H, dtype=torch.float32, device=q.device)
    dgates = torch.empty(B, T, H, 3, dtype=gates.dtype, device=q.device)
    dout = rows_contiguous(dout)
    gated_dq(dout, q, k, v, gates, out, lse, layout, dq, stats, dgates, weighted=weighted)
    rows = [RowStatistics(*stats[:, branch]) for branch in range(3)]
    start, scale = layout.start, layout.scale
    dk_cmp, dv_cmp = key_gradients(
        dout,
        q,
        k.compressed,
        v.compressed,
        rows[0],
        window=max(1, k.compressed.shape[1]),
        start=layout.cmp_start,
        scale=scale,
        q_start=layout.q_start,
        blocks=layout.blocks,
        deterministic=deterministic,
    )
    dk_win, dv_win = key_gradients(
        dout,
        q,
        k.window,
        v.window,
        rows[2],
        window=layout.window,
        start=start,
        scale=scale,
        q_start=layout.window_start,
        deterministic=deterministic,
    )
    chosen: dict[str, Any] = {"start": start, "select_block": layout.select_block, "scale": scale}
    chosen["q_start"] = layout.q_start
    chosen |= {"share": layout.share, "sequences": None if start is None else layout.sequences}
    tiles = default_tiles(
        *(q, v.selected, block_idx, layout.select_block, layout.share), deterministic=deterministic
    )
    if not tiles.dkv.with_dq:
        lse_slc, delta, weight = rows[1]
        of_rows: dict[str, Any] = {"delta": delta, "weight": weight, "dq": dq}
        selected_dq(dout, q, k.selected, v.selected, lse_slc, block_idx, **chosen, **of_rows)
    dk_slc, dv_slc = selected_dkv(
        dout,
        q,
        k.selected,
        v.selected,
        rows[1].lse,
        rows[1].delta,
        block_idx,
        **chosen,
        weight=rows[1].weight,
        dq=dq if tiles.dkv.with_dq else None,
        tiles=tiles.dkv,
    )
    return dq, Branches(dk_cmp, dk_slc, dk_win), Branches(dv_cmp, dv_slc, dv_win), dgates


def gated_dq(
    dout: Tensor,
    q: Tensor,
    k: Branches,
    v: Branches,
    gates: Tensor,
    out: Branches,
    lse: Branches,
    layout: Layout,
    dq: Tensor,
    stats: Tensor,
    dgates: Tensor,
    *,
    weighted: bool,
    tiles: Tiles | None = None,
) -> None:
    """Writes dq of two branches, ``dgates`` and ``stats``, the row statistics of all branches;
    ``tiles`` override the table's."""
    B, T, H = q.shape[:3]
    K = v.window.shape[2]
    if stats.numel() == 0:
        return
    q, scale, sign = positive(q, layout.scale)
    q, k, v = addressable(q), Branches(*map(addressable, k)), Branches(*map(addressable, v))
    tiles = tiles or window_tiles(q, v.window).bwd_dq
    before = layout.window_start
    C, options = launch_options(q, k.window, v.window, tiles, layout.start, before, TOKENS)
    options |= {"LEAD": layout.blocks.block - 1, "STRIDE": layout.blocks.stride}
    with torch.cuda.device_of(q):
        nsa_gated_bwd_dq[(triton.cdiv(T, C.TOKENS) * B * K,)](
            q,
            k.compressed,
            v.compressed,
            k.window,
            v.window,
            gates.contiguous(),
            tuple(x.contiguous() for x in out),
            tuple(x.contiguous() for x in lse),
            dout,
            dq,
            dgates,
            stats,
            (layout.cmp_start, layout.blocks.first),
            (layout.start, None),
            B * T * H,
            T,
            max(1, k.compressed.shape[1]),
            K,
            min(layout.window, before + T),
            layout.q_start,
            before,
            scale * sign,
            scale * LOG2E,
            q.stride(),
            k.compressed.stride(),
            v.compressed.stride(),
            k.window.stride(),
            v.window.stride(),
            dout.stride(),
            WEIGHTED=weighted,
            **options,
        )
