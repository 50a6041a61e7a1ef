"""A step of decode against the oracle: the last rows of the whole sequence's attention."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from nsa import NSAConfig
from nsa.backends.dispatch import load
from nsa.backends.sdpa.decode import _decode
from nsa.config import KV
from nsa.core.inputs import DecodeInputs
from nsa.registry import TABLE
from nsa.testing.decoding import decode_whole, random_step, step_inputs
from nsa.testing.selection import list_faults
from nsa.testing.strategies import Case, cases
from nsa.testing.tolerances import expected
from tests.support.decoding import of_sequence

DECODERS = [name for name, row in TABLE.items() if row.decodes]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CPU = [name for name in DECODERS if name == "sdpa"]
SMALL = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    compress_block=4,
    compress_stride=2,
    select_block=8,
    num_selected=3,
    window=7,
)
each_option = pytest.mark.parametrize(
    "options",
    [{}, {"select_share": 2}, {"select_regions": (2, 1)}, {"score_dtype": "fp8"}],
    ids=["exact", "share", "regions", "fp8"],
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CPU)
@given(case=cases(max_length=60, packed=False), S=st.integers(1, 8), pages=st.integers(1, 3))
def test_outputs_of_given_lists(name: str, dtype: torch.dtype, case: Case, S: int, pages: int):
    inputs = case.inputs(dtype)
    size = pages * case.config.select_block
    out, _ = decode_whole(load(name), inputs, S, size=size)
    want = expected(inputs)["out"]
    assert want.error(out) <= want.bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CPU)
@given(case=cases(max_length=60, packed=False), S=st.integers(1, 8))
def test_lists(name: str, dtype: torch.dtype, case: Case, S: int):
    config = replace(case.config, select_share=1)
    inputs = replace(case.inputs(dtype), block_idx=None, config=config)
    _, lists = decode_whole(load(name), inputs, S, size=config.select_block)
    lists = F.pad(lists, (0, config.num_selected - lists.shape[-1]), value=-1)
    assert list_faults(lists, inputs) == []


@pytest.mark.parametrize("name", CPU)
@given(case=cases(max_length=40, packed=False), S=st.integers(1, 8))
def test_a_sequence_alone_and_in_a_batch_has_the_same_bits(name: str, case: Case, S: int):
    config = replace(case.config, select_share=1)
    inputs = replace(case, batch=3).inputs(torch.float32)
    inputs = replace(inputs, block_idx=None, config=config)
    start = max(0, inputs.q.shape[1] - S)
    step = step_inputs(inputs, start, inputs.q.shape[1] - start, size=config.select_block)
    check_bits(name, step, config)


@pytest.mark.parametrize("name", CPU)
def test_two_sequences_have_the_bits_of_each(name: str):
    """Of a size at which products of two differ from products of one."""
    check_bits(name, random_step(SMALL, 2, 40, 3, dtype=torch.float32, device="cpu"), SMALL)


def check_bits(name: str, step: DecodeInputs, config: NSAConfig) -> None:
    out, lists = load(name).decode_attention(step, config)
    for b in range(len(out)):
        alone, listed = load(name).decode_attention(of_sequence(step, b), config)
        assert torch.equal(alone[0], out[b])
        assert torch.equal(listed[0], lists[b])


def small_step(
    options: dict[str, Any], dtype: torch.dtype = torch.float32, tokens: int = 40
) -> tuple[DecodeInputs, NSAConfig]:
    """The last three of up to ``tokens`` tokens of three sequences."""
    config = replace(SMALL, **options)
    step = random_step(config, 3, tokens, 3, dtype=dtype, device="cpu")
    before = torch.tensor([0, 3, -1], dtype=torch.int32).expand(3, 2, 3)
    position = torch.tensor([0, 17, 37], dtype=torch.int32).clamp_max(tokens - 3)
    return step._replace(position=position, list_before=before), config


@each_option
def test_every_tensor_is_made_on_the_device_of_the_queries(options: dict[str, Any]):
    """One that is not lands on the default device, which is none that can be read here."""
    step, config = small_step(options)
    want, listed = load("sdpa").decode_attention(step, config)
    with torch.device("meta"):
        out, lists = load("sdpa").decode_attention(step, config)
    assert torch.equal(out, want)
    assert torch.equal(lists, listed)


@each_option
@pytest.mark.parametrize("tokens", [3, 40], ids=["no compressed block", "some"])
def test_all_sequences_at_once(options: dict[str, Any], tokens: int):
    """As on a GPU. On a CPU they go one by one, for their bits."""
    step, config = small_step(options, torch.float64, tokens)
    want, listed = load("sdpa").decode_attention(step, config)
    out, lists = _decode(step, config)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    assert torch.equal(lists, listed)


@each_option
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_rounded_once(dtype: torch.dtype, options: dict[str, Any]):
    """In between, all is as with the same numbers in fp32."""

    def wide(x: Any) -> Any:
        return x.float() if x.dtype == dtype else x

    step, config = small_step(options, dtype)
    fields = {
        name: KV(*map(wide, x)) if isinstance(x, KV) else wide(x)
        for name, x in step._asdict().items()
        if x is not None
    }
    want, listed = load("sdpa").decode_attention(step._replace(**fields), config)
    out, lists = load("sdpa").decode_attention(step, config)
    assert out.dtype == dtype
    assert torch.equal(out, want.to(dtype))
    assert torch.equal(lists, listed)


def test_listed_blocks_past_all_pages_are_not_read():
    step, config = small_step({})
    given, past = torch.tensor([[0, 2, -1], [0, 2, 10**6]], dtype=torch.int32)
    want, got = (
        load("sdpa").decode_attention(step._replace(block_idx=x.expand(3, 3, 2, 3)), config)[0]
        for x in (given, past)
    )
    assert torch.equal(got, want)
