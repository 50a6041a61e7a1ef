"""What the functions hand on: to the choice of a backend, to the steps, to what compiles them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nsa import KV, Settings, attention, reference, select_blocks, use_settings
from nsa.attention import combine, run
from nsa.backends.dispatch import load, plan
from nsa.backends.protocol import Problem
from nsa.core.inputs import AttentionInputs
from nsa.registry import TABLE
from nsa.testing import Inputs
from tests.support import entries
from tests.support.entries import CONFIG, PACKED, REGULAR, Entry, packed

SHORT = packed([0, 5, 11], 6)


def asked(monkeypatch: pytest.MonkeyPatch, entry: Entry, inputs: Inputs) -> Problem:
    """What the choice of a backend was asked."""
    calls: list[tuple[Any, ...]] = []
    plan = attention.plan

    def call(*arguments: Any) -> Any:
        calls.append(arguments)
        return plan(*arguments)

    monkeypatch.setattr(attention, "plan", call)
    entry(inputs, "sdpa")
    ((problem, backend, settings),) = calls
    assert (backend, settings) == ("sdpa", Settings())
    return problem  # type: ignore[no-any-return]


@pytest.mark.parametrize("entry", [entries.attention, entries.selection])
@pytest.mark.parametrize(
    ("inputs", "length"), [(REGULAR, 11), (SHORT, 6), (PACKED, 6), (packed([0, 5, 11]), 11)]
)
def test_the_choice_knows_the_problem(
    monkeypatch: pytest.MonkeyPatch, inputs: Inputs, length: int, entry: Entry
) -> None:
    problem = asked(monkeypatch, entry, inputs)
    is_packed, grad = inputs.cu_seqlens is not None, entry is entries.attention
    cpu = torch.device("cpu")
    assert problem == (CONFIG, cpu, torch.float32, length, is_packed, grad, False)


def test_a_backward_pass_may_follow_where_autograd_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        assert not asked(monkeypatch, entries.attention, REGULAR).needs_grad
    monkeypatch.undo()
    constants = REGULAR.with_leaves(tuple(x.detach() for x in REGULAR.leaves()))
    assert not asked(monkeypatch, entries.attention, constants).needs_grad


@pytest.mark.parametrize("glue", [False, True])
def test_who_compiles_a_call(monkeypatch: pytest.MonkeyPatch, glue: bool) -> None:
    ran = []
    for name in ("run", "run_compiled"):
        monkeypatch.setattr(attention, name, lambda *_, name=name, **kw: ran.append((name, kw)))
    monkeypatch.setitem(TABLE, "sdpa", replace(TABLE["sdpa"], compiles_glue=glue))
    with use_settings(nvtx=True):
        entries.attention(REGULAR, "sdpa")
    assert ran == [("run_compiled" if glue else "run", {"nvtx": True})]


class AtOnce(NamedTuple):
    """Runs the branches at once where it may."""

    told: list[dict[str, Any]]

    def step(self, name: str) -> Any:
        return load("sdpa")

    def gated(self) -> Any:
        return self

    def gated_attention(self, inputs: Any, out_cmp: Any, *rest: Any, **options: bool) -> str:
        options["graph"] = out_cmp.requires_grad
        self.told.append(options)
        return "at once"


def test_who_runs_all_branches_at_once() -> None:
    """What computes the gradients itself gets no graph, whatever position queries begin at."""
    x, chosen = REGULAR, AtOnce([])
    inputs = AttentionInputs(x.q, x.compressed, x.selected, x.window, x.gates)
    assert run(chosen, inputs, CONFIG) == "at once"
    assert chosen.told == [{"gates_in_unit_interval": False, "graph": False}]
    run(chosen, inputs, CONFIG, gates_in_unit_interval=True)
    assert chosen.told[1:] == [{"gates_in_unit_interval": True, "graph": False}]
    later = inputs._replace(q=x.q[:, 1:], gates=x.gates[:, 1:], q_start=1)
    assert run(chosen, later, CONFIG) == "at once"
    assert chosen.told[2:] == [{"gates_in_unit_interval": False, "graph": False}]


@pytest.mark.parametrize("before", [None, 1, CONFIG.window - 1])
def test_queries_that_begin_later(before: int | None) -> None:
    """Of the window's keys those are enough that the first query sees."""
    x, first = REGULAR, CONFIG.window + 1
    assert x.q.shape[1] > first + 1
    window = x.window
    if before is not None:
        window = KV(*(y[:, first - before :] for y in window))
    later = AttentionInputs(
        x.q[:, first:],
        *(x.compressed, x.selected, window),
        x.gates[:, first:],
        q_start=first,
        window_start=before,
    )
    problem = Problem(CONFIG, x.q.device, x.q.dtype, 11, False, True)
    out = run(plan(problem, "sdpa", Settings()), later, CONFIG)
    same = torch.allclose(out, entries.attention(x)[:, first:], atol=1e-5)
    assert same == (before != 1)


def test_a_probe_is_shown_the_lists() -> None:
    x, lists = REGULAR, []
    inputs = AttentionInputs(x.q, x.compressed, x.selected, x.window, x.gates)
    probe: Any = SimpleNamespace(given=lambda given: given, listed=lists.append)
    run(AtOnce([]), inputs, CONFIG, probes=(probe,))
    (shown,) = lists
    assert torch.equal(shown.block_idx, entries.selection(x))
    assert shown._replace(block_idx=None) == inputs


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("compiling", [False, True])
def test_a_profiler_sees_the_branches_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, compiling: bool, at_once: bool
) -> None:
    seen = []

    def noted(name: str) -> AbstractContextManager[None]:
        seen.append(name)
        return nullcontext()

    q: Any = SimpleNamespace(is_cuda=True, device=torch.device("cpu"))
    steps = SimpleNamespace(
        compressed_attention=lambda *_, **options: (REGULAR.q, None),
        select_blocks=lambda *_, **options: None,
        selected_attention=lambda *_, **options: (REGULAR.q, None),
        window_attention=lambda *_, **options: (REGULAR.q, None),
    )
    if not at_once:
        monkeypatch.setattr(AtOnce, "gated", lambda self: None)
    monkeypatch.setattr(AtOnce, "step", lambda self, name: steps)
    monkeypatch.setattr("torch.cuda.nvtx.range", noted)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: compiling)
    inputs = AttentionInputs(q, REGULAR.compressed, REGULAR.selected, REGULAR.window, REGULAR.gates)
    run(AtOnce([]), inputs, CONFIG)
    assert seen == []
    run(AtOnce([]), inputs, CONFIG, nvtx=True)
    names = ["nsa.compressed", "nsa.select"]
    names += ["nsa.selected+window"] if at_once else ["nsa.selected", "nsa.window"]
    assert seen == ([] if compiling else names)


def test_the_sum_of_branches_is_rounded_once() -> None:
    gates, *outputs = torch.randn(4, 2, 5, 3, 3).bfloat16()
    wide = combine(gates.float(), *(out.float() for out in outputs))
    assert torch.equal(combine(gates, *outputs), wide.bfloat16())


def test_a_step_is_told_the_bound_of_lengths_and_may_list_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = []

    def step(*arguments: Any, **options: Any) -> Tensor:
        told.append(options)
        return reference.select_blocks(*arguments)[..., :2]

    monkeypatch.setattr("nsa.backends.sdpa.steps.select_blocks", step)
    for inputs in (REGULAR, SHORT):
        block_idx = entries.selection(inputs, "sdpa")
        assert block_idx.shape[-1] == CONFIG.num_selected
        assert (block_idx[..., 2:] == -1).all()
    assert told == [{"max_seqlen": None}, {"max_seqlen": 6}]


@pytest.mark.parametrize("inputs", [REGULAR, PACKED], ids=["regular", "packed"])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_lists_are_as_wide_as_asked_for(backend: str, inputs: Inputs) -> None:
    config = replace(CONFIG, num_selected=1000)
    blocks = select_blocks(
        inputs.q, inputs.compressed.k, config, cu_seqlens=inputs.cu_seqlens, backend=backend
    )
    assert blocks.shape == (*inputs.q.shape[:2], config.num_kv_heads, 1000)
    own = [0] if inputs is PACKED else [0, 1]
    assert blocks[0, -1, 0].tolist() == own + [-1] * (1000 - len(own))
