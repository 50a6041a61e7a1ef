"""``compiled`` on a GPU: the rules of tests/backends/test_parity.py and test_backend_properties.py.

Chosen geometries in place of drawn ones: Triton makes its kernels anew for each, in seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nsa import NSAConfig, nsa_attention, resolve
from nsa.backends.compiled import steps as compiled
from nsa.core import compile as core_compile
from nsa.testing import Inputs, attention_parity, make_inputs, random_blocks, selection_faults
from nsa.testing.strategies import Case, cases
from tests.support.layouts import LAYOUTS, laid_out

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:.*Profiler clears events"),
]

SMALL = NSAConfig(num_heads=12, num_kv_heads=2, head_dim=64, num_selected=4, num_local=1, window=99)
WIDE = replace(SMALL, num_heads=16, num_kv_heads=1, head_dim=128)
APART = replace(SMALL, num_heads=8, head_dim=48, value_dim=24)
ODD = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    value_dim=6,
    compress_block=4,
    compress_stride=2,
    select_block=6,
    num_selected=4,
    num_local=1,
    window=7,
)
TARGETS = [
    pytest.param(SMALL, torch.bfloat16, id="G6-bf16"),
    pytest.param(SMALL, torch.float16, id="G6-fp16"),
    pytest.param(SMALL, torch.float32, id="G6-fp32"),
    pytest.param(WIDE, torch.bfloat16, id="G16-bf16"),
    pytest.param(APART, torch.bfloat16, id="Dk48-Dv24-bf16"),
    pytest.param(ODD, torch.float16, id="odd-fp16"),
]
SHAPES = (
    {"length": 1},
    {"length": 33},
    {"length": 64, "batch": 2},
    {"length": 700, "batch": 2},
    {"lengths": (310, 0, 170, 1, 64)},
)
EXTREMES = (0.0, 1e4, 1e30)


def problem(config: NSAConfig, dtype: torch.dtype, **shape: object) -> Inputs:
    x = make_inputs(config, dtype=dtype, device="cuda", surplus="lengths" in shape, **shape)
    return replace(x, block_idx=random_blocks(x, 4))


def attend(x: Inputs, *, select: bool = False) -> Tensor:
    return nsa_attention(
        x.q,
        x.compressed,
        x.selected,
        x.window,
        x.gates,
        x.config,
        cu_seqlens=x.cu_seqlens,
        max_seqlen=x.max_seqlen,
        block_idx=None if select else x.block_idx,
        backend="compiled",
    )


@pytest.mark.parametrize(("config", "dtype"), TARGETS)
def test_parity(config: NSAConfig, dtype: torch.dtype) -> None:
    faults = []
    for shape in SHAPES:
        x = problem(config, dtype, **shape)
        faults += [
            f"{shape} {row.name}: error {row.error:.3e} > bound {row.bound:.3e}"
            for row in attention_parity("compiled", x)
            if not row.ok
        ]
        faults += [f"{shape} {fault}" for fault in selection_faults("compiled", x)]
    assert not faults, "\n".join(faults)


def faults(x: Inputs) -> list[str]:
    rows = [row for row in attention_parity("compiled", x) if not row.ok]
    return [f"{r.name}: error {r.error:.3e} > bound {r.bound:.3e}" for r in rows] + list(
        selection_faults("compiled", x)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity_of_a_long_sequence(dtype: torch.dtype) -> None:
    """Small heads sum dq beside dk and dv from some length on."""
    from nsa.backends.compiled.selected import tiles as selected_tiles

    config = replace(SMALL, num_heads=6, num_kv_heads=1, num_selected=16)
    length = selected_tiles.WITH_DQ_FROM + 77
    assert faults(problem(config, dtype, length=length)) == []


@pytest.mark.parametrize("heads", [(16, 2), (8, 2), (2, 2)], ids=["G8", "G4", "G1"])
def test_far_blocks(heads: tuple[int, int]) -> None:
    """Small groups take blocks by key tiles from some position on; the bits are the pack's."""
    from nsa.backends.compiled.selected.tiles import FAR_SINCE

    config = replace(WIDE, num_heads=heads[0], num_kv_heads=heads[1], num_selected=16)
    long = FAR_SINCE + 777
    for shape in ({"length": long}, {"lengths": (333, long, 0, 1)}):
        assert faults(problem(config, torch.bfloat16, **shape)) == []
    x = problem(config, torch.bfloat16, lengths=(333, long))
    assert x.block_idx is not None
    q, k, v = x.q.detach(), *(y.detach() for y in x.selected)
    found = compiled.selected_attention(q, k, v, x.block_idx, config, x.cu_seqlens)
    for part in (slice(333), slice(333, None)):
        alone = [y[:, part].contiguous() for y in (q, k, v, x.block_idx)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            want = compiled.selected_attention(*alone, config)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for a, b in zip(found, want, strict=True):
            assert torch.equal(a[:, part], b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_need_not_be_contiguous(layout: str) -> None:
    for shape in SHAPES[1:3] + SHAPES[4:]:
        assert faults(laid_out(problem(SMALL, torch.bfloat16, **shape), layout)) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@settings(max_examples=20)
@given(case=cases())
def test_parity_over_drawn_shapes(dtype: torch.dtype, case: Case) -> None:
    """Slow, because Triton makes seven kernels for each."""
    assert faults(case.inputs(dtype, "cuda")) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("packed", [False, True], ids=["regular", "packed"])
def test_parity_through_inductor(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_compile, "COMPILER", "inductor")
    x = problem(SMALL, torch.bfloat16, **SHAPES[4 if packed else 3])
    assert [row for row in attention_parity("compiled", x) if not row.ok] == []


@pytest.mark.parametrize("value", EXTREMES)
@pytest.mark.parametrize(("config", "dtype"), TARGETS[:3])
def test_causality_is_bitwise_where_lists_are_given(
    config: NSAConfig, dtype: torch.dtype, value: float
) -> None:
    value = min(value, torch.finfo(dtype).max)
    x, first = problem(config, dtype, length=300), 133
    changed = [y.detach().clone() for y in x.leaves()]
    for y in (changed[0], *changed[3:7]):
        y[:, first] = value
    for y in changed[1:3]:
        for i in range(y.shape[1]):
            if i * 16 <= first < i * 16 + 32:
                y[:, i] = value
    with torch.no_grad():
        before, after = attend(x), attend(x.with_leaves(tuple(changed)))
    assert torch.equal(before[:, :first], after[:, :first])


@pytest.mark.parametrize("value", EXTREMES)
@pytest.mark.parametrize(("config", "dtype"), TARGETS[:3])
def test_packed_sequences_do_not_leak(config: NSAConfig, dtype: torch.dtype, value: float) -> None:
    value = min(value, torch.finfo(dtype).max)
    x = problem(config, dtype, lengths=(150, 100, 90))
    first, last = (config.num_compressed(150), config.num_compressed(100))
    changed = [y.detach().clone() for y in x.leaves()]
    for y in (changed[0], *changed[3:7]):
        y[:, 150:250] = value
    for y in changed[1:3]:
        y[:, first : first + last] = value
    with torch.no_grad():
        before, after = attend(x), attend(x.with_leaves(tuple(changed)))
    assert torch.equal(before[:, :150], after[:, :150])
    assert torch.equal(before[:, 250:], after[:, 250:])


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize(("config", "dtype"), TARGETS[:3])
def test_finite_on_extreme_inputs(config: NSAConfig, dtype: torch.dtype, scale: float) -> None:
    x = problem(config, torch.float32, length=300)
    leaves = tuple((y.detach() * scale).to(dtype).requires_grad_() for y in x.leaves()[:7])
    x = x.with_leaves((*leaves, x.gates.detach().to(dtype).requires_grad_()))
    out = attend(x, select=True)
    assert torch.isfinite(out).all()


@pytest.fixture
def sync_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("packed", [False, True], ids=["regular", "packed"])
def test_no_host_sync(packed: bool, sync_is_an_error: None) -> None:
    x = problem(SMALL, torch.bfloat16, **SHAPES[4 if packed else 3])

    def step() -> None:
        torch.autograd.grad(attend(x, select=True), x.leaves(), x.dout.to(torch.bfloat16))

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    step()


def test_launches_do_not_depend_on_the_length() -> None:
    counts = {}
    for length in (8192, 16384):
        x = problem(SMALL, torch.bfloat16, length=length)
        attend(x, select=True)
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            torch.autograd.grad(attend(x, select=True), x.leaves(), x.dout)
            torch.cuda.synchronize()
        names = [e.name for e in trace.events() or [] if e.device_type.name == "CUDA"]
        counts[length] = Counter(n for n in names if not n.startswith(("Memset", "Memcpy")))
    few, many = (sum(x.values()) for x in counts.values())
    assert abs(many - few) <= 4, counts  # a sort of more pairs takes a pass or two more
    assert many <= 150, counts


def test_auto_takes_it() -> None:
    resolution = resolve(
        SMALL,
        device="cuda",
        dtype=torch.bfloat16,
        length=100,
        packed=False,
        needs_grad=True,
    )
    assert resolution.backend == "compiled"
    assert set(resolution.per_branch.values()) == {"compiled"}
