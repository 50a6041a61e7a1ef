"""Rotating by cosines and sines that are given, in place of the layer's own RoPE."""

import re
from dataclasses import replace

import pytest
import torch

from nsa import NSACache, NSAttention, ShapeError, module
from nsa.core.rope import Angles, rope_angles
from tests.support.layers import CONFIG, DIM

T, THETA = 23, 500.0
ROTATED = replace(CONFIG, rope_theta=THETA)


def layers():
    """One with a RoPE of its own, and the same without."""
    torch.manual_seed(0)
    own = NSAttention(DIM, ROTATED, backend="sdpa", dtype=torch.float64)
    other = NSAttention(DIM, replace(ROTATED, rope_theta=None), backend="sdpa", dtype=torch.float64)
    other.load_state_dict(own.state_dict())
    return own, other


def angles_at(positions):
    return rope_angles(positions, ROTATED.head_dim, THETA, torch.float64)


def test_given_angles_are_the_layers_own():
    own, other = layers()
    x = torch.randn(2, T, DIM, dtype=torch.float64)
    expected, plain = own(x), angles_at(torch.arange(T))
    rows = angles_at(torch.arange(T).expand(2, T))
    for given in (plain, rows):
        assert torch.equal(other(x, angles=given), expected)
        assert torch.equal(own(x, angles=given), expected)
    assert not torch.allclose(own(x, angles=Angles(*(a.flip(0) for a in plain))), expected)
    assert not torch.allclose(other(x), expected)


def test_in_the_layers_own_graph(monkeypatch):
    own, other = layers()
    monkeypatch.setattr(module, "compiles_itself", lambda chosen, device: True)
    monkeypatch.setattr(module, "_ATTEND_COMPILED", NSAttention._attend)
    x = torch.randn(2, T, DIM, dtype=torch.float64)
    assert torch.equal(other(x, angles=angles_at(torch.arange(T))), own(x))


def test_packed_and_with_a_cache():
    own, other = layers()
    x = torch.randn(1, T, DIM, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 9, T], dtype=torch.int32)
    given = angles_at(torch.cat([torch.arange(9), torch.arange(T - 9)]))
    expected = own(x, cu_seqlens=cu_seqlens)
    assert torch.equal(other(x, cu_seqlens=cu_seqlens, angles=given), expected)
    cache = NSACache(other.config, num_layers=1, batch_size=1, max_length=T, dtype=torch.float64)
    given, found = angles_at(torch.arange(T)), []
    with torch.no_grad():
        for part in (slice(0, 12), slice(12, T)):
            angles = Angles(*(a[part] for a in given))
            found.append(other(x[:, part], cache=cache.layers[0], angles=angles))
        torch.testing.assert_close(torch.cat(found, 1), own(x))


def test_angles_of_other_shapes_are_refused():
    _, layer = layers()
    x, (cos, sin) = torch.randn(2, T, DIM, dtype=torch.float64), angles_at(torch.arange(T))
    half = ROTATED.head_dim // 2
    expected = re.escape(f"expected [{T}, 1, {half}] or [2, {T}, 1, {half}], got")
    for problem in (cos[:-1], cos[None], cos.squeeze(1), cos[..., :-1]):
        with pytest.raises(ShapeError, match=f"angles.cos: {expected}"):
            layer(x, angles=Angles(problem, sin))
        with pytest.raises(ShapeError, match=f"angles.sin: {expected}"):
            layer(x, angles=Angles(cos, problem))
