"""What ``generate`` may be given beside tokens, and what it returns beside them."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from nsa.integrations.transformers import convert
from tests.support.tiny_models import CONFIG, dense, new_parts, tokens

GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    model = dense(bos_token_id=1)
    convert(model, CONFIG)
    new_parts(model)
    return model


def padded():
    ids = tokens(2, 30)
    ids[0, :9] = 0
    return ids, (ids != 0).long()


@pytest.mark.parametrize(
    "option",
    [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=["greedy", "beams", "static", "without a cache"],
)
def test_embeddings_instead_of_tokens(model, option):
    ids, mask = padded()
    embeds = model.get_input_embeddings()(ids)
    options = {**GREEDY, "attention_mask": mask, **option}
    expected = model.generate(ids, **options)
    assert model.generate(ids, inputs_embeds=embeds, **options).tolist() == expected.tolist()
    found = model.generate(inputs_embeds=embeds, **options)
    assert found.tolist() == expected[:, 30:].tolist()
    other = model.generate(inputs_embeds=torch.randn_like(embeds), **options)
    assert other.tolist() != found.tolist()


def test_a_cache_of_embeddings_goes_on(model):
    """In two calls as in one."""
    ids, embed = tokens(2, 30), model.get_input_embeddings()
    embeds = embed(ids)
    options = {"do_sample": False, "return_dict_in_generate": True}
    whole = model.generate(inputs_embeds=embeds, max_new_tokens=12, **options)
    first = model.generate(inputs_embeds=embeds, max_new_tokens=7, **options)
    more = torch.cat([embeds, embed(first.sequences)], 1)
    rest = model.generate(inputs_embeds=more, max_new_tokens=5, cache=first.cache, **options)
    assert torch.cat([first.sequences, rest.sequences], 1).tolist() == whole.sequences.tolist()
    assert [layer.lengths for layer in rest.cache.layers] == [[41, 41]] * 2


def test_positions_that_are_passed(model):
    """The ones that it would find by itself."""
    ids, mask = padded()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = model.generate(ids, attention_mask=mask, position_ids=positions, **GREEDY)
    assert found.tolist() == model.generate(ids, attention_mask=mask, **GREEDY).tolist()


def test_no_prompt(model):
    """Then it begins with the token for that."""
    found = model.generate(**GREEDY)
    prompt = torch.ones(1, 1, dtype=torch.long)
    expected = model.generate(prompt, attention_mask=prompt, **GREEDY)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(
    ("option", "rows"),
    [
        ({}, 2),
        ({"do_sample": True, "num_return_sequences": 3}, 6),
        ({"num_beams": 2}, 4),
        ({"num_beams": 2, "do_sample": True}, 4),
    ],
    ids=["greedy", "samples", "beams", "sampled beams"],
)
def test_what_is_returned(model, use_cache, option, rows):
    ids, mask = padded()
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=4,
        min_new_tokens=4,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
        output_hidden_states=True,
        **{"do_sample": False, **option},
    )
    assert out.sequences.shape[1] == 34
    assert [tuple(logits.shape) for logits in out.logits] == [(rows, 61)] * 4
    columns = [30, 1, 1, 1] if use_cache else [30, 31, 32, 33]
    for step, T in zip(out.hidden_states, columns, strict=True):
        assert {tuple(x.shape) for x in step} == {(rows, T, 32)}
    assert (out.cache is not None) == use_cache
    if use_cache:
        assert out.cache.get_seq_length() == 33
        assert out.cache.batch_size == rows
