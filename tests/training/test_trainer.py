"""What a step does to the parameters, against AdamW written out."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from nsa.training.data import load_corpus, training_batch
from nsa.training.trainer import Trainer
from tests.support.training_runs import config_of, write_texts

STEPS = 4


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_steps_are_adamw_by_the_formula(tmp_path, clip):
    """Rates, clipping, accumulation, the decay of matrices alone: in fp64."""
    data = write_texts(tmp_path / "data")
    changes = {
        "accumulate": 2, "grad_clip": clip, "lr": 0.01, "min_lr": 0.3, "warmup": 2, "steps": STEPS,
        "weight_decay": 0.4, "beta1": 0.7, "beta2": 0.8, "seed": 5, "batch_size": 3,
    }  # fmt: skip
    corpus = load_corpus(str(data))
    trainer = Trainer(config_of(data, **changes), corpus)
    trainer.model.double()
    model = copy.deepcopy(trainer.model)
    named = dict(model.named_parameters())
    mean = {name: torch.zeros_like(p) for name, p in named.items()}
    square = {name: torch.zeros_like(p) for name, p in named.items()}
    rates = [0.005, 0.01, 0.01, 0.01 * (0.3 + 0.7 * 0.5)]
    for step in range(STEPS):
        batches = [
            training_batch(corpus, seed=5, index=2 * step + half, batch_size=3, seq_len=48)
            for half in range(2)
        ]
        tokens, targets = (torch.cat(halves) for halves in zip(*batches, strict=True))
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        result = trainer.train_step()
        assert trainer.step == step + 1
        assert float(result.loss) == pytest.approx(loss.item(), rel=1e-6)
        assert float(result.grad_norm) == pytest.approx(norm, rel=1e-9)
        assert clip > 1 or norm > clip
        with torch.no_grad():
            for name, parameter in named.items():
                g = gradients[name] * min(1.0, clip / (norm + 1e-6))
                mean[name] = 0.7 * mean[name] + 0.3 * g
                square[name] = 0.8 * square[name] + 0.2 * g * g
                m = mean[name] / (1 - 0.7 ** (step + 1))
                v = square[name] / (1 - 0.8 ** (step + 1))
                decay = 0.4 if parameter.ndim >= 2 else 0.0
                parameter.mul_(1 - rates[step] * decay)
                parameter.sub_(rates[step] * m / (v.sqrt() + 1e-8))
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-6, atol=1e-9, msg=name)
