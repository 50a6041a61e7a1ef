"""A row of a padded batch gives exactly what it gives alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa import NSACache, NSAConfig, NSAttention, Padding, ShapeError

DIM = 12
CONFIG = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    compress_block=4,
    compress_stride=2,
    select_block=8,
    num_selected=4,
    window=7,
)


@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=3),
    behind=st.integers(0, 3),
)
def test_packed_and_cached_rows_are_rows_alone(rows: list[tuple[int, int]], behind: int) -> None:
    torch.manual_seed(0)
    layer = NSAttention(DIM, CONFIG, backend="sdpa", dtype=torch.float64)
    T = max(before + length for before, length in rows) + behind
    column = torch.arange(T)
    mask = torch.stack([(column >= a) & (column < a + n) for a, n in rows]).long()
    x = torch.randn(len(rows), T, DIM, dtype=torch.float64)
    padding = Padding(mask)
    assert padding.lengths == [n for _, n in rows]
    with torch.no_grad():
        packed = layer(
            padding.pack(x), cu_seqlens=padding.cu_seqlens, max_seqlen=padding.max_seqlen
        )
        out = padding.unpack(packed)
        assert out.shape == x.shape
        assert not out[mask == 0].any()
        cached = None
        if padding.max_seqlen:
            cache = NSACache(
                CONFIG,
                num_layers=1,
                batch_size=len(rows),
                max_length=max(1, T),
                dtype=torch.float64,
            )
            cached = layer(padding.align_left(x), cache=cache.layers[0], counts=padding.lengths)
        for b, (a, n) in enumerate(rows):
            alone = layer(x[b : b + 1, a : a + n])[0]
            torch.testing.assert_close(out[b, a : a + n], alone, rtol=0, atol=1e-12)
            assert torch.equal(padding.positions[b, a : a + n], torch.arange(n))
            if cached is not None:
                torch.testing.assert_close(cached[b, :n], alone, rtol=0, atol=1e-12)


def test_refused() -> None:
    with pytest.raises(ShapeError, match=r"mask: expected a tensor \[B, T\], got \[3\]"):
        Padding(torch.ones(3))
    with pytest.raises(ShapeError, match="mask: .* side by side, got a hole in 1"):
        Padding(torch.tensor([[0, 1, 1], [1, 0, 1]]))
    padding = Padding(torch.tensor([[0, 1, 1]]))
    with pytest.raises(ShapeError, match=r"expected \[1, 3, …\], got \[1, 2, 5\]"):
        padding.pack(torch.ones(1, 2, 5))
    with pytest.raises(ShapeError, match=r"expected \[1, 2, …\], got \[1, 3, 5\]"):
        padding.unpack(torch.ones(1, 3, 5))
