"""Continuing texts with a language model, token by token.

Shapes: B sequences, T tokens, C vocabulary.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from nsa.errors import ConfigError, DataError, ShapeError, is_int, require, show
from nsa.models.decode_graph import StepGraph
from nsa.models.sampling import Draws, GenerationConfig, sample
from nsa.models.stopping import Stop, Tail, is_token, stop_sequences
from nsa.models.tokens_read import tokens_read

if TYPE_CHECKING:
    from nsa.cache import NSACache
    from nsa.models.dense_cache import DenseCache
    from nsa.models.language_model import LanguageModel

DEFAULT_CHUNK = 4096
"""Tokens of all prompts that go through the model at once."""

Prompts = Sequence[int] | Sequence[Sequence[int]] | Tensor
"""One prompt or several: ints, such as bytes; a tensor is [T] or [B, T]."""

Reason = Literal["stop", "max_new_tokens", "max_length"]


@dataclass(slots=True)
class Statistics:
    """What a :class:`Generation` has done so far."""

    prompt_tokens: int = 0
    """Of all sequences."""
    prefill_seconds: float = 0.0
    """Until the first token of every sequence was there."""
    capture_seconds: float = 0.0
    """To make a CUDA graph of a step, where there is one."""
    new_tokens: int = 0
    """Drawn by steps, of all sequences; those that came from prefill are not counted."""
    decode_seconds: float = 0.0
    """Of these steps."""
    read: float | None = 0.0
    """Key/value tokens that those steps read, over all sequences: those of the blocks that were
    listed, the compressed blocks and the window, averaged over layers and groups of heads. None
    without a cache."""
    dense: int = 0
    """The same if every token before were read."""


def generate(
    model: LanguageModel,
    prompt: Prompts,
    config: GenerationConfig,
    *,
    context: int,
    max_length: int | None = None,
    stop: Stop = None,
    cache: bool | Mapping[str, Any] = True,
    chunk: int = DEFAULT_CHUNK,
    graph: bool | None = None,
) -> Generation:
    """Continue one prompt or a batch of prompts.

    Args:
        model: runs on its own device.
        prompt: at least one token; or a batch of prompts, of any lengths. Sequence i of a batch is
            drawn as it would be alone with ``config.seed + i``.
        config: how tokens are drawn, and how many.
        context: tokens that the model was trained on: it knows no later positions.
        max_length: tokens of a text at most, its prompt included. None: ``context``; more is on
            trust, and a warning says so.
        stop: what ends a text, and is left out of it: a token, bytes (a sequence of tokens), or a
            list of these. Tokens that may be the start of one are held back until it is clear.
        cache: False: without a cache, by a full forward for each token over the ``max_length``
            before it, which a text may then exceed. A mapping: options of :class:`nsa.NSACache`,
            such as ``{"selected_dtype": "e4m3"}``.
        chunk: tokens of all prompts together that go through the model at once: the memory that
            prefill takes is for so many.
        graph: whether steps are replays of a CUDA graph; None: on CUDA, where the backend can.

    Returns:
        An iterator. Of one prompt it gives tokens, of a batch pairs (sequence, token), as soon as
        they are certain.
    """
    return Generation(
        model,
        prompt,
        config,
        context=context,
        max_length=max_length,
        stop=stop,
        cache=cache,
        chunk=chunk,
        graph=graph,
    )


class Generation(Iterator[Any]):
    """What :func:`generate` returns: texts as they grow."""

    def __init__(
        self,
        model: LanguageModel,
        prompt: Prompts,
        config: GenerationConfig,
        *,
        context: int,
        max_length: int | None = None,
        stop: Stop = None,
        cache: bool | Mapping[str, Any] = True,
        chunk: int = DEFAULT_CHUNK,
        graph: bool | None = None,
    ) -> None:
        require(isinstance(config, GenerationConfig), "config", "a GenerationConfig", config)
        require(is_int(context) and context >= 1, "context", "an int >= 1", context)
        require(is_int(chunk) and chunk >= 1, "chunk", "an int >= 1", chunk)
        known = isinstance(cache, (bool, Mapping))
        require(known, "cache", "True, False or options of an NSACache", cache)
        known = graph is None or isinstance(graph, bool)
        require(known, "graph", "None, True or False", graph)
        limit = context if max_length is None else max_length
        require(is_int(limit) and limit >= 1, "max_length", "None or an int >= 1", max_length)
        stops = stop_sequences(stop)
        self.prompts, self.single = _prompts(prompt, model.config.vocab_size)
        if limit > context:
            warnings.warn(
                f"max_length={limit}: the model was trained on {context} tokens; more is untested",
                stacklevel=3,
            )
        if cached := cache is not False:
            self._check_lengths(limit, context)
        self.config = config
        self.new: list[list[int]] = [[] for _ in self.prompts]
        """The tokens given out, of each sequence."""
        self.ended: list[Reason | None] = [None for _ in self.prompts]
        """Why each sequence ended; None: it has not."""
        self.statistics = Statistics(prompt_tokens=sum(map(len, self.prompts)))
        self._limit = limit if cached else None
        self._tails = [Tail(stops) for _ in self.prompts]
        self._drawn, self._read = [0] * len(self.prompts), 0
        self._lengths = [len(prompt) for prompt in self.prompts]
        self._ready: deque[tuple[int, int]] = deque()
        device = next(model.parameters()).device
        self._draws = Draws(config.seed, len(self.prompts), device)
        self._source: _Source
        if cached:
            longest = max(map(len, self.prompts))
            room = min(limit, longest + config.max_new_tokens)
            options = cache if isinstance(cache, Mapping) else {}
            kept = model.new_cache(len(self.prompts), room, **options)
            self._source = _Cached(model, self.prompts, config, kept, chunk, graph)
        else:
            self._source = _Uncached(model, self.prompts, config, limit)
        if config.max_new_tokens == 0:
            self.ended = ["max_new_tokens" for _ in self.prompts]

    def _check_lengths(self, limit: int, context: int) -> None:
        longest = max(map(len, self.prompts))
        if longest >= limit:
            given = "" if limit != context else ", which the model was trained on"
            raise ShapeError(
                f"prompt: expected fewer than max_length={limit} tokens{given}, got {longest}; "
                "shorten it, raise max_length, or pass cache=False (--no-cache), which looks at "
                "the last ones"
            )

    def finished(self, row: int) -> bool:
        """Whether a sequence has ended and all of it has been given out."""
        return self.ended[row] is not None and all(row != other for other, _ in self._ready)

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Any:
        while not self._ready:
            if all(self.ended):
                raise StopIteration
            self._advance()
        row, token = self._ready.popleft()
        self.new[row].append(token)
        return token if self.single else (row, token)

    @torch.inference_mode()
    def _advance(self) -> None:
        """Draw one more token of every sequence that has not ended."""
        first = not any(self._drawn)
        if not first:
            began = time.perf_counter()
            self._source.prepare()
            self.statistics.capture_seconds += time.perf_counter() - began
        began = time.perf_counter()
        drawn, read = self._source.draw(self._draws())
        seconds, statistics = time.perf_counter() - began, self.statistics
        alive = [row for row, reason in enumerate(self.ended) if reason is None]
        if first:
            statistics.prefill_seconds += seconds
        else:
            statistics.decode_seconds += seconds
            statistics.new_tokens += len(alive)
            statistics.read = None
            if read is not None:
                self._read += sum([read[row] for row in alive])
                statistics.read = self._read / self._source.lists
            statistics.dense += sum([self._lengths[row] for row in alive])
        for row in alive:
            self._take(row, drawn[row])
        over = [row for row in alive if self.ended[row]]
        if over and not all(self.ended):
            self._source.drop(over)

    def _take(self, row: int, token: int) -> None:
        if token < 0:
            raise DataError("expected finite logits, got others: the model's weights are not sound")
        self._drawn[row] += 1
        self._lengths[row] += 1
        certain, stopped = self._tails[row].add(token)
        if stopped:
            self.ended[row] = "stop"
        elif self._drawn[row] == self.config.max_new_tokens:
            self.ended[row] = "max_new_tokens"
        elif self._lengths[row] == self._limit:
            self.ended[row] = "max_length"
        if self.ended[row]:
            certain += self._tails[row].flush()
        self._ready.extend([(row, token) for token in certain])


class _Source(Protocol):
    """Where tokens come from."""

    lists: int
    """Layers times groups of heads."""

    def draw(self, uniform: Tensor) -> tuple[list[int], list[int] | None]:
        """The next token of every sequence, and the key/value tokens that its lists have had read,
        if they are counted; those of sequences that have ended mean nothing."""
        ...

    def prepare(self) -> None:
        """Make what a step after the first token needs, once."""
        ...

    def drop(self, rows: list[int]) -> None:
        """Sequences have ended."""
        ...


class _Cached:
    """A cache: prefill in chunks, then a step for each token."""

    def __init__(
        self,
        model: LanguageModel,
        prompts: list[list[int]],
        config: GenerationConfig,
        cache: NSACache | DenseCache,
        chunk: int,
        graph: bool | None,
    ) -> None:
        self._model, self._prompts, self._config = model, prompts, config
        self._chunk, self._graph = chunk, graph
        self._cache = cache
        self._device = self._cache.device
        if graph and self._device.type != "cuda":
            raise ConfigError(f"graph: expected a model on CUDA, got one on {self._device}")
        self.lists = len(self._cache.layers) * self._cache.config.num_kv_heads
        self._step: Callable[[Tensor, Tensor], Tensor] | None = None
        self._drawn: Tensor | None = None

    def draw(self, uniform: Tensor) -> tuple[list[int], list[int] | None]:
        if self._drawn is None:
            self._drawn = sample(self._prefill(), self._config, uniform)
            return self._drawn.tolist(), None
        assert self._step is not None
        # what was drawn for a sequence that has ended need not be a token
        found = self._step(self._drawn.clamp_min(0), uniform)
        self._drawn = found[0]
        drawn, read = found.tolist()
        return drawn, read

    def prepare(self) -> None:
        if self._step is None and self._graphed():
            assert self._drawn is not None
            uniform = torch.zeros(len(self._prompts), dtype=torch.float64, device=self._device)
            self._step = StepGraph(self._run, self._cache, torch.zeros_like(self._drawn), uniform)
        elif self._step is None:
            self._step = self._run

    def drop(self, rows: list[int]) -> None:
        self._cache.free(rows)

    def _prefill(self) -> Tensor:
        """What follows each prompt: logits ``[B, C]``."""
        prompts, B = self._prompts, len(self._prompts)
        width, longest = max(1, self._chunk // B), max(map(len, prompts))
        found: list[Tensor | None] = [None] * B
        for start in range(0, longest, width):
            parts = [prompt[start : start + width] for prompt in prompts]
            counts = [len(part) for part in parts]
            columns = max(counts)
            tokens = torch.tensor([part + [0] * (columns - len(part)) for part in parts])
            logits = self._model(
                tokens.to(self._device),
                cache=self._cache,
                counts=None if min(counts) == columns else counts,
                last_only=True,
            )
            for row, prompt in enumerate(prompts):
                if start < len(prompt) <= start + width:
                    found[row] = logits[row, 0]
        return torch.stack([row for row in found if row is not None])

    def _run(self, tokens: Tensor, uniform: Tensor) -> Tensor:
        """int64 ``[2, B]``: the next tokens, and the key/value tokens that were read for them, over
        all layers and groups of heads."""
        logits = self._model(tokens[:, None], cache=self._cache)[:, -1]
        return torch.stack([sample(logits, self._config, uniform), tokens_read(self._cache)])

    def _graphed(self) -> bool:
        runs = self._model.resolution
        able = runs is None or runs.backend != "reference"
        if self._graph and not able:
            raise ConfigError(f"graph: expected a backend that decodes on a GPU alone, got {runs}")
        return able and self._device.type == "cuda" if self._graph is None else self._graph


class _Uncached:
    """A full forward for each token, over what the model looks back on."""

    lists = 0

    def __init__(
        self,
        model: LanguageModel,
        prompts: list[list[int]],
        config: GenerationConfig,
        context: int,
    ) -> None:
        self._model, self._config, self._context = model, config, context
        self._texts = [list(prompt) for prompt in prompts]
        self._alive = list(range(len(prompts)))
        self._device = next(model.parameters()).device

    def draw(self, uniform: Tensor) -> tuple[list[int], list[int] | None]:
        parts = [self._texts[row][-self._context :] for row in self._alive]
        counts = [len(part) for part in parts]
        # causality hides what stands to the right
        tokens = torch.tensor([part + [0] * (max(counts) - len(part)) for part in parts])
        logits = self._model(tokens.to(self._device), counts=counts, last_only=True)[:, 0]
        rows = torch.tensor(self._alive, device=self._device)
        found = sample(logits, self._config, uniform[rows]).tolist()
        drawn = [-1] * len(self._texts)
        for row, token in zip(self._alive, found, strict=True):
            self._texts[row].append(token)
            drawn[row] = token
        return drawn, None

    def prepare(self) -> None:
        pass

    def drop(self, rows: list[int]) -> None:
        self._alive = [row for row in self._alive if row not in rows]


def _prompts(prompts: object, vocab_size: int) -> tuple[list[list[int]], bool]:
    """Lists of ints, and whether there was one prompt and no batch.

    Raises:
        ShapeError: they are none.
    """
    given = prompts
    if isinstance(prompts, Tensor):
        if prompts.layout != torch.strided or prompts.is_nested or prompts.is_meta:
            raise ShapeError(f"prompt: expected a dense tensor, got {show(prompts)}")
        given = prompts.tolist()
    rows = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    single = not (rows and isinstance(rows[0], Sequence))
    checked = []
    for prompt in [rows] if single else rows:
        tokens = list(prompt) if isinstance(prompt, Sequence) else []
        if not (tokens and all(is_token(x) for x in tokens)):
            raise ShapeError(
                f"prompt: expected one token or more, ints >= 0, got {show(given)}"
                if single
                else f"prompt: expected one token or more in each, ints >= 0, got {show(prompt)}"
            )
        if max(tokens) >= vocab_size:
            raise ShapeError(
                f"prompt: expected tokens in 0 … {vocab_size - 1}, got {show(max(tokens))}"
            )
        checked.append([int(x) for x in tokens])
    return checked, single
