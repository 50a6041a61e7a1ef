"""``compiled`` in CUDA graphs: those of ``torch.compile(mode="reduce-overhead")`` and one's own.

A graph replays launches on fixed memory: what a kernel reads from the host, or keeps from an
earlier call, would be that of the capture. Inputs are new in every step for that reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nsa import NSAConfig, NSAttention
from nsa.core import compile as core_compile
from nsa.models import LanguageModel, ModelConfig
from tests.support.layers import agree, by_part

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Inductor's
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

DIM, LENGTH = 64, 300
CONFIG = NSAConfig(
    num_heads=12,
    num_kv_heads=2,
    head_dim=64,
    num_selected=8,  # every block is read: rounding must not decide which
    num_local=1,
    window=99,
)
PACKING = (130, 0, 169, 1)
STEPS = 5
"""torch's own graphs are warmed up in the first, recorded in the second, and replayed."""
LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["regular", "packed"])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def make_layer(dtype: torch.dtype = torch.bfloat16) -> NSAttention:
    torch.manual_seed(0)
    return NSAttention(DIM, CONFIG, backend="compiled", device="cuda", dtype=dtype)


def packing(packed: bool) -> dict[str, object]:
    if not packed:
        return {}
    ends = torch.tensor((0, *PACKING)).cumsum(0).to("cuda", torch.int32)
    return {"cu_seqlens": ends, "max_seqlen": max(PACKING)}


def draw(step: int, packed: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """x and the gradient of the output."""
    generator = torch.Generator("cuda").manual_seed(step)
    shape = (1 if packed else 2, LENGTH, DIM)
    x, dout = (torch.randn(shape, device="cuda", generator=generator) for _ in range(2))
    return x.to(dtype).requires_grad_(), dout.to(dtype)


def step_of(
    run: Callable[..., Tensor], layer: NSAttention, x: Tensor, dout: Tensor, **call: object
) -> dict[str, Tensor]:
    """The output and the gradient of x and of every parameter."""
    out = run(x, **call)
    leaves = {"x": x, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out, **dict(zip(leaves, grads, strict=True))}


def launches_of_graphs(run: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return sum("GraphLaunch" in event.name for event in trace.events() or [])


def capture(run: Callable[[], dict[str, Tensor]]) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    """A graph of ``run``, and the tensors that a replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are made here, not while a graph is captured
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    return graph, captured


# torch's graphs


@pytest.mark.parametrize(
    ("packed", "dtype", "tolerance"),
    [
        pytest.param(False, torch.float32, 1e-3, id="regular-fp32"),
        pytest.param(True, torch.bfloat16, 0.05, id="packed-bf16"),  # Inductor rounds less often
    ],
)
def test_reduce_overhead_of_a_layer(packed: bool, dtype: torch.dtype, tolerance: float) -> None:
    layer, call = make_layer(dtype), packing(packed)
    graphed = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for step in range(STEPS):
        x, dout = draw(step, packed, dtype)
        torch.compiler.cudagraph_mark_step_begin()
        got = by_part(step_of(graphed, layer, x, dout, **call))  # copies: a step writes over these
        agree(got, by_part(step_of(layer, layer, x, dout, **call)), tolerance)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0

    def again() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        step_of(graphed, layer, x, dout, **call)

    assert launches_of_graphs(again) >= 2  # forward and backward


def test_reduce_overhead_of_a_model() -> None:
    """Two layers and a loss, trained for some steps: parameters change under the graph."""
    torch.manual_seed(0)
    config = ModelConfig(dim=DIM, num_layers=2, vocab_size=64, nsa=CONFIG)
    plain, ours = (LanguageModel(config, backend="compiled", device="cuda") for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    loss_of = ours.compile_loss(mode="reduce-overhead")
    generator = torch.Generator().manual_seed(1)

    def step(loss_of: Callable[..., Tensor], model: LanguageModel, *batch: Tensor) -> list[Tensor]:
        """The loss and all gradients; then one step of gradient descent."""
        torch.compiler.cudagraph_mark_step_begin()
        loss = loss_of(*batch)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter.sub_(grad, alpha=0.1)
            return [loss.detach().clone(), torch.cat([x.flatten() for x in grads])]

    for _ in range(STEPS):
        batch = [torch.randint(64, (2, LENGTH), generator=generator).cuda() for _ in range(2)]
        got, want = step(loss_of, ours, *batch), step(plain.loss, plain, *batch)
        torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=0.0)
        assert (got[1] - want[1]).norm() <= 1e-2 * want[1].norm()
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    assert launches_of_graphs(lambda: step(loss_of, ours, *batch)) >= 2


# One's own


@LAYOUTS
@pytest.mark.parametrize("compiler", [None, "inductor"], ids=["as written", "fused"])
def test_a_graph_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, compiler: str | None, packed: bool
) -> None:
    """Forward and backward captured together, replayed on other numbers and other parameters."""
    monkeypatch.setattr(core_compile, "COMPILER", compiler)
    layer, call = make_layer(), packing(packed)
    x, dout = draw(0, packed)
    graph, captured = capture(lambda: step_of(layer, layer, x, dout, **call))
    for step in range(1, STEPS):
        new_x, new_dout = draw(step, packed)
        with torch.no_grad():
            x.copy_(new_x)
            dout.copy_(new_dout)
            for parameter in layer.parameters():
                parameter.mul_(0.9)
            for found in captured.values():
                found.fill_(float("nan"))
        graph.replay()
        want = step_of(layer, layer, new_x, new_dout, **call)
        agree(by_part(captured), by_part(want), torch.finfo(torch.bfloat16).eps)


def test_the_lengths_of_a_packing_may_change_in_a_graph() -> None:
    """cu_seqlens is data: one graph serves any split of its tokens, empty sequences too."""
    layer, call = make_layer(), packing(True)
    cu_seqlens = call["cu_seqlens"]
    assert isinstance(cu_seqlens, Tensor)
    call["max_seqlen"] = LENGTH
    x, dout = draw(0, True)
    graph, captured = capture(lambda: step_of(layer, layer, x, dout, **call))
    for lengths in ((300, 0, 0, 0), (1, 99, 100, 100), (0, 0, 31, 269)):
        cu_seqlens.copy_(torch.tensor((0, *lengths)).cumsum(0))
        graph.replay()
        want = step_of(layer, layer, x, dout, **call)
        agree(by_part(captured), by_part(want), torch.finfo(torch.bfloat16).eps)
