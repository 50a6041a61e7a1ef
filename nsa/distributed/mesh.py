"""The mesh of a training run, and what a step, a validation and a checkpoint ask of it.

A mesh changes speed and memory, and nothing else: the batch of a step is the same on any.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nsa.distributed.ranks import Ranks
from nsa.errors import UsageError, is_int, require
from nsa.models import LanguageModel

ALONE = {"dp": 1, "cp": 1, "tp": 1}
"""The sizes of a mesh of one process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig:
    """How the processes of ``torchrun`` share the work.

    Raises :class:`nsa.ConfigError` when a value is out of range.
    """

    dp: int | None = None
    """Processes that share a batch, each with its sequences and a part of every parameter (FSDP2);
    by default all that --cp and --tp leave."""
    cp: int = 1
    """Processes that share each sequence."""
    tp: int = 1
    """Processes that share the heads of every layer; must divide --num-kv-heads."""

    def __post_init__(self) -> None:
        for name in ("dp", "cp", "tp"):
            value = getattr(self, name)
            good = (name == "dp" and value is None) or (is_int(value) and value >= 1)
            require(good, f"--{name}", "an int >= 1", value)

    def sizes(self, processes: int) -> dict[str, int]:
        """The size of each dimension, the slowest first.

        Raises:
            UsageError: they do not multiply to the number of processes.
        """
        inner = self.cp * self.tp
        dp = self.dp or max(1, processes // inner)
        if dp * inner != processes:
            given = [f"--{name} {getattr(self, name)}" for name in ("dp", "cp", "tp")]
            total, more = dp * inner, ""
            if self.dp is None:
                del given[0]
                total, more = inner, " or a multiple of that"
            raise UsageError(
                f"{' '.join(given)}: expected {total} processes{more}, got {processes}; start it "
                f"with torchrun --nproc-per-node {total} -m …"
            )
        return {"dp": dp, "cp": self.cp, "tp": self.tp}


class OwnParameters:
    """What the optimizer of one process updates: with one process, a model's own parameters."""

    parts: dict[str, nn.Parameter]
    """By the names that the model has for them."""

    def __init__(self, model: nn.Module) -> None:
        self.parts = dict(model.named_parameters())

    def zero_grad(self) -> None:
        """Before a step: drop the gradients of the last one."""
        for parameter in self.parts.values():
            parameter.grad = None

    def clip(self, limit: float) -> Tensor:
        """After backward: clip the gradients to a norm of all of them; returns what it was."""
        return nn.utils.clip_grad_norm_(self.parts.values(), limit)

    def whole(self, name: str, value: Tensor) -> Tensor:
        """What an optimizer keeps of a part, sharded as its parameter is, in the same memory."""
        return value


class Mesh:
    """One process: nothing is shared, and nothing is sent.

    Args:
        device: where it computes.
    """

    def __init__(self, device: torch.device, ranks: Ranks | None = None) -> None:
        self.device = device
        self.ranks = ranks or Ranks()
        self.sizes = dict(ALONE)

    def place(self, model: LanguageModel) -> LanguageModel:
        """Move a model to the device, and split its layers; before it is compiled."""
        return model.to(self.device)

    def shard(self, model: LanguageModel) -> LanguageModel:
        """Shard its parameters; after."""
        return model

    def rows(self, count: int) -> slice:
        """This process's sequences of a batch of so many."""
        return slice(0, count)

    @contextlib.contextmanager
    def sequences(self, length: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """Surround passes over sequences of so many tokens, forward and backward; yields what takes
        this process's tokens out of ``[B, T]``."""
        yield lambda x: x

    def mean(self, loss: Tensor) -> Tensor:
        """The mean of all processes' losses, each of as many bytes."""
        return loss

    def total(self, value: float) -> float:
        """The sum of numbers over all parts of a batch."""
        return value

    def parameters(self, model: nn.Module) -> OwnParameters:
        """What an optimizer of this process updates; once the model is sharded."""
        return OwnParameters(model)

    def gather(self, tensor: Tensor) -> Tensor:
        """All parts of a tensor, for rank 0; every process calls it."""
        return tensor

    def spread(self, read: Callable[[], Tensor], into: Tensor) -> None:
        """Copy a whole tensor, which rank 0 alone reads, into the parts of another."""
        into.copy_(read())
