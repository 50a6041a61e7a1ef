"""What a training run logs of its attention (``--log-attention-every``).

One validation sequence, always the same, is run forward without gradients; of every layer it keeps
mean gates, the overlap of lists with the token before, and the score that lists keep. Training is
as it is without it: no random number is drawn, nothing that is compiled is compiled anew.
"""

from __future__ import annotations

import time

import torch

from nsa.inspection import Brief, briefs, complaints, record
from nsa.training.data import validation_batches
from nsa.training.trainer import Trainer


class AttentionLog:
    """Looks at a model's attention while it trains."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._told: list[str] = []

    def metrics(self) -> tuple[dict[str, float], list[str]]:
        """Run the sequence.

        Returns:
            Scalars by name, as ``attention.0.gate.window`` for layer 0, with the seconds that this
            took; and what is likely to go wrong, each kind once until its layers change.
        """
        start = time.perf_counter()
        layers = self._briefs()  # numbers on the CPU: whatever runs elsewhere has ended
        seconds = time.perf_counter() - start
        found = complaints(layers)
        new = [text for text in found if _without_numbers(text) not in self._told]
        self._told = [_without_numbers(text) for text in found]
        return _scalars(layers) | {"attention.seconds": round(seconds, 4)}, new

    @torch.no_grad()
    def _briefs(self) -> list[Brief]:
        trainer, train = self._trainer, self._trainer.config.train
        model = trainer.model.eval()
        ((tokens, _),) = validation_batches(
            trainer.corpus, count=1, batch_size=1, seq_len=train.seq_len
        )
        with (
            torch.autocast(trainer.device.type, torch.bfloat16, enabled=train.precision == "bf16"),
            torch.compiler.set_stance("force_eager"),
            record(model) as recording,
        ):
            model(tokens.to(trainer.device))
        return briefs(recording)


def _scalars(layers: list[Brief]) -> dict[str, float]:
    found: dict[str, float] = {}
    for i, layer in enumerate(layers):
        found |= {f"attention.{i}.gate.{branch}": x for branch, x in layer.gates.items()}
        for name in ("overlap_token", "mass_kept", "same_a_block_later"):
            value = getattr(layer, name)
            if value is not None:
                found[f"attention.{i}.{name}"] = value
    return {name: round(value, 4) for name, value in found.items()}


def _without_numbers(text: str) -> str:
    return text.rpartition(" (")[0]
