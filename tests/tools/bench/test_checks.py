"""What `bench` holds to the oracle before it is timed: backends, dense kernels."""

import pytest
import torch
from torch.nn.attention import SDPBackend

from nsa import NSAConfig
from nsa.backends import load
from nsa.settings import Settings
from nsa.testing.parity import ParityRow
from nsa.tools.bench import parity as bench_parity
from nsa.tools.bench import run as bench_run
from nsa.tools.bench.baselines import (
    Unsupported,
    dense,
    dense_baselines,
    dense_flash,
    dense_kernel,
    unsupported,
)
from nsa.tools.bench.cases import heads_label
from nsa.tools.bench.parity import Parity, backend_parity, baseline_parity
from tests.support import benching
from tests.support.benching import CPU, ODD, problem, run_jsonl


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
