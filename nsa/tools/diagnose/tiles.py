"""Whether the tiles of ``compiled``'s kernels were measured on a GPU like those of this machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from nsa.backends.compiled.select import tiles as select
from nsa.backends.compiled.selected import tiles as selected
from nsa.backends.compiled.tiling import UNTUNED
from nsa.backends.compiled.window import tiles as window
from nsa.tools.common.machine import Gpu

HEADS = {"64/4:128": (128, 128, 16), "64/4:192/128": (192, 128, 16), "12/2:64": (64, 64, 6)}
"""Layouts, and their D, V and G."""
_LEAST_CAPABILITY = (8, 0)
TUNE = "python -m nsa.tools.bench --tune --heads"
"""The command that finds tiles; the layout of heads follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileRow:
    """The tiles that heads have on a GPU, in bf16: what they were measured on, or "untuned"."""

    gpu: str
    heads: str
    window_and_compressed: str
    selection: str
    selected: str

    @property
    def tuned(self) -> bool:
        return UNTUNED not in (self.window_and_compressed, self.selection, self.selected)


def tile_rows(gpus: Iterable[Gpu]) -> tuple[TileRow, ...]:
    """Of each kind of GPU, those of common heads."""
    found: dict[tuple[str, str], TileRow] = {}
    for gpu in gpus:
        major, minor = map(int, gpu.capability.split("."))
        capability = major, minor
        for heads, (D, V, G) in HEADS.items() if capability >= _LEAST_CAPABILITY else ():
            found[gpu.name, heads] = TileRow(
                gpu=gpu.name,
                heads=heads,
                window_and_compressed=window.tile_row(torch.bfloat16, D, V, capability).measured,
                selection=select.tile_row(torch.bfloat16, D, G, capability).measured,
                selected=selected.tile_row(D, V, G, torch.bfloat16, capability).measured,
            )
    return tuple(found.values())
