"""``--compile``: which part of a step ``torch.compile`` sees, and what is said about it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from nsa.errors import NSAError, UsageError
from nsa.models import LanguageModel
from nsa.training.compile_cache import CacheUse, CompileCache

COMPILER = "inductor"
"""The ``torch.compile`` backend; tests that ask about structure alone name a cheaper one."""


class CompileFailed(NSAError):
    """``torch.compile`` could not make a graph or code of the model; nothing ran in its place."""


def loss_function(model: LanguageModel, mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the model's loss, compiled as ``--compile`` says.

    Lengths are constants of the code: a run has one length and few batch sizes.
    """
    if mode == "model":
        return model.compile_loss(backend=COMPILER, dynamic=False)
    if mode == "blocks":
        model.compile_blocks(backend=COMPILER, dynamic=False)
    return model.loss


class Compilation:
    """What a run says about compiling, and the file of compiled code that it keeps.

    Args:
        mode: of ``--compile``; for "none" nothing is said.
        device: where the code will run.
        cache: the file of ``--compile-cache``, or None.

    Raises:
        UsageError: a file, and nothing to compile.
        ConfigError: a file that cannot be read or written.
    """

    def __init__(self, mode: str, device: torch.device, cache: str | None) -> None:
        self.mode = mode
        if mode == "none" and cache is not None:
            raise UsageError(
                "--compile-cache: expected --compile blocks or --compile model with it, got neither"
            )
        self._cache = None if cache is None else CompileCache(Path(cache), device)
        self._device = device

    @contextlib.contextmanager
    def session(self, say: Callable[[str], None]) -> Iterator[None]:
        """Surround everything that may compile: load the file before, and turn what
        ``torch.compile`` raises into one line. ``say`` prints a line.

        Raises:
            CompileFailed: with the first line of its reason.
            NSAError: the error of this library that ended the trace, such as BackendUnavailable.
        """
        if self.mode == "none":
            yield
            return
        from torch._dynamo import exc  # heavy, and needed for compiling alone

        if self._cache is not None:
            self._cache.load(say)
        self._use = CacheUse()
        say(f"compiling (--compile {self.mode}): the first step takes longer…")
        self._begun = time.perf_counter()
        try:
            yield
        except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
            raise own_error(error) or CompileFailed(
                f"--compile {self.mode}: torch.compile failed: {first_words(error)}; train without "
                "it: --compile none"
            ) from error

    def ready(self, say: Callable[[str], None], what: str) -> None:
        """Say how long compiling took; call once, after the first ``what``."""
        if self.mode == "none":
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._begun
        say(f"first {what} after {seconds:.1f} s, compiled: {self.mode}, cache: {self._use}")
        self.keep(say)

    def keep(self, say: Callable[[str], None]) -> None:
        """Write the file if it lacks anything; call after what may have compiled."""
        if self._cache is None:
            return
        taken, compiled = self._use.since_last_call()
        if compiled or (taken and not self._cache.loaded):
            self._cache.save(say)


def own_error(error: BaseException) -> NSAError | torch.OutOfMemoryError | None:
    """Find the error of this library, or of a full device, behind one of ``torch.compile``."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, NSAError):
            return type(cause)(str(cause).partition("\n\nfrom user code")[0])  # appended by torch
        if isinstance(cause, torch.OutOfMemoryError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def first_words(error: BaseException) -> str:
    """Take the first line of torch's reason, and the second where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    if first.endswith(":") and len(lines) > 1:  # "backend='inductor' raised:"
        first += f" {lines[1]}"
    return first
