"""Decode's kernels on a GPU: the accuracy rule, CUDA graphs, nothing that waits for the host."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nsa import NSAConfig
from nsa.backends.compiled.decode.tiles import ENOUGH_PROGRAMS
from nsa.core.inputs import DecodeInputs
from tests.support.decoding import make_step, of_sequence, on_device

pytestmark = pytest.mark.gpu

CONFIG = NSAConfig(num_heads=16, num_kv_heads=1, rope_theta=None)
SMALL = NSAConfig.preset("small", window=99, num_selected=4)
LENGTHS = (0, 1100, 31, 640)


def step_of(inputs: DecodeInputs, config: NSAConfig) -> tuple[Tensor, Tensor]:
    from nsa.backends.compiled.decode.launch import decode_attention

    return decode_attention(inputs, config)


@pytest.mark.parametrize("config", [CONFIG, SMALL], ids=["wide", "small"])
@pytest.mark.parametrize("S", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equals_a_full_forward(dtype: torch.dtype, S: int, config: NSAConfig) -> None:
    step = make_step(config, LENGTHS, S, dtype=dtype, page_blocks=1 if S == 1 else 4)
    out, lists = (x.cpu() for x in step_of(on_device(step.inputs, "cuda"), config))
    assert step.faults(lists) == []
    step.check(out, lists)


def test_rows_do_not_depend_on_the_batch() -> None:
    """Alone, with many programs for each, and in a batch with few."""
    lengths = LENGTHS * (1 + ENOUGH_PROGRAMS // len(LENGTHS))
    inputs = on_device(make_step(CONFIG, lengths, 2, dtype=torch.bfloat16).inputs, "cuda")
    out, lists = step_of(inputs, CONFIG)
    for b in range(len(LENGTHS)):
        alone = step_of(of_sequence(inputs, b), CONFIG)
        assert torch.equal(alone[0][0], out[b])
        assert torch.equal(alone[1][0], lists[b])


def test_equal_scores_go_to_the_lower_block() -> None:
    """Keys of four blocks, repeated over all splits of the keys."""
    step = make_step(CONFIG, (8000,), dtype=torch.float32)
    inputs = on_device(step.inputs, "cuda")
    k = inputs.compressed.k
    k.copy_(k[:, :16].repeat(1, -(-k.shape[1] // 16), 1, 1)[:, : k.shape[1]])
    q = torch.randn_like(inputs.q)
    lists = step_of(inputs._replace(q=q), CONFIG)[1][0, 0, 0].tolist()
    ranked = [block for block in lists if 0 < block < 124]
    assert ranked == list(range(ranked[0], ranked[0] + 4 * 13, 4))


def test_a_graph_reads_what_changed_in_place() -> None:
    step = make_step(CONFIG, (700, 1000), 2, dtype=torch.bfloat16)
    inputs = on_device(step.inputs, "cuda")
    graph = captured(lambda: step_of(inputs, CONFIG))
    for length in (300, 1, 700):
        inputs.position.copy_(torch.tensor([length, length + 211]))
        inputs.q.copy_(torch.randn_like(inputs.q))
        order = torch.randperm(inputs.selected.k.shape[0] - 1).int()[: inputs.page_table.numel()]
        inputs.page_table.copy_(order.view_as(inputs.page_table))
        found = graph()
        want = step_of(inputs, CONFIG)
        # pages that hold nothing are not numbers, and equal ones
        assert torch.equal(found[0].isnan(), want[0].isnan())
        assert torch.equal(found[0].nan_to_num(), want[0].nan_to_num())
        assert torch.equal(found[1], want[1])


def captured(call: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], tuple[Tensor, Tensor]]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> tuple[Tensor, Tensor]:
        graph.replay()
        return results

    return replay


def test_three_launches_and_nothing_else() -> None:
    inputs = on_device(make_step(CONFIG, (300, 40), dtype=torch.bfloat16).inputs, "cuda")
    step_of(inputs, CONFIG)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            step_of(inputs, CONFIG)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    names = [row.key for row in found.key_averages() if row.device_time_total > 0]
    kernels = ["nsa_decode_compressed", "nsa_decode_gated", "nsa_decode_select"]
    assert sorted(names) == kernels
