"""A step of decode as a CUDA graph: launched at once, on memory that stays where it is.

B sequences.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nsa.cache import NSACache
from nsa.models.dense_cache import DenseCache

_WARM_UP = 2
"""Runs before the capture: kernels are made in them, and libraries take their workspace."""

Cache = NSACache | DenseCache
Capture = Callable[[Callable[[], Tensor], Cache], tuple[Callable[[], object], Tensor]]


class StepGraph:
    """Replays one step of a model on a cache.

    Lengths, page tables and lists change in place under the graph. It holds for as long as the
    cache's tensors stay where they are, which is while the batch keeps its size.

    Args:
        step: adds one token to every sequence of the cache: tensors -> a tensor. It reads nothing
            back from the device.
        cache: what it adds to; it is as before when the graph has been made.
        inputs: of the first step; their shapes and dtypes are those of all.
        capture: of a function, makes what replays it and the tensor that a replay fills.
    """

    def __init__(
        self,
        step: Callable[..., Tensor],
        cache: Cache,
        *inputs: Tensor,
        capture: Capture | None = None,
    ) -> None:
        self._cache = cache
        self._inputs = [x.clone() for x in inputs]
        make = _capture if capture is None else capture
        self._replay, self._out = make(lambda: step(*self._inputs), cache)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Take one step; the tensor that it returns is overwritten by the next.

        Raises:
            CacheError: the cache has no room; nothing has changed.
        """
        self._cache.advance()
        for kept, new in zip(self._inputs, inputs, strict=True):
            kept.copy_(new)
        self._replay()
        return self._out


def _capture(run: Callable[[], Tensor], cache: Cache) -> tuple[Callable[[], object], Tensor]:
    with torch.cuda.device(cache.device):
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        for _ in range(_WARM_UP):
            with cache.capturing():
                side.wait_stream(here)
                with torch.cuda.stream(side):
                    run()
                here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with cache.capturing(), torch.cuda.graph(graph):
            out = run()
    return graph.replay, out
