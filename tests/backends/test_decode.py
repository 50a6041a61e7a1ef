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
from nsa.registry import TABLE
from nsa.testing.decoding import decode_whole, random_step, step_inputs
from nsa.testing.selection import list_faults
from nsa.testing.strategies import Case, cases
from nsa.testing.tolerances import expected

DECODERS = [name for name, row in TABLE.items() if row.decodes]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CPU = [name for name in DECODERS if name == "sdpa"]


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
    case = replace(case, batch=3)
    config = replace(case.config, select_share=1)
    inputs = replace(case.inputs(torch.float32), block_idx=None, config=config)
    start = max(0, inputs.q.shape[1] - S)
    step = step_inputs(inputs, start, inputs.q.shape[1] - start, size=config.select_block)
    out, lists = load(name).decode_attention(step, config)
    for b in range(3):
        row = step._replace(
            q=step.q[b : b + 1],
            position=step.position[b : b + 1],
            gates=step.gates[b : b + 1],
            compressed=type(step.compressed)(*(x[b : b + 1] for x in step.compressed)),
            page_table=step.page_table[b : b + 1],
            window=type(step.window)(*(x[b : b + 1] for x in step.window)),
        )
        alone, listed = load(name).decode_attention(row, config)
        assert torch.equal(alone[0], out[b])
        assert torch.equal(listed[0], lists[b])


@pytest.mark.parametrize(
    "options",
    [{}, {"select_share": 2}, {"select_regions": (2, 1)}, {"score_dtype": "fp8"}],
    ids=["exact", "share", "regions", "fp8"],
)
def test_every_tensor_is_made_on_the_device_of_the_queries(options: dict[str, Any]):
    """One that is not lands on the default device, which is none that can be read here."""
    config = NSAConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        compress_block=4,
        compress_stride=2,
        select_block=8,
        num_selected=3,
        window=7,
        **options,
    )
    step = random_step(config, 2, 40, 3, dtype=torch.float32, device="cpu")
    step = step._replace(list_before=torch.tensor([0, 3, -1], dtype=torch.int32).expand(2, 2, 3))
    want, listed = load("sdpa").decode_attention(step, config)
    with torch.device("meta"):
        out, lists = load("sdpa").decode_attention(step, config)
    assert torch.equal(out, want)
    assert torch.equal(lists, listed)
