"""φ of keys and of values in batched products, and when it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nsa import NSAConfig
from nsa.compression import Compress, MLPCompress, compress_both

CONFIG = NSAConfig(
    num_heads=4, num_kv_heads=2, head_dim=8, compress_block=4, compress_stride=2, select_block=4
)


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are batched as on a GPU."""
    monkeypatch.setattr("nsa.compression.batching_pays", lambda x: True)


PACKED = torch.tensor([0, 9, 9, 12, 30], dtype=torch.int32)


def made(dtype: torch.dtype = torch.float64) -> tuple[MLPCompress, MLPCompress]:
    torch.manual_seed(0)
    return MLPCompress(CONFIG, 8, dtype=dtype), MLPCompress(CONFIG, 8, dtype=dtype)


def tokens(length: int, batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, batch, length, 2, 8, dtype=dtype)
    return k.requires_grad_(), v.requires_grad_()


@pytest.mark.parametrize(
    ("length", "batch", "cu_seqlens"), [(30, 2, None), (30, 1, PACKED), (3, 2, None)]
)
def test_same_as_one_after_the_other(length: int, batch: int, cu_seqlens: Tensor | None) -> None:
    """Values and gradients, those of the parameters included; without any block too."""
    phi_k, phi_v = made()
    k, v = tokens(length, batch)
    leaves = [k, v, *phi_k.parameters(), *phi_v.parameters()]
    found = compress_both(phi_k, phi_v, k, v, cu_seqlens)
    want = phi_k(k, cu_seqlens), phi_v(v, cu_seqlens)
    weights = [torch.randn_like(x) for x in want]
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(
        torch.autograd.grad(found, leaves, weights),
        torch.autograd.grad(want, leaves, weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def _hooked(phi: Compress) -> None:
    phi.register_forward_hook(lambda module, args, out: out + 5)


def _patched(phi: Compress) -> None:
    forward = phi.forward
    phi.forward = lambda *args, **kwargs: forward(*args, **kwargs) + 5  # type: ignore[method-assign]


def _another_class(phi: Compress) -> None:
    class Shifted(MLPCompress):
        def forward(self, *args: object, **kwargs: object) -> Tensor:
            return super().forward(*args, **kwargs) + 5  # type: ignore[arg-type]

    phi.__class__ = Shifted


def _another_layer(phi: Compress) -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 5

    phi.down.__class__ = Shifted


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("change", [_hooked, _patched, _another_class, _another_layer])
def test_one_that_is_more_than_two_products_is_called(
    change: Callable[[Compress], None], which: int
) -> None:
    both, (k, v) = made(), tokens(30, 2)
    before = compress_both(*both, k, v)
    change(both[which])
    after = compress_both(*both, k, v)
    for i in (0, 1):
        torch.testing.assert_close(after[i], before[i] + (5 if i == which else 0))


def test_heads_of_two_sizes() -> None:
    torch.manual_seed(0)
    phi_k, phi_v = MLPCompress(CONFIG, 8), MLPCompress(CONFIG, 6)
    k, v = torch.randn(2, 30, 2, 8), torch.randn(2, 30, 2, 6)
    found = compress_both(phi_k, phi_v, k, v)
    torch.testing.assert_close(found, (phi_k(k), phi_v(v)))
