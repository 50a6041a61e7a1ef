"""What `bench` holds to the oracle before it is timed: backends, dense kernels, the peer."""

import dataclasses
import sys
import types
from typing import ClassVar

import pytest
import torch
from torch.nn.attention import SDPBackend

from nsa import NSAConfig, reference
from nsa.backends import load
from nsa.settings import Settings
from nsa.testing.parity import ParityRow
from nsa.tools.bench import baselines
from nsa.tools.bench import parity as bench_parity
from nsa.tools.bench import run as bench_run
from nsa.tools.bench.baselines import (
    Unsupported,
    dense,
    dense_baselines,
    dense_flash,
    dense_kernel,
    find_fla,
    fla_selected,
    unsupported,
)
from nsa.tools.bench.cases import heads_label
from nsa.tools.bench.parity import Parity, backend_parity, baseline_parity
from tests.support import benching
from tests.support.benching import CPU, ODD, TINY, problem, run_jsonl


@pytest.fixture
def quick(monkeypatch):
    benching.be_quick(monkeypatch)


# Backends


def bad_parity(name, inputs):
    return [ParityRow("out", 1e-7, 1e-6), ParityRow("dq", 3e-3, 1e-3)]


def test_a_failed_parity_check_stops_the_timing(capsys, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(bench_parity, "attention_parity", bad_parity)
    timed = []
    monkeypatch.setattr(bench_run, "timed_branch", lambda *given: timed.append(given))
    code, _, rows, out = run_jsonl(capsys, tmp_path, lengths="64,80")
    assert code == 1
    assert timed == []
    mine = [row for row in rows if row["backend"] == "sdpa"]
    assert [row["branch"] for row in mine] == ["any", "any"]
    note = "sdpa: parity failed: dq is 3.00e-03 off, above 1.00e-03"
    assert {row["note"] for row in mine} == {note}
    assert mine[0]["parity"] == pytest.approx(3.0)
    assert "no [1]" in out
    assert f"[1] {note}" in out
    assert "Problems" in out
    assert out.count(note) == 2  # below the table, and among the problems
    dense = [row for row in rows if row["branch"] == "dense"]
    assert all(row["both_ms"] > 0 for row in dense)


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_a_parity_that_is_no_number_fails(monkeypatch, error):
    rows = [ParityRow("out", error, 1.0)]
    monkeypatch.setattr(bench_parity, "attention_parity", lambda name, inputs: rows)
    assert "out is" in backend_parity("sdpa", problem()).fault


def test_a_wrong_selection_fails(monkeypatch):
    monkeypatch.setattr(bench_parity, "attention_parity", lambda name, inputs: [])
    monkeypatch.setattr(bench_parity, "selection_faults", lambda name, inputs: ["a block is off"])
    assert backend_parity("sdpa", problem()).fault == "parity failed: selection: a block is off"


def test_a_backend_that_raises_in_the_check(monkeypatch):
    def fail(name, inputs):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(bench_parity, "attention_parity", fail)
    fault = backend_parity("sdpa", problem()).fault
    assert fault == "parity check failed: RuntimeError: no kernel image is available"


def test_parity_looks_at_windows_and_lists_that_leave_something_out(monkeypatch):
    seen = []

    def look(name, inputs):
        seen.append((inputs.config, inputs.q.shape[1], inputs.cu_seqlens))
        return []

    monkeypatch.setattr(bench_parity, "attention_parity", look)
    monkeypatch.setattr(bench_parity, "selection_faults", lambda name, inputs: [])
    config = NSAConfig(num_heads=2, num_kv_heads=1, head_dim=8)
    backend_parity("sdpa", problem(config, sequences=2))
    (given, T, cu_seqlens), (sparse, longer, _) = seen
    assert (given, T) == (config, 203)
    assert 0 in cu_seqlens.diff()
    assert sparse.window < longer / 3
    assert sparse.num_selected < longer // sparse.select_block
    assert heads_label(sparse) == heads_label(config)


def test_short_checks_are_not_sent_elsewhere(monkeypatch, environment):
    environment({"NSA_FA2_PROVIDER": "math", "NSA_FA2_MIN_LEN_WIN": "1000"})
    seen = set()
    steps = type(load("fa2-dense"))
    window = steps.window_attention

    def look(self, q, *given, **options):
        seen.add(q.requires_grad)
        return window(self, q, *given, **options)

    monkeypatch.setattr(steps, "window_attention", look)
    assert backend_parity("fa2-dense", problem()).fault is None
    assert True in seen


# Dense attention and the peer


@pytest.mark.parametrize(
    "wanted",
    [
        problem(),
        problem(ODD, dtype=torch.bfloat16, batch=2),
        problem(sequences=2),
        problem(NSAConfig(num_heads=4, num_kv_heads=1, head_dim=16, scale=0.1), sequences=2),
    ],
    ids=["regular", "odd", "packed", "scale"],
)
def test_dense_attention_is_held_to_the_oracle(wanted):
    [baseline] = dense_baselines(CPU, wanted.packed, Settings())
    parity = baseline_parity(baseline, wanted)
    assert parity.fault is None
    assert 0 < parity.worst < 1


def test_dense_attention_that_is_wrong_is_seen():
    def not_causal(q, k, v, inputs):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return out.transpose(1, 2)

    assert "out is" in baseline_parity(dense("x", not_causal), problem()).fault


def test_the_varlen_step_as_dense_attention():
    """What packed sequences run on a GPU, through the provider that needs none."""
    baseline = dense_flash("dense FA-2", Settings(fa2_provider="math"))
    assert baseline_parity(baseline, problem(sequences=2)).fault is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="FA-2 may run here")
def test_dense_kernels_that_refuse_say_why():
    with pytest.raises(Unsupported, match="dense cuDNN: .*[Nn]o "):
        baseline_parity(dense_kernel("dense cuDNN", SDPBackend.CUDNN_ATTENTION), problem())
    baseline, _ = dense_baselines(torch.device("cuda"), True, Settings(fa2_provider="math"))
    with pytest.raises(Unsupported, match="dense FA-2: .*needs a CUDA device, got cpu"):
        baseline_parity(baseline, problem(sequences=2))


def test_a_refusal_of_a_dense_kernel_is_a_row_and_no_fault(capsys, tmp_path, quick, monkeypatch):
    refusing = unsupported("dense cuDNN", "dense", "dense cuDNN: head sizes up to 128, got 192")
    monkeypatch.setattr(bench_run, "dense_baselines", lambda *given: (refusing,))
    monkeypatch.setattr(bench_run, "backend_parity", lambda name, trial: Parity(0.25))
    code, _, rows, out = run_jsonl(capsys, tmp_path, "--branches", "window")
    assert code == 0
    assert rows[-1]["note"] == "dense cuDNN: head sizes up to 128, got 192"
    assert "head sizes up to 128, got 192" in out


def test_on_a_gpu_both_dense_kernels_get_a_row():
    for packed in (False, True):
        names = [
            baseline.name for baseline in dense_baselines(torch.device("cuda"), packed, Settings())
        ]
        assert names == ["dense FA-2", "dense cuDNN"]


class FlaLike:
    """Called as the peer's function is; computes by the oracle, and refuses what that refuses."""

    calls: ClassVar[list] = []

    @classmethod
    def apply(cls, q, k, v, lists, counts, block_size, scale, cu_seqlens):
        width = lists.shape[-1]
        assert width & (width - 1) == 0
        assert counts == width
        assert cu_seqlens is None or cu_seqlens.dtype == torch.int64
        assert (lists >= 0).any(-1).all()  # it divides by what a query sees
        cls.calls.append((width, cu_seqlens))
        H, K, D = q.shape[2], k.shape[2], q.shape[3]
        config = NSAConfig(
            num_heads=H,
            num_kv_heads=K,
            head_dim=D,
            value_dim=v.shape[3],
            select_block=block_size,
            scale=scale,
            rope_theta=None,
        )
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.int()
        return reference.selected_attention(q, k, v, lists, config, cu_seqlens)[0]


WIDE = NSAConfig(num_heads=16, num_kv_heads=1, head_dim=8, num_selected=5, scale=0.3)


@pytest.mark.parametrize("sequences", [0, 2])
def test_the_peer_is_given_what_it_takes(sequences):
    FlaLike.calls.clear()
    peer = fla_selected(types.ModuleType("fla"), FlaLike)
    assert baseline_parity(peer, problem(WIDE, sequences=sequences)).fault is None
    assert {width for width, _ in FlaLike.calls} == {8, 4}
    for _, cu_seqlens in FlaLike.calls:
        assert sequences == 0 or (cu_seqlens.diff() > 0).all()


def test_a_peer_that_is_wrong_is_not_timed(capsys, tmp_path, quick, monkeypatch):
    class Wrong:
        @staticmethod
        def apply(q, k, v, *given):
            return FlaLike.apply(q, k, v, *given) * 1.01

    monkeypatch.setattr(
        bench_run, "find_fla", lambda device: fla_selected(types.ModuleType("fla"), Wrong)
    )
    argv = ("--backends", "fla", "--branches", "selected", "--heads", "16/1:8")
    code, _, rows, _ = run_jsonl(capsys, tmp_path, *argv)
    assert code == 1
    assert rows[0]["backend"] == "fla"
    assert rows[0]["note"].startswith("fla: parity failed: out is")


def test_groups_that_the_peer_does_not_take():
    peer = fla_selected(types.ModuleType("fla"), FlaLike)
    for config in (TINY, dataclasses.replace(WIDE, num_heads=24)):
        with pytest.raises(Unsupported, match="16, 32, 64, … query heads on a key/value head, got"):
            baseline_parity(peer, problem(config))


def test_the_peer_tunes_anew():
    function = types.SimpleNamespace()
    tuner = types.SimpleNamespace(configs=[1, 2], cache={"key": 1}, fn=function)
    tuner.cache_results = True
    module = types.ModuleType("fla")
    module.kernel = types.SimpleNamespace(fn=tuner)
    fla_selected(module, FlaLike).tune()
    assert (tuner.cache, tuner.cache_results) == ({}, False)


def test_a_peer_that_is_not_there(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(baselines, "version_of", lambda name: None)
    with pytest.raises(Unsupported, match="pip install fla-core"):
        find_fla(cuda)
    monkeypatch.setattr(baselines, "version_of", {"fla-core": "0.6.0"}.get)
    with pytest.raises(Unsupported, match="fla-core 0.6.0 needs a CUDA device, got cpu"):
        find_fla(CPU)
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(Unsupported, match="fla-core 0.6.0 does not import .ModuleNotFoundError: "):
        find_fla(cuda)


def test_an_installed_peer_is_found(monkeypatch):
    monkeypatch.setattr(baselines, "version_of", {"flash-linear-attention": "0.6.0"}.get)
    for name in ("fla", "fla.ops", "fla.ops.nsa", "fla.ops.nsa.parallel"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(Unsupported, match="does not import .AttributeError"):
        find_fla(torch.device("cuda"))
    sys.modules["fla.ops.nsa.parallel"].ParallelNSAFunction = FlaLike
    assert find_fla(torch.device("cuda")).name == "fla"
