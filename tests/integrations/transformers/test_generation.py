"""``generate`` of a converted model gives what the library's own generation gives."""

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from transformers import DynamicCache, StaticCache

from nsa import CacheError
from nsa.integrations.transformers import NSACacheLayer, NSAStaticCacheLayer, convert
from nsa.integrations.transformers import cache as cache_module
from tests.support.tiny_models import CONFIG, KINDS, Own, dense, new_parts, tokens

NEW = 24
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def converted(kind="Llama", seed=0):
    model = dense(kind, seed)
    convert(model, CONFIG)
    new_parts(model)
    return model


@pytest.fixture(scope="module")
def model():
    return converted()


@pytest.fixture(scope="module")
def own(model):
    """What the library itself continues the prompt with."""
    return Own(model).generate(tokens(1, 37).tolist(), NEW)


def continued(model, ids, **options):
    options = {**GREEDY, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, **options)[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy(kind):
    model, ids = converted(kind), tokens(2, 37)
    assert continued(model, ids) == Own(model).generate(ids.tolist(), NEW)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Mistral", {"sliding_window": 8}),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ],
)
def test_a_sliding_window_of_the_dense_model_is_gone(kind, options):
    """From the layers and from what its configuration makes of caches."""
    model, ids = dense(kind, **options), tokens(2, 37)
    convert(model, CONFIG)
    new_parts(model)
    assert continued(model, ids) == Own(model).generate(ids.tolist(), NEW)


@pytest.mark.parametrize("option", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_with_each_cache(model, own, option):
    assert continued(model, tokens(1, 37), **option) == own


@pytest.mark.parametrize("option", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_left_padded_prompts(model, option):
    lengths = [5, 37, 20]
    prompts = [tokens(1, T, seed=T)[0].tolist() for T in lengths]
    ids = torch.tensor([[0] * (37 - len(prompt)) + prompt for prompt in prompts])
    found = continued(model, ids, attention_mask=(ids != 0).long(), **option)
    assert found == Own(model).generate(prompts, NEW)


def test_sampling(model):
    """The same draws from the library's own logits."""
    ids = tokens(2, 37)
    torch.manual_seed(0)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=True,
        temperature=0.7,
        top_k=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    own = Own(model)(made.sequences)[:, 36:-1]
    found = torch.stack(made.logits, 1)
    torch.testing.assert_close(found, own, atol=2e-4, rtol=1e-4)
    torch.manual_seed(0)
    drawn = [torch.multinomial((step / 0.7).softmax(-1), 1).squeeze(1) for step in own.unbind(1)]
    assert torch.stack(drawn, 1).tolist() == made.sequences[:, 37:].tolist()


def test_beams(model):
    """Beams with a cache are those of whole forwards."""
    ids = tokens(2, 20)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12}
    found = continued(model, ids, **options)
    assert found == continued(model, ids, use_cache=False, **options)
    assert found != continued(model, ids, num_beams=1, max_new_tokens=12)


@pytest.mark.parametrize("padded", [False, True])
def test_assisted_decoding(model, own, padded):
    """The assistant is wrong now and then, so that the cache takes guesses back."""
    assistant, ids = converted(seed=0), tokens(1, 37)
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.05 * torch.randn(assistant.lm_head.weight.shape))
    mask = None
    if padded:
        ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
        mask = {"attention_mask": (ids != 0).long()}
    assert continued(model, ids, assistant_model=assistant, **(mask or {})) == own


def test_prompt_lookup(model, own):
    assert continued(model, tokens(1, 37), prompt_lookup_num_tokens=4) == own


def test_a_cache_that_is_kept_goes_on(model, own):
    ids, cache = tokens(1, 37), DynamicCache(config=model.config)
    first = model.generate(ids, cache=cache, attention_mask=torch.ones_like(ids), **GREEDY)
    assert cache.get_seq_length() == 37 + NEW - 1
    more = torch.cat([first, tokens(1, 9, seed=5)], 1)
    found = continued(model, more, cache=cache)
    assert found == Own(model).generate(more.tolist(), NEW)


def test_chunked_prefill(model, own):
    assert continued(model, tokens(1, 37), prefill_chunk_size=10) == own


def test_a_cache_grows(model, monkeypatch):
    """Past what it has room for at first, several times."""
    monkeypatch.setattr(cache_module, "ROOM", 8)
    ids, cache = tokens(1, 3), DynamicCache(config=model.config)
    found = continued(model, ids, cache=cache, max_new_tokens=60)
    assert cache.layers[0].nsa_cache.max_length > 62
    with torch.no_grad():
        logits = Own(model)(torch.cat([ids, torch.tensor(found)], 1))
    assert logits[0, 2:-1].argmax(-1).tolist() == found[0]


def test_a_copied_cache_is_another(model):
    """A prompt that is read once, for several continuations."""
    ids, cache = prefilled(model)
    for seed in (0, 1):
        copied = copy.deepcopy(cache)
        with torch.no_grad():
            found = model(tokens(2, 5, seed=seed), cache=copied).logits
            whole = Own(model)(torch.cat([ids, tokens(2, 5, seed=seed)], 1))
        torch.testing.assert_close(found, whole[:, -5:], atol=2e-4, rtol=1e-4)
    assert cache.get_seq_length() == 21


# The layers' methods, one by one


def prefilled(model, B=2, T=21, static=False, mask=None):
    ids = tokens(B, T)
    cache = (
        StaticCache(config=model.config, max_cache_len=64)
        if static
        else DynamicCache(config=model.config)
    )
    with torch.no_grad():
        model(ids, cache=cache, attention_mask=mask)
    return ids, cache


def following(model, ids, cache, steps=3):
    """Logits of a few steps."""
    with torch.no_grad():
        found = [
            model(tokens(len(ids), 1, seed=t), cache=cache).logits[:, -1] for t in range(steps)
        ]
    return torch.stack(found, 1)


def expected_after(model, ids, steps=3):
    new = torch.cat([tokens(len(ids), 1, seed=t) for t in range(steps)], 1)
    with torch.no_grad():
        return Own(model)(torch.cat([ids, new], 1))[:, -steps:]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([False, True])), [1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([-1, 0])), [1, 0]),
    ],
)
def test_rows_are_moved(model, static, change, rows):
    ids, cache = prefilled(model, static=static)
    change(cache)
    assert cache.batch_size == len(rows)
    torch.testing.assert_close(
        following(model, ids[rows], cache), expected_after(model, ids[rows]), atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize("static", [False, True])
def test_crop_reset_and_sizes(model, static):
    ids, cache = prefilled(model, static=static)
    layer = cache.layers[0]
    assert type(layer) is (NSAStaticCacheLayer if static else NSACacheLayer)
    assert cache.get_seq_length() == 21
    assert cache.get_mask_sizes(3, 0) == (24, 0)
    assert cache.get_max_length() == (64 if static else -1)
    assert (cache.is_compileable, cache.is_croppable) == (False, True)
    cache.crop(0)
    cache.crop(-6)
    assert cache.get_seq_length() == 15
    torch.testing.assert_close(
        following(model, ids, cache), expected_after(model, ids[:, :15]), atol=2e-4, rtol=1e-4
    )
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(ids, cache=cache)
    torch.testing.assert_close(
        following(model, ids, cache), expected_after(model, ids), atol=2e-4, rtol=1e-4
    )


def test_crop_takes_columns_and_not_tokens(model):
    """Of a padded batch, whose rows have fewer tokens than the cache has columns."""
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :8] = 0
    mask[1, 18:] = 0
    ids, cache = prefilled(model, mask=mask)
    assert cache.get_seq_length() == 21
    assert cache.layers[0].nsa_cache.lengths == [13, 18]
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-5)
    assert cache.layers[0].nsa_cache.lengths == [16, 8]
    cache.crop(-15)
    assert cache.layers[0].nsa_cache.lengths == [1, 0]


def test_rows_that_pause(model):
    """A mask that hides a row's new token: it is as if that had not been."""
    ids, cache = prefilled(model)
    steps = [tokens(2, 1, seed=t) for t in range(3)]
    seen = [(False, True), (False, False), (True, True)]
    mask = torch.ones(2, 21, dtype=torch.long)
    with torch.no_grad():
        for new, there in zip(steps, seen, strict=True):
            mask = torch.cat([mask, torch.tensor(there).long()[:, None]], 1)
            found = model(new, cache=cache, attention_mask=mask).logits
        assert cache.layers[0].lengths == [22, 23]
        for b in range(2):
            own = [new[b : b + 1] for new, there in zip(steps, seen, strict=True) if there[b]]
            whole = Own(model)(torch.cat([ids[b : b + 1], *own], 1))
            torch.testing.assert_close(found[b, -1], whole[0, -1], atol=2e-4, rtol=1e-4)
        found = following(model, ids, cache, steps=1)  # without a mask, from each row's length
        new = torch.cat([ids[:1], steps[2][:1], tokens(2, 1)[:1]], 1)
        torch.testing.assert_close(found[0], Own(model)(new)[0, -1:], atol=2e-4, rtol=1e-4)


def test_offloading_moves_it_and_back(model):
    ids, cache = prefilled(model)
    for layer in cache.layers:
        layer.offload()
        assert layer.nsa_cache.device.type == "cpu"
        layer.prefetch()
    torch.testing.assert_close(
        following(model, ids, cache), expected_after(model, ids), atol=2e-4, rtol=1e-4
    )


def test_misuse_is_refused(model):
    ids, cache = prefilled(model)
    for problem, call in (
        ("expected minus the columns to remove, got 3; crop(3", lambda: cache.crop(3)),
        ("expected a call by an NSA layer", lambda: cache.update(ids, ids, 0)),
        (
            "for layer 0, got none; make the cache of the model's",
            lambda: following(model, ids, DynamicCache()),
        ),
        (
            "got DynamicLayer",
            lambda: following(model, ids, DynamicCache(config=dense().config)),
        ),
        ("expected torch.no_grad()", lambda: model(ids, cache=cache)),
        ("an empty one", lambda: DynamicCache(config=model.config).layers[0].nsa_cache),
    ):
        with pytest.raises(CacheError) as error:
            call()
        assert problem in str(error.value)
        assert "\n" not in str(error.value)
    small = StaticCache(config=model.config, max_cache_len=20)
    with pytest.raises(CacheError, match="at most max_length=20 tokens, got 21"), torch.no_grad():
        model(ids, cache=small)
