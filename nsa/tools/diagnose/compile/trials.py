"""A tiny language model's loss as one graph, backend by backend: graphs, breaks, recompiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from subprocess import SubprocessError
from typing import Any

import torch
from torch import Tensor

from nsa.backends import TABLE, unavailable
from nsa.config import NSAConfig
from nsa.core.compile import static_floats
from nsa.models import LanguageModel, ModelConfig
from nsa.tools.common.failures import failures, one_line
from nsa.tools.common.problems import Trial, small_trials
from nsa.training.compile import first_words, own_error

COMPILERS = ("aot_eager", "eager", "inductor")
"""What ``--compile`` takes, the default first: eager makes graphs, aot_eager a forward and a
backward of each, inductor code of those."""
CONFIG = ModelConfig(dim=32, num_layers=1, nsa=NSAConfig.preset("tiny"))
NEVER = {
    "reference": "the oracle is there to be read; it takes lengths of packed sequences out of "
    "tensors, which a graph cannot"
}
"""Backends that are not compiled, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompile:
    """A length that came after the warm-up and needed a graph of its own."""

    length: int
    reason: str
    """The guard that failed, in torch's words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileTrial:
    """The graphs that one backend makes of one kind of input."""

    backend: str
    kind: str
    graphs: int
    breaks: tuple[str, ...]
    """Why the graph broke, in torch's words, once for each break."""
    recompiles: tuple[Recompile, ...]
    failure: str | None
    """What ended it, in torch's words."""
    seconds: float

    @property
    def ok(self) -> bool:
        return not (self.breaks or self.recompiles or self.failure) and self.graphs > 0


def lengths(config: NSAConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of the warm-up, each of which has a graph of its own, and of what comes after it.

    One token, no compressed block, one of them, and twice the selection block; past that one graph
    serves every length.
    """
    block = config.compress_block
    return (1, block - 1, block, 2 * config.select_block), (block + 1, 100, 1000)


def plan_trials(
    device: torch.device, backend: str | None
) -> tuple[list[tuple[str, Trial]], dict[str, str]]:
    """Plan what is to be compiled; returns as well the backends that are not, with the reason.

    ``backend`` is the only one; None or "auto" means all that can run.
    """
    longest = max(max(of) for of in lengths(CONFIG.nsa))
    small = small_trials(device)
    kinds = [replace(trial, lengths=(longest,)) for trial in small if trial.dtype == small[0].dtype]
    planned: list[tuple[str, Trial]] = []
    left_out = {}
    for name in TABLE if backend in (None, "auto") else (backend,):
        fit = [trial for trial in kinds if unavailable(name, trial.problem) is None]
        if name in NEVER:
            left_out[name] = NEVER[name]
        elif fit:
            planned += [(name, trial) for trial in fit]
        else:
            left_out[name] = "cannot run here, as the table of backends says"
    return planned, left_out


def compile_trial(
    backend: str, trial: Trial, compiler: str, say: Callable[[str], None]
) -> CompileTrial:
    """Compile and run one backend on one kind of input, forward and backward; ``say`` is told what
    is next."""
    from torch._dynamo import exc  # heavy: only who compiles needs it
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    begun = time.perf_counter()
    recompiles: list[Recompile] = []
    ended: Exception | None = None
    try:
        step = _step(backend, trial, compiler)
        warm_up, after = lengths(CONFIG.nsa)
        for length in (*warm_up, *after):
            say(f"{backend}, {trial.kind}: T = {length:,}, {compiler}")
            if length in warm_up:
                step(length)
            else:
                recompiles += _recompile(step, length)
    except _compile_errors() as error:
        ended = error
    graphs = counters["stats"]["unique_graphs"]
    failure = None if graphs else "nothing was compiled"
    broke = isinstance(ended, (exc.Unsupported, exc.UserError))
    found = CompileTrial(
        backend=backend,
        kind=trial.kind,
        graphs=graphs,
        breaks=_breaks(backend, trial) if broke else (),
        recompiles=tuple(recompiles),
        failure=failure if ended is None else _reason(ended),
        seconds=round(time.perf_counter() - begun, 1),
    )
    torch._dynamo.reset()
    return found


def _compile_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import FailOnRecompileLimitHit

    return (*failures(), OSError, SubprocessError, FailOnRecompileLimitHit)


def faults(trial: CompileTrial) -> Iterator[str]:
    """Say what is wrong with a result, a line for each fault."""
    where = f"compile, {trial.backend}, {trial.kind}"
    for reason in dict.fromkeys(trial.breaks):
        yield f"{where}: graph break: {reason}"
    for recompile in trial.recompiles:
        yield f"{where}: recompiled at {recompile.length:,} tokens: {recompile.reason}"
    if trial.failure is not None and not trial.breaks:
        yield f"{where}: {trial.failure}"


def _step(
    backend: str, trial: Trial, compiler: str, *, fullgraph: bool = True
) -> Callable[[int], None]:
    """Forward and backward of the compiled loss, by the number of tokens."""
    device, half = trial.device, trial.dtype
    model = LanguageModel(CONFIG, backend=backend, device=device)
    weights = list(model.parameters())
    loss_of = torch.compile(model.loss, fullgraph=fullgraph, dynamic=True, backend=compiler)

    def step(length: int) -> None:
        tokens, packing = _batch(length, trial)
        # as the trainer does it
        autocast = torch.autocast(device.type, half, enabled=half != torch.float32)
        with static_floats(), autocast:
            loss = loss_of(tokens, tokens, **packing)
        torch.autograd.grad(loss, weights)
        if device.type == "cuda":  # a kernel that fails says so late
            torch.cuda.synchronize(device)

    return step


def _batch(length: int, trial: Trial) -> tuple[Tensor, dict[str, Any]]:
    shape = (1, length) if trial.packed else (2, length)
    tokens = torch.randint(CONFIG.vocab_size, shape, device=trial.device)
    if not trial.packed:
        return tokens, {}
    cut = length // 3
    cu_seqlens = torch.tensor([0, cut, cut, length], dtype=torch.int32, device=trial.device)
    return tokens, {"cu_seqlens": cu_seqlens, "max_seqlen": max(length - cut, 2)}


def _recompile(step: Callable[[int], None], length: int) -> list[Recompile]:
    """Run a step that must find its graph made; make it where there is none."""
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            step(length)
    except RuntimeError as error:
        if "recompile" not in str(error).lower():
            raise
        lines = [line.strip(" -") for line in str(error).splitlines()]
        guards = [line for line in lines[1:] if line and not line.startswith("triggered by")]
        step(length)
        return [Recompile(length=length, reason=guards[0] if guards else lines[0])]
    return []


def _breaks(backend: str, trial: Trial) -> tuple[str, ...]:
    """Find where the graph breaks, by letting torch make several of what could not be one.

    From torch's counters: ``torch._dynamo.explain`` shows no break before the first operator of a
    frame, in a loop or in a ``with``, and traces without dynamic shapes.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    try:
        _step(backend, trial, "eager", fullgraph=False)(lengths(CONFIG.nsa)[0][-1])
    except _compile_errors():
        return ()  # it is no break that ended it
    return tuple(_first_two(reason) for reason in counters["graph_break"].elements())


def _first_two(text: str) -> str:
    """The headline of a graph break, and its explanation."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines[1:2] if line.startswith("Explanation: ")]
    return ": ".join(line.removeprefix("Explanation: ") for line in lines[:1] + told)


def _reason(error: BaseException) -> str:
    """Why it failed: this library's own error where there is one, else torch's first words."""
    from torch._dynamo import exc

    own = own_error(error)
    if own is not None:
        return str(own)
    if isinstance(error, exc.Unsupported):
        return _first_two(str(error))
    if not isinstance(error, RuntimeError):
        return one_line(error)
    # what a compiler of C++ has to say comes late
    said = [line.strip() for line in str(error).splitlines() if " error: " in line]
    return ": ".join([first_words(error), *said[:1]])
