"""The speed of a training run."""

from __future__ import annotations

import time

from nsa.training.trainer import Trainer


class Clock:
    """Measures speed since its last reading; validations and saves do not count."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.restart()

    def restart(self) -> None:
        """Begin to measure now."""
        self._step, self._time = self._trainer.step, time.perf_counter()

    def tokens_per_second(self) -> float:
        """The speed since the last call; the next begins now."""
        steps = self._trainer.step - self._step
        elapsed = time.perf_counter() - self._time
        self.restart()
        return steps * self._trainer.tokens_per_step / max(elapsed, 1e-9)
