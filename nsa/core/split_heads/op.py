"""The product of all projections to rotated heads, as an operator of ``torch.library``.

For a GPU and outside a trace, where the same in PyTorch is dozens of launches.

B batch, T tokens, P columns of the product: those of q, of keys, of values and of gates, then
padding; H query heads, K key/value heads, D key size, V value size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.core.operators import BUILDING, config_of, define
from nsa.core.rope import Angles

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Of a product that it takes."""
_BRANCHES = 3


def split_heads(
    product: Tensor, bias: Tensor | None, angles: Angles | None, config: NSAConfig
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Split the product and rotate q and keys, each rounded once.

    Args:
        product: ``[B, T, P]``.
        bias: ``[3H]`` of the gates, or None.
        angles: of the T tokens, fp32; None: nothing is rotated.
        config: heads, and whether each branch has keys and values of its own.

    Returns:
        q ``[B, T, H, D]``, keys ``[B, T, K, D]`` and values ``[B, T, K, V]`` of every branch, or
        one pair for all, and the gates' logits ``[B, T, H, 3]``; all contiguous.
    """
    sets = _sets(config)
    q, *heads, gates = _SPLIT[sets](product, bias, *(angles or (None, None)), config.key)
    return q, heads[:sets], heads[sets:], gates


def widths(config: NSAConfig) -> list[int]:
    """Columns of every part of a product, in its order, without the padding."""
    H, K, sets = config.num_heads, config.num_kv_heads, _sets(config)
    keys, values = [K * config.head_dim] * sets, [K * config.dv] * sets
    return [H * config.head_dim, *keys, *values, H * _BRANCHES]


def _sets(config: NSAConfig) -> int:
    return _BRANCHES if config.independent_kv else 1


def _empty(x: Tensor, B: int, T: int, config: NSAConfig) -> tuple[Tensor, ...]:
    H, K, D, V = config.num_heads, config.num_kv_heads, config.head_dim, config.dv
    sets = _sets(config)
    heads = [(H, D), *[(K, D)] * sets, *[(K, V)] * sets, (H, _BRANCHES)]
    return tuple(x.new_empty(B, T, *shape) for shape in heads)


def _fake(
    product: Tensor, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, key: str
) -> tuple[Tensor, ...]:
    return _empty(product, product.shape[0], product.shape[1], config_of(key))


def _split(
    product: Tensor, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, key: str
) -> tuple[Tensor, ...]:
    from nsa.core.split_heads import kernels

    heads = _fake(product, bias, cos, sin, key)
    kernels.split(product.contiguous(), bias, _angles(cos, sin), config_of(key), heads)
    return heads


def _angles(cos: Tensor | None, sin: Tensor | None) -> Angles | None:
    if cos is None or sin is None:
        return None
    return Angles(*(x.contiguous() for x in (cos, sin)))


def _product_like(
    cos: Tensor | None, sin: Tensor | None, P: int, key: str, grads: Sequence[Tensor]
) -> Tensor:
    return grads[0].new_empty(*grads[0].shape[:2], P)


def _join(
    cos: Tensor | None, sin: Tensor | None, P: int, key: str, grads: Sequence[Tensor]
) -> Tensor:
    from nsa.core.split_heads import kernels

    product = _product_like(cos, sin, P, key, grads)
    heads = [grad.contiguous() for grad in grads]
    kernels.join(product, _angles(cos, sin), config_of(key), heads)
    return product


_JOIN = define(
    "split_heads_backward(Tensor? cos, Tensor? sin, SymInt P, str config, Tensor[] grads) -> "
    "Tensor",
    _join,
    _product_like,
)


def _gradients(
    kept: tuple[Any, ...], saved: Sequence[Tensor | None], *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    B, T, P, bias, key = kept
    given = next(grad for grad in grads if grad is not None)
    every = [
        zeros.zero_() if grad is None else grad
        for grad, zeros in zip(grads, _empty(given, B, T, config_of(key)), strict=True)
    ]
    product = _JOIN(*saved, P, key, every)
    if bias is None or BUILDING.get():  # a sum of meta tensors would import torch's compiler
        return product, None, None, None, None
    dbias = every[-1].flatten(2).sum((0, 1)).to(bias)
    return product, dbias, None, None, None


_CALL = "(Tensor product, Tensor? bias, Tensor? cos, Tensor? sin, str config)"
_SPLIT = {
    sets: define(
        f"split_heads{suffix}{_CALL} -> ({', '.join(['Tensor'] * (2 + 2 * sets))})",
        _split,
        _fake,
        saved=lambda inputs, outputs: inputs[2:4],
        kept=lambda inputs: (
            *inputs[0].shape,
            None if inputs[1] is None else inputs[1].dtype,
            inputs[4],
        ),
        gradients=_gradients,
        differentiable=2 + 2 * sets,
    )
    for sets, suffix in ((1, "_shared"), (_BRANCHES, ""))
}
"""By how many pairs of keys and values there are."""
