"""The launches of one problem that have tiles, each as a call of its tiles.

B batch, T tokens, H query heads, D key size, V value size; G heads per group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from nsa.backends.compiled.gated.launch import Branches, Layout, gated_dq
from nsa.backends.compiled.select import tiles as select
from nsa.backends.compiled.select.launch import select_forward
from nsa.backends.compiled.selected import tiles as selected
from nsa.backends.compiled.selected.launch import selected_dkv, selected_dq, selected_forward
from nsa.backends.compiled.tiling import capability_of
from nsa.backends.compiled.window import tiles as window_tiles
from nsa.backends.compiled.window.bounds import TOKENS, Blocks
from nsa.backends.compiled.window.launch import (
    Mix,
    RowStatistics,
    key_gradients,
    window_forward,
)
from nsa.core.build import on_meta
from nsa.testing.inputs import Inputs
from nsa.tools.bench.cases import Data
from nsa.tools.bench.tune.candidates import (
    select_candidates,
    selected_candidates,
    window_candidates,
)
from nsa.tools.bench.tune.search import Launch

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Calls:
    """What a training step launches on some tensors, real or meta, kernel by kernel."""

    inputs: Inputs
    lse_select: Tensor
    """``[B, T, H]`` of the compressed branch, which the selection is given."""
    out: tuple[Tensor, ...] = ()
    """``[B, T, H, V]`` of the compressed branch, the selected one and the window."""
    lse: tuple[Tensor, ...] = ()
    """``[B, T, H]``, likewise."""
    delta: tuple[Tensor, ...] = ()
    """``[B, T, H]``: the sum of ``dout * out``."""

    @classmethod
    def of(cls, data: Data) -> Calls:
        """With today's tiles for what is no more than an input here."""
        x = data.inputs
        calls = cls(x.with_leaves(tuple(leaf.detach() for leaf in x.leaves())), data.lse)
        chosen = calls.forward(None)
        compressed, window = calls.compressed(None), calls.window(None)
        out, lse = zip(compressed, chosen, window, strict=True)
        delta = tuple((x.dout.float() * y.float()).sum(-1) for y in out)
        return replace(calls, out=out, lse=lse, delta=delta)

    def on_meta(self) -> Calls:
        """The same calls, whose kernels can be built."""
        x = self.inputs
        leaves = tuple(map(on_meta, x.leaves()))
        given = {"dout": on_meta(x.dout), "block_idx": on_meta(x.block_idx)}
        rest = (tuple(map(on_meta, y)) for y in (self.out, self.lse, self.delta))
        return Calls(replace(x.with_leaves(leaves), **given), on_meta(self.lse_select), *rest)

    @cached_property
    def blocks(self) -> Blocks:
        return Blocks(self.inputs.config.compress_block, self.inputs.config.compress_stride)

    @cached_property
    def common(self) -> dict[str, Any]:
        return {"start": None, "scale": self.inputs.config.softmax_scale}

    @cached_property
    def chosen(self) -> dict[str, Any]:
        """Of the selected branch."""
        x, config = self.inputs, self.inputs.config
        share = selected.shared_tokens(x.q, x.selected.v, config.select_share)
        return {**self.common, "select_block": config.select_block, "share": share}

    @property
    def lists(self) -> Tensor:
        assert self.inputs.block_idx is not None
        return self.inputs.block_idx

    @property
    def keys(self) -> int:
        return max(1, self.inputs.compressed.k.shape[1])

    def compressed(self, tiles: window_tiles.Tiles | None) -> Results:
        x = self.inputs
        options = {**self.common, "window": self.keys, "blocks": self.blocks, "tiles": tiles}
        return window_forward(x.q, *x.compressed, **options)

    def window(self, tiles: window_tiles.Tiles | None, mix: Mix | None = None) -> Results:
        x = self.inputs
        options = {**self.common, "window": x.config.window, "tiles": tiles, "mix": mix}
        return window_forward(x.q, *x.window, **options)

    def fwd(self, tiles: window_tiles.Tiles) -> Results:
        """The compressed branch, and the window with the gated sum."""
        mix = Mix(
            self.inputs.gates.contiguous(), self.out[0], self.out[1], torch.empty_like(self.out[2])
        )
        return *self.compressed(tiles), *self.window(tiles, mix), mix.out

    def bwd_dq(self, tiles: window_tiles.Tiles) -> Results:
        """dq of both branches, and the gates' gradient."""
        x, config = self.inputs, self.inputs.config
        k, v = map(Branches._make, zip(x.compressed, x.selected, x.window, strict=True))
        out, lse = Branches(*self.out), Branches(*self.lse)
        layout = Layout(self.blocks, config.select_block, config.window, config.softmax_scale)
        dtype = selected.dq_dtype(x.q.dtype, config.head_dim, config.dv, config.group)
        dq, dgates = torch.empty_like(x.q, dtype=dtype), torch.empty_like(x.gates)
        stats = lse.window.new_empty(2, 3, *lse.window.shape)
        made = dq, stats, dgates
        gated_dq(x.dout, x.q, k, v, x.gates, out, lse, layout, *made, weighted=False, tiles=tiles)
        return made

    def bwd_dkv(self, tiles: window_tiles.Tiles) -> Results:
        """dk and dv of both branches."""
        x = self.inputs
        rows = [RowStatistics(*both) for both in zip(self.lse, self.delta, strict=True)]
        options = {**self.common, "tiles": tiles, "window": self.keys, "blocks": self.blocks}
        compressed = key_gradients(x.dout, x.q, *x.compressed, rows[0], **options)
        options |= {"window": x.config.window, "blocks": TOKENS}
        return *compressed, *key_gradients(x.dout, x.q, *x.window, rows[2], **options)

    def select(self, tiles: select.SelectTiles) -> Results:
        x = self.inputs
        return (select_forward(x.q, x.compressed.k, self.lse_select, x.config, tiles=tiles),)

    def forward(self, tiles: selected.QueryTiles | None) -> Results:
        """The selected branch, with the unions of its lists."""
        x = self.inputs
        return selected_forward(x.q, *x.selected, self.lists, **self.chosen, tiles=tiles)

    def dq(self, tiles: selected.QueryTiles) -> Results:
        x, config = self.inputs, self.inputs.config
        dtype = selected.dq_dtype(x.q.dtype, config.head_dim, config.dv, config.group)
        dq = torch.zeros_like(x.q, dtype=dtype)
        options = {**self.chosen, "delta": self.delta[1], "dq": dq, "tiles": tiles}
        return (selected_dq(x.dout, x.q, *x.selected, self.lse[1], self.lists, **options)[0],)

    def dkv(self, tiles: selected.KeyTiles) -> Results:
        """dk and dv, with the inverse index, and dq if the tiles say so."""
        x = self.inputs
        dq = torch.zeros_like(x.q, dtype=torch.float32) if tiles.with_dq else None
        options = {**self.chosen, "dq": dq, "tiles": tiles}
        rows = self.lse[1], self.delta[1]
        made = selected_dkv(x.dout, x.q, *x.selected, *rows, self.lists, **options)
        return made if dq is None else (*made, dq)


@dataclass(frozen=True, slots=True)
class Table:
    """One of the tables of tiles, and its launches."""

    file: str
    """Under nsa/backends/compiled."""
    into: str
    """Its name there."""
    row: Any
    """Today's row."""
    launches: tuple[Launch, ...]


def tables(data: Data) -> tuple[Table, ...]:
    """All tables, for the GPU that the data are on."""
    calls = Calls.of(data)
    meta, x = calls.on_meta(), calls.inputs
    config, dtype, capability = x.config, x.q.dtype, capability_of(x.q.device)
    D, V, G = config.head_dim, config.dv, config.group
    T, n = x.q.shape[1], calls.lists.shape[3]

    def launch(name: str, call: str, candidates: Any, *, counts: bool = True) -> Launch:
        run, rehearse = getattr(calls, call), getattr(meta, call)
        return Launch(name=name, call=run, rehearse=rehearse, candidates=candidates, counts=counts)

    of_window = partial(window_candidates, dtype=dtype, D=D, V=V, capability=capability)
    select_row = select.tile_row(dtype, D, G, capability)
    num_blocks = -(-T // config.select_block)
    fp8 = config.score_dtype == "fp8"
    fit_select = partial(
        select.select_tiles, dtype, G, D, n, num_blocks, fp8=fp8, capability=capability
    )
    row = selected.tile_row(D, V, G, dtype, capability)
    fit = partial(
        selected.tiles_for,
        *(D, V, G),
        width=n,
        select_block=config.select_block,
        dtype=dtype,
        length=T,
        share=calls.chosen["share"],
        capability=capability,
    )
    of_selected = partial(selected_candidates, row=row, fit=fit)
    with_dq = fit(row=row).dkv.with_dq
    return (
        Table(
            "window/tiles.py",
            "TILES",
            window_tiles.tile_row(dtype, D, V, capability),
            (
                launch("window and compressed, forward", "fwd", of_window("fwd")),
                launch("window and compressed, dq", "bwd_dq", of_window("bwd_dq")),
                launch("window and compressed, dk and dv", "bwd_dkv", of_window("bwd_dkv")),
            ),
        ),
        Table(
            "select/tiles.py",
            "ROWS",
            select_row,
            (launch("selection", "select", select_candidates(select_row, fit_select)),),
        ),
        Table(
            "selected/tiles.py",
            "ROWS",
            row,
            (
                launch("selected, forward", "forward", of_selected("forward")),
                launch("selected, dq", "dq", of_selected("dq"), counts=not with_dq),
                launch(
                    f"selected, dk and dv{' with dq' if with_dq else ''}",
                    "dkv",
                    of_selected("dkv"),
                ),
            ),
        ),
    )
