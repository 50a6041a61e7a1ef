"""A step in a CUDA graph: what the host counts for it, and, on a GPU, that it is the eager step.

Without a GPU the graph is a function that is run again, on the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from nsa import CacheError
from nsa.models import GenerationConfig, LanguageModel, generation
from nsa.models.decode_graph import Cache, StepGraph
from tests.models.test_generation import PROMPTS, VOCAB, make

BOTH = pytest.mark.parametrize("attention", ["nsa", "dense"])
ROOM = 80


def run_again(run: Callable[[], Tensor], cache: Cache) -> tuple[Callable[[], object], Tensor]:
    """In place of a capture: warms up, and replays by running."""
    for _ in range(2):
        with cache.capturing():
            out = run().clone()

    def replay() -> None:
        before = cache.position.clone()
        with cache.capturing():
            out.copy_(run())
            alive = [length is not None for length in cache.lengths]
            counted = cache.position - before
        assert counted.tolist() == [int(x) for x in alive]  # by the step itself

    return replay, out


def prefilled(model: LanguageModel, room: int = ROOM) -> Cache:
    """A cache of unequal sequences."""
    cache = model.new_cache(len(PROMPTS), room)
    longest = max(map(len, PROMPTS))
    tokens = torch.tensor([p + [0] * (longest - len(p)) for p in PROMPTS]).to(cache.device)
    model(tokens, cache=cache, counts=[len(p) for p in PROMPTS])
    return cache


def step_of(model: LanguageModel, cache: Cache) -> Callable[[Tensor], Tensor]:
    return lambda tokens: model(tokens, cache=cache)[:, -1]


def drawn(step: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(VOCAB, (len(PROMPTS), 1), generator=generator).to(device)


@BOTH
@torch.no_grad()
def test_replays_are_the_eager_steps(attention: str) -> None:
    """Across block and page borders; sequences are freed, one begins anew."""
    model = make(attention)
    eager, graphed = prefilled(model), prefilled(model)
    graph = StepGraph(step_of(model, graphed), graphed, drawn(0, graphed.device), capture=run_again)
    assert graphed.lengths == eager.lengths
    assert graphed.position.tolist() == eager.position.tolist()
    for step in range(40):
        if step == 20:
            for cache in (eager, graphed):
                cache.free([1, 3])
        alive = [b for b, length in enumerate(eager.lengths) if length is not None]
        tokens = drawn(step, eager.device)
        want = model(tokens, cache=eager)[:, -1]
        torch.testing.assert_close(graph(tokens)[alive], want[alive], rtol=1e-4, atol=1e-5)
        assert graphed.lengths == eager.lengths
        assert graphed.position.tolist() == eager.position.tolist()


@BOTH
@torch.no_grad()
def test_a_graph_of_a_full_cache_refuses_and_changes_nothing(attention: str) -> None:
    model = make(attention)
    cache = prefilled(model, room=33)
    tokens = drawn(0, cache.device)

    def step(given: Tensor) -> Tensor:
        return given.clone()

    graph = StepGraph(step, cache, tokens, capture=lambda run, cache: (lambda: None, tokens))
    graph(tokens)
    graph(tokens)
    before = cache.lengths
    with pytest.raises(CacheError, match="expected at most max_length=33 tokens"):
        graph(tokens)
    assert cache.lengths == before == [5, 33, 13, 3]


@BOTH
def test_generation_through_a_graph(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that end at different times, and what was read for them."""
    model, runs = make(attention), []
    config = GenerationConfig(max_new_tokens=30, seed=3)
    for graphed in (False, True):
        if graphed:
            monkeypatch.setattr(generation, "StepGraph", partial(StepGraph, capture=run_again))
            monkeypatch.setattr(generation._Cached, "_graphed", lambda self: True)
        run = model.generate(PROMPTS, config, context=300, stop=[3, 4])
        list(run)
        runs.append((run.new, run.ended, run.statistics.read))
    assert runs[0] == runs[1]
    assert len(set(map(len, runs[0][0]))) > 1


@torch.no_grad()
def test_what_is_captured_has_as_many_tokens_as_said() -> None:
    model = make()
    cache = prefilled(model)
    with cache.capturing(2), pytest.raises(CacheError, match=r"expected capturing\(1\), got"):
        model(drawn(0, cache.device), cache=cache)
    model(drawn(0, cache.device), cache=cache)
    assert cache.lengths == [len(p) + 1 for p in PROMPTS]


@torch.no_grad()
def test_a_step_reads_nothing_back() -> None:
    """Fake tensors hold no values: what asks for one raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for attention in ("nsa", "dense"):
        with FakeTensorMode():
            model = make(attention)
            cache = model.new_cache(3, ROOM)
            with cache.capturing():
                logits = model(torch.zeros(3, 1, dtype=torch.int64), cache=cache)
        assert logits.shape == (3, 1, VOCAB)


# On a GPU


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Makes an error of what waits for the GPU."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@BOTH
@torch.no_grad()
def test_a_graph_on_a_gpu(attention: str, no_waiting: None) -> None:
    """Replays equal eager steps; neither waits for anything, and replays take no memory."""
    model = make(attention).cuda()
    eager, graphed = prefilled(model), prefilled(model)
    given = [drawn(step, graphed.device) for step in range(40)]
    graph = StepGraph(step_of(model, graphed), graphed, given[0])
    want = torch.stack([torch.zeros(len(PROMPTS), VOCAB, device="cuda")] * len(given))
    got = want.clone()
    want[0] = model(given[0], cache=eager)[:, -1]  # makes kernels
    torch.cuda.set_sync_debug_mode("error")
    for step, tokens in enumerate(given[1:], 1):
        want[step] = model(tokens, cache=eager)[:, -1]
    held = torch.cuda.memory_allocated()
    for step, tokens in enumerate(given):
        got[step].copy_(graph(tokens))
    torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == held
    for mine, theirs in zip(got, want, strict=True):
        assert (mine - theirs).norm() <= 1e-3 * theirs.norm()
    assert graphed.lengths == eager.lengths
    assert graphed.position.tolist() == eager.position.tolist()


@pytest.mark.gpu
@BOTH
def test_generation_with_and_without_a_graph(attention: str) -> None:
    """Texts, what was read for them, and sequences that end at different times."""
    model = make(attention).cuda()
    config = GenerationConfig(max_new_tokens=60, seed=3)
    texts = []
    for graph in (True, False):
        run = model.generate(PROMPTS, config, context=300, stop=[3, 4], graph=graph)
        list(run)
        texts.append((run.new, run.ended, run.statistics.read))
    assert texts[0] == texts[1]
