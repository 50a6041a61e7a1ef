"""The table of tiles for the kernels of window and compressed branch."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from nsa import NSAConfig
from nsa.backends.compiled.window.tiles import FP32, LARGER, TILES, tiles_for


@pytest.mark.parametrize("name", ["paper", "small"])
def test_presets_have_a_row_of_their_own(name: str) -> None:
    config = NSAConfig.preset(name)
    assert (
        tiles_for(torch.bfloat16, config.head_dim, config.dv) is TILES[config.head_dim, config.dv]
    )


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
    assert tiles_for(torch.float16, D, V) is TILES[row]


def test_rows_without_a_head_size() -> None:
    assert tiles_for(torch.bfloat16, 257, 64) is LARGER
    assert {tiles_for(torch.float32, size, size) for size in (8, 128, 300)} == {FP32}


def test_every_row_says_whether_it_was_measured() -> None:
    assert {key: row.tuned for key, row in TILES.items() if row.tuned != "untuned"} == {
        (64, 64): "H100, bf16, G 6",
        **dict.fromkeys(((80, 80), (96, 96), (128, 128), (192, 128)), "H100, bf16, G 16"),
    }
