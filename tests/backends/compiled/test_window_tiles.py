"""The table of tiles for the kernels of window and compressed branch."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from nsa import NSAConfig
from nsa.backends.compiled.tiling import SM_90, UNTUNED
from nsa.backends.compiled.window.tiles import FP32, LARGER, TILES, tile_row, tiles_for


@pytest.mark.parametrize("name", ["paper", "small"])
def test_presets_have_a_row_of_their_own(name: str) -> None:
    config = NSAConfig.preset(name)
    row = TILES[SM_90, config.head_dim, config.dv]
    assert tiles_for(torch.bfloat16, config.head_dim, config.dv) == row


@pytest.mark.parametrize(
    ("D", "V", "row"),
    [
        (8, 6, (64, 64)),
        (64, 72, (128, 128)),
        (128, 64, (128, 128)),
        (128, 192, (256, 256)),
        (256, 40, (256, 256)),
    ],
)
def test_other_heads_take_the_next_larger_row(D: int, V: int, row: tuple[int, int]) -> None:
    found = TILES[(SM_90, *row)]
    assert tiles_for(torch.float16, D, V) == replace(found, measured=UNTUNED)


def test_rows_without_a_head_size() -> None:
    assert tiles_for(torch.bfloat16, 257, 64) == LARGER
    assert {tiles_for(torch.float32, size, size) for size in (8, 128, 300)} == {FP32}


@pytest.mark.parametrize("row", TILES)
def test_rows_fit_the_gpu_that_they_are_for(row: tuple[tuple[int, int], int, int]) -> None:
    capability, D, V = row
    assert tiles_for(torch.bfloat16, D, V, capability) == TILES[row]


def test_a_row_of_another_gpu() -> None:
    """Another GPU's row is no H100's, and an H100's is not measured on another GPU."""
    with pytest.MonkeyPatch.context() as patch:
        row = replace(TILES[SM_90, 64, 64], measured="a card")
        patch.setitem(TILES, ((8, 0), 64, 64), row)
        assert tile_row(torch.bfloat16, 64, 64, (8, 0)) is row
        assert tile_row(torch.bfloat16, 64, 64) is TILES[SM_90, 64, 64]
        assert tile_row(torch.bfloat16, 64, 64, (8, 9)).measured == UNTUNED
        assert tile_row(torch.bfloat16, 48, 48, (8, 0)).measured == UNTUNED


def test_every_row_says_whether_it_was_measured() -> None:
    measured = {key: row.measured for key, row in TILES.items() if row.measured != UNTUNED}
    wide = ((80, 80), (96, 96), (128, 128), (192, 128))
    assert measured == {
        (SM_90, 64, 64): "H100, bf16, G 6",
        **{(SM_90, *heads): "H100, bf16, G 16" for heads in wide},
    }
