"""Ranks that share sequences compute what one process does: outputs, gradients, lists."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import CheckpointError, checkpoint

from nsa import KV, NSAConfig, NSAttention, select_blocks, use_settings
from nsa.cached_attention import Projected
from nsa.distributed import Layout, context_parallel
from nsa.distributed.context.attention import attend
from nsa.distributed.context.plan import plan_of
from nsa.distributed.context.transfers import Parts
from nsa.testing import Inputs, expected, make_inputs
from nsa.testing.parity import planned
from tests.support.context_parallel import (
    ORDERS,
    across_ranks,
    in_one_process,
    recorded_lists,
    tokens_of,
)
from tests.support.layers import CONFIG, VARIANTS, agree, by_part, make_layer, problem
from tests.support.processes import run_ranks

Lengths = tuple[int, ...] | None
Case = tuple[NSAConfig, Lengths, str]

PACKED = (13, 0, 3, 21)
SHORT = (5, 4, 0, 6, 5, 1, 9, 5)
"""Sequences shorter than a rank's rows, with and without a block."""
OPTIONS = {
    "share": {"select_share": 3},
    "schedule": {"select_schedule": ((9, 2), (20, 3)), "num_selected": 4},
    "mass": {"select_mass": 0.6},
    "regions": {"select_regions": (2, 1), "num_initial": 0},
    "fp8": {"score_dtype": "fp8"},
}


def compare(layer: NSAttention, lengths: Lengths, order: str, multiple: int = 1) -> None:
    """One layer and input, both ways."""
    case = problem(lengths)
    make = ORDERS[order] if order == "reversed" else partial(ORDERS[order], multiple=multiple)
    layout = make(tokens_of(case))
    found = across_ranks(layer, dict(layer.named_parameters()), case, layout)
    if dist.get_rank() == 0:  # all have the same
        agree(by_part(found), by_part(in_one_process(layer, case)))


def layers(cases: list[Case], backend: str = "sdpa") -> None:
    for config, lengths, order in cases:
        with use_settings(fa2_provider="math"):
            layer = make_layer(config, backend=backend)
        compare(layer, lengths, order, config.select_share)


FEW: dict[int, list[Case]] = {
    2: [
        (VARIANTS["paper"], None, "head-tail"),
        (VARIANTS["mean"], PACKED, "contiguous"),
        (VARIANTS["shared kv"], SHORT, "reversed"),
        *((replace(CONFIG, **changes), None, "contiguous") for changes in OPTIONS.values()),
    ],
    4: [
        (VARIANTS["odd"], None, "contiguous"),
        (VARIANTS["linear"], None, "reversed"),
        (VARIANTS["paper"], PACKED, "head-tail"),
        (VARIANTS["mean"], None, "head-tail"),
        (replace(CONFIG, **OPTIONS["share"]), PACKED, "contiguous"),
    ],
}
"""By the number of ranks. A segment of 4 ranks is shorter than the window."""
MANY: list[Case] = [
    (config, lengths, order)
    for config in (*VARIANTS.values(), *(replace(CONFIG, **x) for x in OPTIONS.values()))
    for lengths in (None, PACKED, SHORT, (37,))
    for order in ORDERS
    if order != "reversed" or config.select_share == 1
]


@pytest.mark.parametrize("size", [2, 4])
def test_layers_compute_what_one_process_does(size: int) -> None:
    run_ranks(layers, size, FEW[size])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_layers_of_every_kind(size: int) -> None:
    run_ranks(layers, size, MANY, timeout=900)


@pytest.mark.parametrize(
    "backend", [pytest.param("fa2-dense", marks=pytest.mark.slow), "fa2-varlen"]
)
def test_flash_attention_2(backend: str) -> None:
    """Its packing, on the provider that needs no GPU."""
    shapes = (None,) if backend == "fa2-dense" else (None, PACKED)
    run_ranks(layers, 2, [(VARIANTS["mean"], x, "contiguous") for x in shapes], backend)


# Attention alone, by the rule of accuracy


def attention_alone(dtypes: list[torch.dtype]) -> None:
    config = replace(CONFIG, num_selected=2)
    shapes = ({"length": 43, "batch": 2}, {"lengths": (17, 0, 30)})
    for dtype in dtypes:
        for shape in shapes:
            x = make_inputs(config, dtype=dtype, **shape)
            packing = {"cu_seqlens": x.cu_seqlens, "max_seqlen": x.max_seqlen}
            with torch.no_grad():
                lists = select_blocks(x.q, x.compressed.k, config, backend="sdpa", **packing)
            wanted = expected(replace(x, block_idx=lists)) if dist.get_rank() == 0 else {}
            for order in ("contiguous", "head-tail"):
                found = _attention_alone(x, order, lists)
                for name, want in wanted.items():
                    good = name not in found or want.error(found[name]) <= want.bound
                    assert good, (name, dtype, order)


def _attention_alone(x: Inputs, order: str, lists: torch.Tensor) -> dict[str, torch.Tensor]:
    """Lists are those of one process to the last entry."""
    config = x.config
    tokens = x.q.shape[1] if x.cu_seqlens is None else tuple(x.cu_seqlens.diff().tolist())
    layout = ORDERS[order](tokens)
    numbers: list[int] = []  # of this rank's blocks
    first = 0
    for rank, rows in plan_of(layout, config).blocks.order:
        end = first + rows.stop - rows.start
        numbers += range(first, end) if rank == layout.rank else ()
        first = end

    def phi(*_: object) -> tuple[torch.Tensor, torch.Tensor]:
        """The given blocks of this rank; all at the first call."""
        taken, numbers[:] = numbers[:], []
        k, v = (y[:, taken] for y in x.compressed)
        return k, v

    shard = layout.shard
    projected = Projected(
        shard(x.q),
        *(KV(*map(shard, pair)) for pair in (x.selected, x.selected, x.window)),
        shard(x.gates),
    )
    with recorded_lists() as found_lists:
        out = attend(layout, projected, phi, planned("sdpa", x), config)
    assert torch.equal(torch.cat(found_lists, 1), shard(lists))
    grads = torch.autograd.grad(out, x.leaves(), shard(x.dout), allow_unused=True)
    found = {"out": layout.unshard(out.detach())}
    for name, leaf, grad in zip(Inputs.NAMES, x.leaves(), grads, strict=True):
        found[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad.contiguous()
        dist.all_reduce(found[f"d{name}"])
    return found


def test_attention_obeys_the_rule_of_accuracy() -> None:
    run_ranks(attention_alone, 3, [torch.bfloat16])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_attention_obeys_the_rule_of_accuracy_in_every_dtype(size: int) -> None:
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    run_ranks(attention_alone, size, dtypes, timeout=600)


# What surrounds a layer


def surroundings() -> None:
    case = problem(None)
    layout = Layout.head_tail(tokens_of(case))
    layer = make_layer(backend="sdpa")
    parameters = dict(layer.named_parameters())
    want = by_part(in_one_process(layer, case))

    def found(call: object = layer, layout: Layout = layout) -> dict[str, torch.Tensor]:
        return by_part(across_ranks(call, parameters, case, layout))  # type: ignore[arg-type]

    layer.recompute = True
    agree(found(), want)
    layer.recompute = False
    agree(found(lambda x: checkpoint(layer, x, use_reentrant=False)), want)
    with context_parallel(layout):
        out = checkpoint(layer, layout.shard(case.x), use_reentrant=False)
    with pytest.raises(CheckpointError):  # outside it would be another function
        out.sum().backward()
    compiled = torch.compile(layer, backend="eager")
    for fresh in (Layout.contiguous(37), layout):
        agree(found(compiled, fresh), want)
    with torch.autograd.detect_anomaly(check_nan=True):
        agree(found(), want)
    with torch.no_grad(), context_parallel(layout):
        agree({"": layout.unshard(layer(layout.shard(case.x)))}, {"": want["out"].view_as(case.x)})
    for autocast in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        single = layer.float()
        with autocast, context_parallel(layout):
            out = single(layout.shard(case.x.float()))
        with autocast:
            whole = single(case.x.float())
        assert out.dtype == whole.dtype
        error = (layout.unshard(out).float() - whole.float()).norm() / whole.float().norm()
        assert error < (1e-5 if autocast.__class__ is nullcontext else 2e-2)


def test_recomputation_compilation_and_autocast() -> None:
    run_ranks(surroundings, 2)


def empty_batch() -> None:
    layer, layout = make_layer(backend="sdpa"), Layout.head_tail(37)
    x = torch.zeros(0, layout.rows, layer.dim, dtype=torch.float64, requires_grad=True)
    with context_parallel(layout):
        out = layer(x)
        layout.unshard(out).sum().backward()
    assert out.shape == x.shape == x.grad.shape  # type: ignore[union-attr]
    grads = [parameter.grad for parameter in layer.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_an_empty_batch() -> None:
    """As one process computes it: nothing, and gradients of zero."""
    run_ranks(empty_batch, 2)


# A wrong order is seen


def wrong_orders() -> None:
    """Rows of ranks put together in another order, on the way there and back."""
    case = problem(None)
    layer = make_layer(backend="sdpa")
    want = by_part(in_one_process(layer, case))
    layout = Layout.head_tail(tokens_of(case))
    right = layout.parts
    plan = plan_of(layout, layer.config)
    for wrong in ("keys", "blocks"):
        if wrong == "keys":
            layout.parts = Parts(right.order[::-1], right.counts)
        else:
            layout.parts = right
            order = plan.blocks.order[::-1]
            layout.plans[layer.config] = plan._replace(blocks=Parts(order, plan.blocks.counts))
        got = across_ranks(layer, dict(layer.named_parameters()), case, layout)
        with pytest.raises(AssertionError):
            agree(by_part(got), want)


def test_a_wrong_inverse_permutation_is_noticed() -> None:
    run_ranks(wrong_orders, 2)
