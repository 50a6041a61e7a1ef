"""How a token is drawn."""

import pytest
import torch

from nsa import ConfigError
from nsa.models import GenerationConfig
from nsa.models.sampling import Draws, sample

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0], dtype=torch.float64)  # 0.089, 0.657, 0.242, 0.012
CPU = torch.device("cpu")


def one(logits: torch.Tensor, uniform: float = 0.5, **options: object) -> int:
    draw = torch.tensor([uniform], dtype=torch.float64)
    return int(sample(logits[None], GenerationConfig(**options), draw))


def shares(**options: object) -> list[float]:
    """How often each token is drawn, of 4000."""
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = sample(LOGITS.expand(4000, 4), GenerationConfig(**options), uniform)
    return (drawn.bincount(minlength=4) / 4000).tolist()


def test_greedy():
    assert one(LOGITS, temperature=0) == 1
    assert one(torch.zeros(5), temperature=0) == 0


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
    assert shares(temperature=1.0, top_p=1e-9) == [0, 1, 0, 0]
    assert shares(temperature=1.0, top_p=0.65) == [0, 1, 0, 0]
    drawn = shares(temperature=1.0, top_p=0.67)
    assert drawn[0] == drawn[3] == 0
    assert drawn[1] == pytest.approx(0.657 / 0.899, abs=0.03)
    assert shares(temperature=1.0, top_p=1.0)[3] > 0


def test_min_p():
    assert shares(temperature=1.0, min_p=1.0) == [0, 1, 0, 0]
    drawn = shares(temperature=1.0, min_p=0.36)  # 0.242 / 0.657 is 0.368
    assert drawn[0] == drawn[3] == 0
    assert drawn[1] == pytest.approx(0.657 / 0.899, abs=0.03)
    assert shares(temperature=1.0, min_p=0.37) == [0, 1, 0, 0]
    assert shares(temperature=1.0, min_p=1e-9)[3] > 0


def test_the_ends_of_a_draw():
    options = {"temperature": 1.0, "top_p": 0.95}
    assert one(LOGITS, 0.0, **options) == 1
    assert one(LOGITS, 1 - 2**-53, **options) == 0  # the last one kept
    far = torch.tensor([0.0, -1e9])
    assert one(far, 1 - 2**-53, temperature=1.0) == 0


def test_a_temperature_close_to_zero_takes_the_likeliest():
    assert one(torch.tensor([0.0, 3.0, 2.0]), temperature=1e-300) == 1


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_no_token(temperature, value):
    logits = torch.tensor([[0.0, value], [0.0, 9.0]])
    drawn = sample(logits, GenerationConfig(temperature=temperature), torch.full((2,), 0.5))
    assert drawn.tolist() == [-1, 1]


def test_each_sequence_has_draws_of_its_own():
    many, alone = Draws(5, 3, CPU), [Draws(seed, 1, CPU) for seed in (5, 6, 7)]
    for _ in range(70):  # more than are drawn ahead
        drawn = many()
        assert drawn.tolist() == [float(draws()) for draws in alone]
    assert len(set(drawn.tolist())) == 3
    assert 0 <= float(Draws(2**63 - 1, 2, CPU)()[1]) < 1  # the next seed is 0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"temperature": -1.0}, "--temperature: expected a finite number >= 0, got -1.0"),
        ({"temperature": float("nan")}, "--temperature: .* got nan"),
        ({"top_k": 0}, "--top-k: expected an int >= 1, got 0"),
        ({"top_p": 0.0}, r"--top-p: expected a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"--top-p: expected a number in \(0, 1\], got 1.1"),
        ({"min_p": 0}, r"--min-p: expected a number in \(0, 1\], got 0"),
        ({"min_p": "x"}, r"--min-p: expected a number in \(0, 1\], got 'x'"),
        ({"max_new_tokens": -1}, "--max-new-tokens: expected an int >= 0, got -1"),
        ({"seed": 2**63}, r"--seed: expected an int in \[0, 2\*\*63\), got 9"),
    ],
)
def test_the_configuration_refuses(changes, text):
    with pytest.raises(ConfigError, match=text):
        GenerationConfig(**changes)
