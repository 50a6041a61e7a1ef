"""Continuing texts: the cache changes nothing, a batch changes nothing, and where texts end."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nsa import CacheError, ConfigError, DataError, NSAConfig, ShapeError
from nsa.models import GenerationConfig, LanguageModel, ModelConfig, generate
from nsa.models.stopping import Tail, stop_sequences

CONFIG = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    compress_block=8,
    compress_stride=4,
    select_block=16,
    num_selected=4,
    window=24,
)
VOCAB = 40
GREEDY = GenerationConfig(temperature=0, max_new_tokens=40)
DRAWN = GenerationConfig(temperature=1.0, top_p=0.95, min_p=0.001, max_new_tokens=40, seed=3)
BOTH = pytest.mark.parametrize("attention", ["nsa", "dense"])
PROMPTS = [[1, 2, 3], list(range(31)), [5] * 11, [7]]
"""Of lengths before, at and after the first compressed and selected blocks."""


def make(attention: str = "nsa", **nsa: object) -> LanguageModel:
    """A model whose logits are far apart: rounding decides nothing."""
    torch.manual_seed(0)
    config = ModelConfig(
        dim=32,
        num_layers=2,
        vocab_size=VOCAB,
        attention=attention,
        nsa=replace(CONFIG, **nsa),
        tied_embeddings=False,
    )
    model = LanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model.eval()


def texts(model: LanguageModel, prompts: list[list[int]], *args: object, **options: object):
    run = model.generate(prompts, *args, context=300, **options)
    for _ in run:
        pass
    return run.new


# The cache changes nothing


@BOTH
def test_greedy_tokens_are_those_of_full_forwards(attention):
    """Or differ where the two best logits are within 1e-4."""
    model, prompt = make(attention), PROMPTS[1]
    cached = list(model.generate(prompt, replace(GREEDY, max_new_tokens=200), context=300))
    logits = model(torch.tensor([prompt + cached]))[0, len(prompt) - 1 : -1]
    best = logits.topk(2).values
    different = (logits.argmax(-1) != torch.tensor(cached)).nonzero().flatten().tolist()
    assert len(cached) == 200
    assert not different or best[different[0], 0] - best[different[0], 1] <= 1e-4
    assert len(set(cached)) > 10


@BOTH
def test_a_batch_is_each_alone_with_a_cache_and_without(attention):
    model = make(attention)
    together = texts(model, PROMPTS, DRAWN, chunk=16)
    assert together == texts(model, PROMPTS, DRAWN, cache=False)
    for row, prompt in enumerate(PROMPTS):
        alone = replace(DRAWN, seed=DRAWN.seed + row)
        assert list(model.generate(prompt, alone, context=300)) == together[row]
    assert together[0] != together[3]


@BOTH
@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
def test_prefill_in_any_chunks(attention, chunk):
    model, rng = make(attention), random.Random(chunk)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in (50, 3, 33)]
    few = replace(DRAWN, max_new_tokens=5)
    assert texts(model, prompts, few, chunk=chunk) == texts(model, prompts, few)


@pytest.mark.parametrize(
    "changes", [{"select_share": 4}, {"select_schedule": ((40, 3),)}, {"independent_kv": False}]
)
def test_options_of_the_attention(changes):
    model = make(**changes)
    few = PROMPTS[1:3]
    assert texts(model, few, GREEDY) == texts(model, few, GREEDY, cache=False)


@torch.no_grad()
def test_options_of_the_cache():
    model, options = make(), {"selected_dtype": "e4m3"}
    prompt, few = list(PROMPTS[1]), GenerationConfig(max_new_tokens=12, temperature=0)
    cache = model.new_cache(1, len(prompt) + 12, **options)
    row, want = prompt, []
    for _ in range(12):
        row = [int(model(torch.tensor([row]), cache=cache)[0, -1].argmax())]
        want += row
    assert list(model.generate(prompt, few, context=200, cache=options)) == want
    with pytest.raises(ConfigError, match="options: expected none for a dense model's cache"):
        make("dense").generate(prompt, few, context=200, cache=options)


def test_the_memory_of_prefill_is_that_of_a_chunk(monkeypatch):
    shapes = []
    model = make()
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda tokens, **call: shapes.append(tokens.shape) or forward(tokens, **call),
    )
    texts(model, PROMPTS, replace(GREEDY, max_new_tokens=2), chunk=20)
    assert shapes == [*[(4, 5)] * 6, (4, 1), (4, 1)]


def test_seeds():
    model = make()
    one, again, other = (texts(model, PROMPTS[:1], replace(DRAWN, seed=seed)) for seed in (1, 1, 2))
    assert one == again != other


# Where texts end


def test_sequences_end_on_their_own():
    """One at a token, one at its length, the others go on as if alone."""
    model = make()
    whole = texts(model, PROMPTS, DRAWN)
    end = whole[0][10]
    stopped = model.generate(PROMPTS, DRAWN, context=300, stop=end)
    pairs = list(stopped)
    for row, text in enumerate(whole):
        expected = text[: text.index(end)] if end in text else text
        assert [token for other, token in pairs if other == row] == expected == stopped.new[row]
        assert stopped.ended[row] == ("stop" if end in text else "max_new_tokens")
    assert len({len(text) for text in stopped.new}) > 1


def test_the_longest_text_counts_its_prompt():
    run = make().generate(PROMPTS, GREEDY, context=40)
    for _ in run:
        pass
    assert [len(p) + len(new) for p, new in zip(PROMPTS, run.new, strict=True)] == [40] * 4
    assert run.ended == ["max_length"] * 4


def test_longer_than_trained_only_if_asked():
    model = make()
    with pytest.warns(UserWarning, match="max_length=45: the model was trained on 40 tokens"):
        run = model.generate(PROMPTS[1], GREEDY, context=40, max_length=45)
    assert len(list(run)) == 45 - len(PROMPTS[1])
    text = r"expected fewer than max_length=31 tokens, which the model was trained on, got 31; "
    with pytest.raises(ShapeError, match=text):
        model.generate(PROMPTS[1], GREEDY, context=31)


class Scripted(torch.nn.Module):
    """Says one byte after the other, and remembers how much it was shown."""

    config = SimpleNamespace(vocab_size=256)

    def __init__(self, script: bytes) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.script, self.seen = list(script), []

    def forward(self, tokens, **options):
        self.seen.append(tokens[0].tolist())
        logits = torch.zeros(*tokens.shape, 256)
        logits[0, -1, self.script[len(self.seen) - 1]] = 50.0
        return logits[:, -1:]


def test_without_a_cache_the_context_slides():
    model = Scripted(b"efgh")
    config = GenerationConfig(max_new_tokens=4)
    run = generate(model, b"\0abcd", config, context=3, stop=0, cache=False)
    assert bytes(run) == b"efgh"
    assert [bytes(seen) for seen in model.seen] == [b"bcd", b"cde", b"def", b"efg"]


@pytest.mark.parametrize(
    ("script", "stop", "text", "reason"),
    [
        (b"ab\0c", 0, b"ab", "stop"),
        (b"one, two.", [b", t"], b"one", "stop"),
        (b"aaab....", [b"aab"], b"a", "stop"),
        (b"ababac..", [b"abac", 0], b"ab", "stop"),
        (b"one two ", [b"two.", b"x"], b"one two ", "max_new_tokens"),
        (b"xabcd...", [b"bc", b"abc"], b"x", "stop"),
        (b"abcdefgh", b"abcdefgh", b"", "stop"),
        (b"abcdefg.", b"abcdefgh", b"abcdefg.", "max_new_tokens"),
        (b"abcdefgh", b"hi", b"abcdefgh", "max_new_tokens"),  # held back to the end
    ],
)
def test_stops(script, stop, text, reason):
    config = GenerationConfig(max_new_tokens=8)
    run = generate(Scripted(script), b"\0", config, context=8, stop=stop, cache=False)
    assert bytes(run) == text
    assert run.ended == [reason]


def test_tokens_are_given_out_as_soon_as_they_are_certain():
    tail = Tail(stop_sequences(b"two"))
    assert [tail.add(token) for token in b"ottwo"] == [
        ([ord("o")], False),
        ([], False),
        ([ord("t")], False),
        ([], False),
        ([], True),
    ]


def test_no_tokens_at_all():
    run = make().generate(PROMPTS, GenerationConfig(max_new_tokens=0), context=300)
    assert list(run) == []
    assert run.ended == ["max_new_tokens"] * 4


# What was read


@BOTH
def test_tokens_read_are_counted_from_the_lists(attention):
    """Of one sequence, beside what the geometry says that a token reads."""
    model = make(attention)
    run = model.generate(PROMPTS[1], GREEDY, context=300)
    list(run)
    positions = [len(PROMPTS[1]) + step for step in range(39)]
    assert run.statistics.new_tokens == 39
    assert run.statistics.prompt_tokens == 31
    assert run.statistics.dense == sum(p + 1 for p in positions)
    expected = run.statistics.dense
    if attention == "nsa":
        chosen = [min(4, p // 16 + 1) * 16 - (15 - p % 16) for p in positions]
        compressed = [CONFIG.num_compressed(p + 1) for p in positions]
        expected = sum(chosen) + sum(compressed) + sum(min(24, p + 1) for p in positions)
    assert run.statistics.read == expected


def test_tokens_read_of_lists_with_fewer_blocks():
    """``select_mass`` ends lists early, which no formula knows."""
    read = []
    for mass in (None, 0.5):
        run = make(select_mass=mass).generate(PROMPTS[1], GREEDY, context=300)
        list(run)
        read.append(run.statistics.read)
    assert read[1] < read[0]


def test_nothing_is_counted_without_a_cache():
    run = make().generate(PROMPTS[0], replace(GREEDY, max_new_tokens=3), context=300, cache=False)
    list(run)
    assert run.statistics.read is None
    assert run.statistics.new_tokens == 2


# Bad input


@pytest.mark.parametrize(
    "prompt",
    [[], None, [1.5], "ab", [-1], [10**30], [[1], []], [[1], 2], [[1], "a"], torch.zeros(3), b""],
)
def test_a_prompt_is_tokens(prompt):
    with pytest.raises(ShapeError, match=r"^prompt: expected one token or more"):
        make().generate(prompt, GREEDY, context=8)


def test_prompts_of_other_kinds():
    model, few = make(), replace(GREEDY, max_new_tokens=3)
    expected = list(model.generate([1, 2], few, context=9))
    for prompt in (torch.tensor([1, 2]), (1, 2), b"\1\2", [np.int64(1), np.int32(2)]):
        assert list(model.generate(prompt, few, context=9)) == expected
    batch = model.generate(torch.tensor([[1, 2]]), few, context=9)
    assert list(batch) == [(0, token) for token in expected]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"prompt": [40]}, ShapeError, "prompt: expected tokens in 0 … 39, got 40"),
        ({"config": 1}, ConfigError, "config: expected a GenerationConfig, got 1"),
        ({"context": 0}, ConfigError, "context: expected an int >= 1, got 0"),
        ({"max_length": 0}, ConfigError, "max_length: expected None or an int >= 1, got 0"),
        ({"chunk": 0}, ConfigError, "chunk: expected an int >= 1, got 0"),
        ({"cache": 1}, ConfigError, "cache: expected True, False or options of an NSACache, got 1"),
        ({"cache": {"selected_dtype": "e5m2"}}, ConfigError, "selected_dtype: .*, got 'e5m2'"),
        ({"graph": 1}, ConfigError, "graph: expected None, True or False, got 1"),
        ({"graph": True}, ConfigError, "graph: expected a model on CUDA, got one on cpu"),
        ({"stop": "x"}, ConfigError, "stop: expected a token .*, got 'x'"),
        ({"stop": b""}, ConfigError, "stop: expected a token"),
        ({"stop": [-1]}, ConfigError, "stop: expected a token"),
        ({"stop": [[1], [None]]}, ConfigError, "stop: expected a token"),
    ],
)
def test_it_refuses(options, error, text):
    given = {"prompt": [1, 2], "config": GREEDY, "context": 30, **options}
    with pytest.raises(error, match=text):
        make().generate(**given)


def test_weights_that_are_not_sound():
    model = make()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="expected finite logits, got others"):
        list(model.generate([1, 2], GREEDY, context=30))


# The dense cache


def test_a_dense_cache_refuses():
    model = make("dense")
    cache = model.new_cache(2, 10)
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    with torch.no_grad():
        model(tokens, cache=cache, counts=[4, 1])
        assert cache.lengths == [4, 1]
        for call, text in (
            ({"tokens": tokens[:, :1].expand(2, 7)}, "expected at most max_length=10 tokens"),
            ({"tokens": tokens[:1]}, "expected input of 2 sequences on cpu, as it has, got 1"),
            ({"tokens": tokens, "counts": [5, 1]}, "counts: expected 2 ints from 0 to 4"),
            ({"cache": make().new_cache(2, 10)}, "expected a DenseCache of 2 layers"),
        ):
            with pytest.raises(CacheError, match=text):
                model(**{"tokens": tokens, "cache": cache, **call})
        assert cache.lengths == [4, 1]
    with pytest.raises(CacheError, match=r"expected torch.no_grad\(\)"):
        model(tokens, cache=cache)
    with torch.no_grad(), pytest.raises(CacheError, match="expected a layer of a DenseCache"):
        model.blocks[0].attention(torch.zeros(2, 1, 32), cache=cache)


@pytest.mark.parametrize("splits", [[37], [1] * 37, [5, 1, 30, 1], [2, 2, 33]])
def test_any_split_of_a_dense_forward(splits):
    model = make("dense")
    tokens = torch.randint(VOCAB, (3, 37), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cache = model.new_cache(3, 40)
        parts = [model(part, cache=cache) for part in tokens.split(splits, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-4, atol=1e-4)
