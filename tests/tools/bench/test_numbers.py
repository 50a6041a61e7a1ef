"""The numbers of `bench`: clocks, floors, the lengths from which FA-2 is faster."""

import time
from functools import partial

import pytest
import torch
from torch.utils import benchmark

from nsa import NSAConfig, reference
from nsa.core.flops import branch_pairs as pairs
from nsa.reference.masks import compressed_mask, selected_mask, window_mask
from nsa.testing.inputs import make_inputs
from nsa.tools.bench.advice import ALWAYS, advice, least_length
from nsa.tools.bench.cases import Timed
from nsa.tools.bench.timing import (
    MAX_RUNS,
    Timing,
    make_clock,
    measure,
    measure_ceilings,
    measure_passes,
    summarize,
    wall_clock,
)
from nsa.tools.bench.work import Work, work
from tests.support import benching
from tests.support.benching import CPU, ODD, TINY, both, problem, run, run_jsonl


@pytest.fixture
def quick(monkeypatch):
    benching.be_quick(monkeypatch)


@pytest.fixture
def unchecked(monkeypatch):
    benching.be_quick(monkeypatch)
    benching.skip_parity(monkeypatch)


# Clocks


class Ticks:
    """A clock that each call moves on by what the call takes."""

    def __init__(self):
        self.seconds = 0.0
        self.calls = 0

    def call(self, seconds):
        def advance():
            self.calls += 1
            self.seconds += seconds[min(self.calls, len(seconds)) - 1]

        return advance

    @property
    def clock(self):
        return partial(wall_clock, now=lambda: self.seconds)


def test_a_clock_times_every_call():
    ticks = Ticks()
    assert ticks.clock(ticks.call([1.0, 2.0, 4.0]), 3) == [1.0, 2.0, 4.0]


def test_median_and_percentiles():
    timing = summarize([5.0, 1.0, 2.0, 4.0, 3.0])
    assert timing == Timing(3.0, pytest.approx(1.4), pytest.approx(4.6), 5)
    assert timing.spread == pytest.approx(1.6 / 3)
    assert summarize([2.0]) == Timing(2.0, 2.0, 2.0, 1)


def test_a_slow_call_is_timed_as_often_as_asked_and_no_run_is_lost():
    ticks = Ticks()
    timing = measure(ticks.call([100.0, 1.0]), ticks.clock, seconds=0.5, runs=5)
    assert timing == Timing(1.0, 1.0, 1.0, 5)  # the first call, which compiles, is not among them
    assert ticks.calls == 6


def test_a_fast_call_fills_its_time():
    ticks = Ticks()
    timing = measure(ticks.call([100.0, 0.25]), ticks.clock, seconds=16.0, runs=5)
    assert (timing.median, timing.runs) == (0.25, 64)
    assert ticks.calls == 2 + 6 + 64  # first, estimate, warm-up


def test_the_number_of_runs_has_an_end():
    ticks = Ticks()
    assert measure(ticks.call([0.0]), ticks.clock, seconds=1.0, runs=5).runs == MAX_RUNS


def test_torchs_own_timer_agrees():
    """Both report the median; each sleeps a little longer than it is told."""
    mine = measure(lambda: time.sleep(0.01), wall_clock, seconds=0.1, runs=5)
    theirs = benchmark.Timer("time.sleep(0.01)", "import time").blocked_autorange(min_run_time=0.1)
    assert mine.median == pytest.approx(theirs.median, rel=0.3)


@pytest.mark.gpu
def test_tritons_own_timer_agrees():
    testing = pytest.importorskip("triton.testing")
    a = torch.randn(4096, 4096, device="cuda")
    clock = make_clock(torch.device("cuda"))
    mine = measure(lambda: a @ a, clock, seconds=0.2, runs=5)
    theirs = testing.do_bench(lambda: a @ a, quantiles=[0.5])
    assert mine.median * 1e3 == pytest.approx(theirs, rel=0.1)


def test_passes_are_what_they_say():
    seen = []

    def clock(call, runs):
        for _ in range(runs):
            call()
        return [1.0] * runs

    x = torch.ones(3, requires_grad=True)

    def forward():
        seen.append(torch.is_grad_enabled())
        return x * 2

    timed = Timed(forward, (x,), torch.ones(3))
    found = measure_passes(timed, clock, CPU, seconds=1, runs=1)
    assert None not in (found.forward, found.backward, found.both)
    assert found.peak_bytes is None  # nothing to read on a CPU
    # forward without a graph, the one graph of backward, and both with a new graph each time
    assert seen == [False, False, True, True, True]
    found = measure_passes(Timed(forward), clock, CPU, seconds=1, runs=1)
    assert found.backward is None
    assert found.both == found.forward


def test_the_ceilings_of_this_machine():
    found = measure_ceilings(CPU, (torch.float32,), wall_clock)
    assert 1e8 < found.flops_per_second["float32"] < 1e14
    assert 1e7 < found.bytes_per_second < 1e13
    assert found.flops_per_second.keys() == {"float32"}


# Floors


@pytest.mark.parametrize("config", [TINY, ODD], ids=["tiny", "odd"])
@pytest.mark.parametrize("length", [1, 7, 8, 12, 31, 100, 151])
def test_pairs_are_those_that_the_oracle_sees(config, length):
    N = config.num_compressed(length)
    mask = compressed_mask(length, N, config, 0, CPU)
    assert pairs("compressed", config, (length,)) == int(mask.sum())
    mask = window_mask(length, length, config, 0, CPU)
    assert pairs("window", config, (length,)) == int(mask.sum())
    inputs = make_inputs(config, length=length)
    blocks = reference.select_blocks(inputs.q.detach(), inputs.compressed.k.detach(), config)
    mask = selected_mask(blocks, length, config, 0)
    assert pairs("selected", config, (length,)) * config.num_kv_heads == int(mask.sum())
    assert pairs("dense", config, (length,)) == length * (length + 1) // 2


def test_packed_sequences_see_themselves_alone():
    for part in ("compressed", "selected", "window", "dense"):
        apart = pairs(part, ODD, (31,)) + pairs(part, ODD, (100,))
        assert pairs(part, ODD, (31, 0, 100)) == apart
    with pytest.raises(ValueError, match="expected compressed, selected, window or dense, got 'x'"):
        pairs("x", ODD, (31,))


def test_operations_of_the_papers_size():
    """Counted by hand for T = 65536: 64 heads of 128, and a query in the middle of its own block.

    compressed 65536·4095/2 pairs, selected 65536·(15·64 + 32), window 65536·512, less the start.
    """
    config = NSAConfig()
    counted = {
        branch: work(branch, problem(config, length=65536))[0].flops / 1e12
        for branch in ("compressed", "select", "selected", "window", "dense")
    }
    assert counted == {
        "compressed": pytest.approx(65536 * 2047.5 * 64 * 512 / 1e12, rel=1e-3),
        "select": pytest.approx(65536 * 2047.5 * 64 * 256 / 1e12, rel=1e-3),
        "selected": pytest.approx(65536 * 992.5 * 64 * 512 / 1e12, rel=0.01),
        "window": pytest.approx(65536 * 512 * 64 * 512 / 1e12, rel=0.01),
        "dense": pytest.approx(65536**2 / 2 * 64 * 512 / 1e12, rel=1e-3),
    }


def test_work_counted_by_hand():
    """T = 13, N = 2 blocks of 8: block 0 is seen by 6 queries, block 1 by 2."""
    trial, q, out = problem(ODD, length=13), 13 * 6 * 5, 13 * 6 * 3
    assert work("compressed", trial) == (
        Work(2 * 6 * (5 + 3) * (6 + 2), 4 * (q + 2 * 2 * (5 + 3) + out)),
        Work(2 * 6 * (3 * 5 + 2 * 3) * (6 + 2), 4 * (2 * (q + 2 * 2 * (5 + 3)) + out)),
    )
    trial = problem(ODD, length=13, dtype=torch.bfloat16)
    lists, lse = 4 * 13 * 2 * 4, 4 * 13 * 6
    assert work("select", trial) == (
        Work(2 * 6 * 5 * (6 + 2), 2 * (q + 2 * 2 * 5) + lists + lse),
        Work(0, 0),
    )
    assert work("selected", trial)[0].bytes == 2 * (q + 13 * 2 * (5 + 3) + out) + lists
    assert work("dense", trial)[0].bytes == 2 * (q + 13 * 2 * (5 + 3) + out)


def test_the_whole_is_its_parts():
    trial = problem(ODD, length=100, dtype=torch.bfloat16)
    parts = [work(part, trial)[0] for part in ("compressed", "selected", "window")]
    whole, selecting = (work(name, trial)[0] for name in ("all", "all+select"))
    assert whole.flops == sum(part.flops for part in parts)
    assert selecting.flops == whole.flops + work("select", trial)[0].flops
    assert selecting.bytes == whole.bytes - 4 * 100 * 2 * 4  # the list stays inside
    # q and the output once, not three times; gates on top
    once = 2 * 2 * 100 * 6 * (5 + 3)
    assert whole.bytes == sum(part.bytes for part in parts) - once + 2 * 3 * 100 * 6


# Lengths from which FA-2 is faster


@pytest.mark.parametrize(
    ("times", "least"),
    [
        ([(64, 2, 1), (128, 2, 1), (256, 1, 2), (512, 1, 2)], 256),
        ([(512, 1, 2), (64, 2, 1), (256, 1, 2), (128, 2, 1)], 256),
        ([(64, 1, 2), (128, 2, 1), (256, 1, 2)], 256),  # what wins below a loss does not count
        ([(64, 1, 2), (128, 1, 2)], ALWAYS),
        ([(64, 1, 2), (128, 2, 1)], None),
        ([(64, 2, 1), (128, 1, 1)], None),  # as fast is not faster
        ([], None),
    ],
)
def test_the_least_length(times, least):
    assert least_length(times) == least


def test_settings_to_paste():
    rows = [
        both("sdpa", "window", 64, 1.0),
        both("fa2-dense", "window", 64, 2.0),
        both("sdpa", "window", 128, 2.0),
        both("fa2-dense", "window", 128, 1.0),
        both("sdpa", "compressed", 128, 1.0),
        both("fa2-dense", "compressed", 128, 2.0),
    ]
    assert advice(rows) == [
        "# window: FA-2 is the faster one from T = 128 on (2 lengths from 64 to 128)",
        "NSA_FA2_MIN_LEN_WIN=128",
        "# compressed: sdpa is the faster one at T = 128 (T = 128)",
        "NSA_USE_FA2_CMP=0",
    ]
    [line] = advice(rows[2:4])
    assert "always the faster one (T = 128): leave NSA_FA2_MIN_LEN_WIN unset" in line


def test_nothing_to_compare():
    assert advice([]) == []
    assert advice([both("sdpa", "window", 64, 1.0)]) == []
    # a branch that a flag sends to sdpa says nothing of FA-2
    sent = both("fa2-dense", "window", 64, 1.0, runs_on="sdpa")
    assert advice([both("sdpa", "window", 64, 1.0), sent]) == []
    selected = [both(name, "selected", 64, 1.0) for name in ("sdpa", "fa2-dense")]
    assert advice(selected) == []


def test_the_longest_sequence_decides_for_packed_ones():
    rows = [both(name, "window", 600, 1.0, sequences=3) for name in ("sdpa", "fa2-varlen")]
    assert "at T = 300 (T = 300)" in advice(rows)[0]


def test_find_the_least_lengths(capsys, tmp_path, unchecked):
    argv = ("--find-fa2-min-len", "--provider", "math")
    code, header, rows, out = run_jsonl(capsys, tmp_path, *argv, lengths="64,100")
    assert code == 0
    assert header["fa2_provider"].startswith("math")
    assert {(row["backend"], row["branch"]) for row in rows} == {
        (backend, branch)
        for backend in ("sdpa", "fa2-dense")
        for branch in ("window", "compressed")
    }
    assert all(row["both_ms"] > 0 and row["forward_ms"] is None for row in rows)
    for flag in ("WIN", "CMP"):
        assert f"NSA_FA2_MIN_LEN_{flag}" in out or f"NSA_USE_FA2_{flag}=0" in out


def test_the_least_lengths_ignore_those_in_force(capsys, tmp_path, unchecked, environment):
    environment({"NSA_FA2_MIN_LEN_WIN": "4096", "NSA_USE_FA2_CMP": "0"})
    argv = ("--find-fa2-min-len", "--provider", "math")
    _, _, rows, _ = run_jsonl(capsys, tmp_path, *argv)
    assert all(row["runs_on"] == row["backend"] for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="FA-2 may run here")
def test_the_least_lengths_need_fa2(capsys, quick):
    code, out, err = run(capsys, "--find-fa2-min-len")
    assert (code, out) == (1, "")
    assert err.startswith("error: --find-fa2-min-len: fa2-dense cannot run here: ")
    assert "FlashAttention-2 needs a CUDA device, got cpu" in err
