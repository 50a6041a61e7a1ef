"""Sampling from a model: how a token is drawn, what the model is shown, where it ends."""

import pytest
import torch

from nsa import ConfigError, ShapeError
from nsa.models import GenerationConfig, generate
from nsa.models.generation import sample

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0], dtype=torch.float64)


def shares(**options: object) -> list[float]:
    """How often each token is drawn, of 4000."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sample(LOGITS, GenerationConfig(**options), generator)] += 1
    return (counts / 4000).tolist()


def test_greedy():
    assert sample(LOGITS, GenerationConfig(temperature=0)) == 1
    assert sample(torch.zeros(5), GenerationConfig(temperature=0)) == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature(temperature):
    expected = (LOGITS / temperature).softmax(0).tolist()
    assert shares(temperature=temperature) == pytest.approx(expected, abs=0.03)


def test_top_k():
    assert shares(temperature=1.0, top_k=1) == [0, 1, 0, 0]
    expected = torch.tensor([3.0, 2.0]).softmax(0).tolist()
    drawn = shares(temperature=1.0, top_k=2)
    assert [drawn[1], drawn[2]] == pytest.approx(expected, abs=0.03)
    assert drawn[0] == drawn[3] == 0
    assert shares(temperature=1.0, top_k=99)[3] > 0


def test_top_p():
    # In order 0.657, 0.242, 0.089, 0.012.
    assert shares(temperature=1.0, top_p=1e-9) == [0, 1, 0, 0]
    assert shares(temperature=1.0, top_p=0.65) == [0, 1, 0, 0]
    drawn = shares(temperature=1.0, top_p=0.67)
    assert drawn[0] == drawn[3] == 0
    assert drawn[1] == pytest.approx(0.657 / 0.899, abs=0.03)
    assert shares(temperature=1.0, top_p=1.0)[3] > 0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"temperature": -1.0}, "--temperature: expected a finite number >= 0, got -1.0"),
        ({"temperature": float("nan")}, "--temperature: .* got nan"),
        ({"top_k": 0}, "--top-k: expected an int >= 1, got 0"),
        ({"top_p": 0.0}, r"--top-p: expected a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"--top-p: expected a number in \(0, 1\], got 1.1"),
        ({"max_new_tokens": -1}, "--max-new-tokens: expected an int >= 0, got -1"),
        ({"seed": 2**63}, r"--seed: expected an int in \[0, 2\*\*63\), got 9"),
    ],
)
def test_the_configuration_refuses(changes, text):
    with pytest.raises(ConfigError, match=text):
        GenerationConfig(**changes)


class Scripted(torch.nn.Module):
    """Says one byte after the other, and remembers how much it was shown."""

    def __init__(self, script: bytes) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.script, self.seen = list(script), []

    def forward(self, tokens):
        self.seen.append(tokens[0].tolist())
        logits = torch.zeros(*tokens.shape, 256)
        logits[0, -1, self.script[len(self.seen) - 1]] = 50.0
        return logits


def test_it_stops_at_the_end_of_the_document():
    model = Scripted(b"ab\0c")
    config = GenerationConfig(max_new_tokens=9)
    assert bytes(generate(model, b"\0", config, context=8, stop=0)) == b"ab"


def test_the_context_is_never_longer_than_in_training():
    model = Scripted(b"efgh")
    config = GenerationConfig(max_new_tokens=4)
    assert bytes(generate(model, b"\0abcd", config, context=3, stop=0)) == b"efgh"
    assert [bytes(seen) for seen in model.seen] == [b"bcd", b"cde", b"def", b"efg"]


@pytest.mark.parametrize("prompt", [[], None, [1.5], "ab", [-1], [10**30]])
def test_a_prompt_is_tokens(prompt):
    with pytest.raises(ShapeError, match=r"^prompt: expected one token or more, ints >= 0, got "):
        next(generate(Scripted(b"a"), prompt, GenerationConfig(), context=8))


def test_a_temperature_close_to_zero_takes_the_likeliest():
    logits = torch.tensor([0.0, 3.0, 2.0], dtype=torch.float64)
    assert sample(logits, GenerationConfig(temperature=1e-300)) == 1
