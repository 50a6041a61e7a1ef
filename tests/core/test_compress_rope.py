"""φ and RoPE of the library against those of the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nsa import NSAConfig, reference
from nsa.compression import PHI, Compress, block_tokens
from nsa.core.packing import packed_tokens
from nsa.core.rope import apply_rope
from nsa.testing.strategies import Case, cases

CONFIG = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    compress_block=4,
    compress_stride=2,
    select_block=6,
    num_selected=4,
)
COMPRESSIONS = ("mlp", "linear", "mean")
every_compression = pytest.mark.parametrize("compression", COMPRESSIONS)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make_phi(compression: str, config: NSAConfig = CONFIG, size: int | None = None) -> Compress:
    """φ with every parameter drawn anew, biases and position embedding included."""
    config = replace(config, compression=compression)  # type: ignore[arg-type]
    phi = PHI[config.compression](config, size or config.head_dim, dtype=torch.float64)
    with torch.no_grad():
        for seed, parameter in enumerate(phi.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed) / parameter.shape[-1] ** 0.5)
    return phi


def bounds(*lengths: int) -> Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)


def used_rows(config: NSAConfig, cu_seqlens: Tensor | None, length: int) -> int:
    if cu_seqlens is None:
        return config.num_compressed(length)
    return sum(config.num_compressed(n) for n in cu_seqlens.diff().tolist())


def compare(phi: Compress, x: Tensor, cu_seqlens: Tensor | None) -> None:
    """Values and gradients, in the rows that mean something."""
    x = x.requires_grad_()
    names, leaves = zip(("x", x), *phi.named_parameters(), strict=True)
    got = phi(x, cu_seqlens)
    want = reference.compress(x, dict(phi.named_parameters()), phi.config, cu_seqlens)
    used = used_rows(phi.config, cu_seqlens, x.shape[1])
    rows = used if cu_seqlens is None else x.shape[1] // phi.config.compress_stride
    assert got.shape == want.shape == (x.shape[0], rows, *x.shape[2:])
    torch.testing.assert_close(got[:, :used], want[:, :used], rtol=1e-12, atol=1e-13)
    dout = normal(*got.shape)
    dout[:, used:] = 0.0
    # the oracle of an empty problem is cut off from x
    grads = [torch.autograd.grad(y, leaves, dout, materialize_grads=True) for y in (got, want)]
    for name, a, b in zip(names, *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=lambda m: f"{name}: {m}")  # noqa: B023


# φ


@every_compression
@given(case=cases(max_length=60))
def test_phi_is_the_oracles(compression: str, case: Case) -> None:
    inputs = case.inputs(torch.float64)
    phi = make_phi(compression, case.config)
    compare(phi, inputs.selected.k.detach(), inputs.cu_seqlens)


@every_compression
@pytest.mark.parametrize("size", [1, 5])
def test_phi_of_another_head_size(compression: str, size: int) -> None:
    compare(make_phi(compression, size=size), normal(2, 13, 2, size), None)


@every_compression
@pytest.mark.parametrize(
    "lengths", [(0,), (0, 0), (3,), (3, 3, 3), (4,), (0, 5, 0, 4, 3, 9, 0), (1, 4)], ids=str
)
def test_phi_of_empty_and_short_sequences(compression: str, lengths: tuple[int, ...]) -> None:
    cu_seqlens = bounds(*lengths)
    compare(make_phi(compression), normal(1, sum(lengths), 2, 6), cu_seqlens)


def test_blocks_by_hand() -> None:
    """Tokens 0 … 8, l = 4, d = 2: three blocks, and the last token is in none."""
    x = torch.arange(9.0)[None, :, None, None]
    blocks = block_tokens(x, CONFIG)[0, :, 0, :, 0]
    assert blocks.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]
    packed = block_tokens(x, CONFIG, bounds(0, 5, 4))[0, :, 0, :, 0]
    assert packed.shape == (4, 4)
    assert packed[:2].tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]


def test_the_position_embedding_tells_tokens_of_a_block_apart() -> None:
    phi, x = make_phi("mlp"), torch.zeros(1, 4, 2, 6, dtype=torch.float64)
    before = phi(x)
    with torch.no_grad():
        phi.position[2] += 1.0
    shifted = x.clone()
    shifted[:, 2] += 1.0
    after = phi(x)
    assert not torch.allclose(after, before)
    with torch.no_grad():
        phi.position[2] -= 1.0
    torch.testing.assert_close(phi(shifted), after)


@every_compression
@torch.no_grad()
def test_heads_share_one_set_of_weights(compression: str) -> None:
    phi, x = make_phi(compression), normal(1, 11, 3, 6)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(phi(x[:, :, order]), phi(x)[:, :, order])


@every_compression
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("token", [0, 1, 3, 4, 9, 12])
@torch.no_grad()
def test_a_token_changes_its_own_blocks_alone(
    compression: str, dtype: torch.dtype, token: int
) -> None:
    """Bit for bit: causality of the layer rests on it."""
    phi, x = make_phi(compression).to(dtype), normal(2, 13, 2, 6, dtype=dtype)
    changed = x.clone()
    changed[:, token] = 1e4
    before, after = phi(x), phi(changed)
    for i in range(before.shape[1]):
        holds = i * 2 <= token < i * 2 + 4
        assert torch.equal(before[:, i], after[:, i]) != holds


@every_compression
@torch.no_grad()
def test_packed_sequences_do_not_leak(compression: str) -> None:
    phi, x, cu_seqlens = make_phi(compression), normal(1, 20, 2, 6), bounds(7, 0, 8, 5)
    changed = x.clone()
    changed[:, 7:15] = 1e4
    before, after = phi(x, cu_seqlens), phi(changed, cu_seqlens)
    same = [torch.equal(before[:, i], after[:, i]) for i in range(6)]
    assert same == [True, True, False, False, False, True]


@every_compression
@torch.no_grad()
def test_packed_equals_alone(compression: str) -> None:
    phi, x, lengths = make_phi(compression), normal(1, 20, 2, 6), (7, 0, 8, 5)
    alone = torch.cat([phi(part) for part in x.split(lengths, dim=1)], dim=1)
    together = phi(x, bounds(*lengths))
    torch.testing.assert_close(together[:, : alone.shape[1]], alone, rtol=1e-12, atol=1e-13)


@every_compression
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(compression: str, packed: bool) -> None:
    phi = make_phi(compression, size=2)
    x = normal(1, 9, 2, 2).requires_grad_()
    cu_seqlens = bounds(5, 4) if packed else None
    used = used_rows(CONFIG, cu_seqlens, 9)
    assert torch.autograd.gradcheck(lambda x: phi(x, cu_seqlens)[:, :used], (x,))


@every_compression
@pytest.mark.parametrize("length", [0, 1, 3])
def test_without_a_block_gradients_are_zero(compression: str, length: int) -> None:
    phi, x = make_phi(compression), normal(2, length, 2, 6).requires_grad_()
    out = phi(x)
    assert out.shape == (2, 0, 2, 6)
    grads = torch.autograd.grad(out.sum(), [x, *phi.parameters()])
    assert not any(grad.any() for grad in grads)


def test_what_phi_holds() -> None:
    names = {c: [name for name, _ in make_phi(c).named_parameters()] for c in COMPRESSIONS}
    assert names["mlp"] == ["position", "up.weight", "up.bias", "down.weight", "down.bias"]
    assert names["linear"] == ["proj.weight", "proj.bias"]
    assert names["mean"] == []


# RoPE


@given(
    length=st.integers(0, 40),
    size=st.integers(1, 8).map(lambda n: 2 * n),
    theta=st.sampled_from([1.5, 100.0, 10_000.0, 5e5]),
)
def test_rope_is_the_oracles(length: int, size: int, theta: float) -> None:
    x = normal(2, length, 3, size)
    torch.testing.assert_close(
        apply_rope(x, theta), reference.apply_rope(x, theta), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("lengths", [(5,), (0, 4, 0, 7, 1), (0,)], ids=str)
def test_positions_restart_with_each_sequence(lengths: tuple[int, ...]) -> None:
    cu_seqlens, x = bounds(*lengths), normal(1, sum(lengths), 2, 6)
    positions = packed_tokens(cu_seqlens, x.shape[1]).position
    assert positions.tolist() == [t for n in lengths for t in range(n)]
    got = apply_rope(x, 100.0, positions)
    want = reference.apply_rope(x, 100.0, cu_seqlens)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    alone = [apply_rope(part, 100.0) for part in x.split(lengths, dim=1)]
    assert torch.equal(got, torch.cat(alone, dim=1))


def test_rope_by_hand() -> None:
    """D = 4, θ = 100: pairs (x0, x2) and (x1, x3) turn by t and t/10 radians."""
    x = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64).expand(1, 3, 1, 4)
    t = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    want = torch.stack([t.cos(), (t / 10).cos(), t.sin(), (t / 10).sin()], dim=-1)
    torch.testing.assert_close(apply_rope(x, 100.0)[0, :, 0], want)


def test_products_depend_on_distance_alone() -> None:
    q, k = (normal(1, 1, 1, 8, seed=seed).expand(1, 30, 1, 8) for seed in (0, 1))
    turned_q, turned_k = apply_rope(q, 100.0), apply_rope(k, 100.0)
    products = torch.einsum("bthd,bshd->ts", turned_q, turned_k)
    torch.testing.assert_close(products[:-1, :-1], products[1:, 1:])
    assert not torch.allclose(products[0, 0], products[1, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_far_positions_lose_no_precision(dtype: torch.dtype) -> None:
    """Angles are computed in fp64: fp32 would be off by a tenth of a radian out here."""
    x = normal(1, 5, 2, 8, dtype=dtype)
    positions = torch.tensor([0, 1, 131_071, 1_000_003, 2**24 + 1])
    got = apply_rope(x, 10_000.0, positions)
    want = apply_rope(x.double(), 10_000.0, positions)
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=eps, atol=4 * torch.finfo().eps)


def test_rope_gradcheck() -> None:
    x = normal(1, 5, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, 100.0), (x,))
