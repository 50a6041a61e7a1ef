"""How many columns heads are padded to."""

from __future__ import annotations

import pytest

from nsa.backends.compiled.tiling import head_columns, padded


@pytest.mark.parametrize(
    ("size", "columns"),
    [
        *((1, 16), (16, 16), (24, 32), (40, 48), (64, 64), (72, 80), (80, 80), (96, 96)),
        *((112, 128), (128, 128), (160, 160), (192, 192), (200, 256), (256, 256)),
    ],
)
def test_columns_of_heads(size: int, columns: int) -> None:
    assert head_columns(size) == columns


@pytest.mark.parametrize("least", [16, 32])
def test_no_more_than_two_parts_none_too_small(least: int) -> None:
    for size in range(1, 300):
        columns = head_columns(size, least=least)
        parts = [1 << i for i in range(10) if columns >> i & 1]
        assert len(parts) <= 2
        assert min(parts) >= least
        assert size <= columns <= max(least, padded(size))
    assert (head_columns(80, least=32), head_columns(8, least=32)) == (96, 32)
