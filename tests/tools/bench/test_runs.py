"""`python -m nsa.tools.bench`: whole runs, what stays of them, exit codes."""

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsa import NSAConfig
from nsa.backends import load
from nsa.settings import Settings
from nsa.testing.inputs import make_inputs
from nsa.tools.bench import __main__ as bench
from nsa.tools.bench import run as bench_run
from nsa.tools.bench.cases import BRANCHES, heads_label
from nsa.tools.bench.flags import make_plan
from nsa.tools.bench.plot import draw
from nsa.tools.bench.report import milliseconds, rate
from nsa.tools.bench.timing import Measurement, Timing
from nsa.tools.bench.work import work
from tests.support import benching
from tests.support.benching import CEILINGS, ODD, TINY, both, problem, run, run_jsonl


@pytest.fixture
def quick(monkeypatch):
    benching.be_quick(monkeypatch)


@pytest.fixture
def unchecked(monkeypatch):
    benching.be_quick(monkeypatch)
    benching.skip_parity(monkeypatch)


# A whole run


def test_a_run_on_a_cpu(capsys, tmp_path, quick):
    code, header, rows, out = run_jsonl(capsys, tmp_path, lengths="64,100")
    assert code == 0
    assert header["kind"] == "header"
    assert header["torch"] == torch.__version__
    assert header["command"].startswith("python -m nsa.tools.bench --jsonl ")
    assert header["ceilings"]["bytes_per_second"] == 1e10
    assert [(row["length"], row["backend"], row["branch"]) for row in rows] == [
        (length, *what)
        for length in (64, 100)
        for what in [("sdpa", branch) for branch in BRANCHES] + [("dense SDPA", "dense")]
    ]
    for row in rows:
        assert row["kind"] == "row"
        assert (row["heads"], row["dtype"], row["batch"]) == ("4/2:32", "float32", 1)
        assert row["note"] is None
        assert 0 < row["parity"] < 1
        assert row["forward_p10_ms"] <= row["forward_ms"] <= row["forward_p90_ms"]
        assert row["forward_runs"] >= 1
        assert (row["backward_ms"] is None) == (row["branch"] == "select")
        assert row["forward_flops"] > 0
        assert row["both_ms"] > 0
        assert row["peak_bytes"] is None
    assert "compiled: compiles for minutes on a CPU" in out or "compiled is not part" in out
    for text in ("T = 64", "T = 100", "all+select", "dense SDPA", "× dense", "100 GFLOP/s float32"):
        assert text in out
    assert max(map(len, out.splitlines())) <= 100


def test_layouts_and_dtypes(capsys, tmp_path, unchecked):
    argv = ("--heads", "4/2:32, 6/1:24/40", "--dtypes", "bf16,fp32", "--branches", "window")
    code, _, rows, out = run_jsonl(capsys, tmp_path, *argv, "--batch", "2", lengths="70")
    assert code == 0
    found = [(row["dtype"], row["heads"]) for row in rows if row["branch"] == "window"]
    assert found == [
        (dtype, heads) for dtype in ("bfloat16", "float32") for heads in ("4/2:32", "6/1:24/40")
    ]
    assert {row["batch"] for row in rows} == {2}
    assert out.count("batch 2, on cpu") == 4


def test_packed_sequences(capsys, tmp_path, quick):
    argv = ("--packed", "3", "--provider", "math")
    code, _, rows, out = run_jsonl(capsys, tmp_path, *argv, lengths="100")
    assert code == 0
    assert {row["backend"] for row in rows} == {"sdpa", "fa2-varlen", "dense SDPA"}
    assert {tuple(row["packed_lengths"]) for row in rows} == {(16, 34, 50)}
    assert all(row["note"] is None and row["parity"] < 1 for row in rows)
    assert "3 packed sequences" in out
    assert "fa2-dense: fa2-dense takes regular batches" in " ".join(out.split())


def test_a_step_of_another_backend_is_measured_once_and_named(
    capsys, tmp_path, unchecked, environment
):
    environment({"NSA_FA2_PROVIDER": "math", "NSA_USE_FA2_WIN": "0"})
    argv = ("--backends", "sdpa,fa2-dense", "--branches", "select,window,selected")
    code, header, rows, out = run_jsonl(capsys, tmp_path, *argv)
    assert code == 0
    assert header["settings"] == {"NSA_FA2_PROVIDER": "math", "NSA_USE_FA2_WIN": False}
    assert "NSA_USE_FA2_WIN=0 NSA_FA2_PROVIDER=math" in out
    found = {(row["backend"], row["branch"]): row for row in rows}
    for branch in ("select", "window"):
        mine, theirs = found["fa2-dense", branch], found["sdpa", branch]
        assert mine["runs_on"] == "sdpa"
        assert mine["both_ms"] == theirs["both_ms"]
    assert found["fa2-dense", "selected"]["runs_on"] == "fa2-dense"
    assert "fa2-dense → sdpa" in out


def test_the_library_runs_what_is_timed():
    """What a row calls is what `nsa_attention` calls, with the same selection for everyone."""
    inputs = problem(length=100).bare_inputs(native=True)
    data = bench_run.make_data(problem(length=100))
    steps = load("sdpa")
    blocks = steps.select_blocks(inputs.q, inputs.compressed.k, TINY)
    assert torch.equal(data.inputs.block_idx, blocks)
    resolution = problem(length=100).resolve("sdpa", Settings())
    outs = {
        name: bench_run.timed_branch(name, data, resolution, Settings()).forward()
        for name in BRANCHES
    }
    assert torch.equal(outs["select"], blocks)
    gates = inputs.gates
    parts = [outs[name] for name in ("compressed", "selected", "window")]
    total = sum(g[..., None] * x for g, x in zip(gates.unbind(-1), parts, strict=True))
    torch.testing.assert_close(outs["all"], total)
    assert torch.equal(outs["all"], outs["all+select"])
    # with a list given, that is what is read: here one without its last block
    shorter = blocks.where(blocks < blocks.amax(-1, keepdim=True), -1)
    given = dataclasses.replace(data.inputs, block_idx=shorter)
    data = dataclasses.replace(data, inputs=given)
    for name, changed in (("all", True), ("all+select", False)):
        out = bench_run.timed_branch(name, data, resolution, Settings()).forward()
        assert torch.equal(out, outs[name]) != changed


@pytest.mark.parametrize("sequences", [0, 3])
def test_inputs_are_those_of_the_tests(sequences):
    mine = problem(ODD, length=100, sequences=sequences).bare_inputs(native=True)
    lengths = (16, 34, 50) if sequences else None
    theirs = make_inputs(ODD, length=None if sequences else 100, lengths=lengths)
    for x, y in zip((*mine.leaves(), mine.dout), (*theirs.leaves(), theirs.dout), strict=True):
        assert (x.shape, x.dtype, x.requires_grad) == (y.shape, y.dtype, y.requires_grad)
    assert mine.max_seqlen == theirs.max_seqlen
    if sequences:
        assert torch.equal(mine.cu_seqlens, theirs.cu_seqlens)


def test_labels():
    assert heads_label(NSAConfig()) == "64/4:128"
    assert heads_label(NSAConfig.preset("paper")) == "64/4:192/128"
    assert [milliseconds(x) for x in (1.23456e-4, 1.234e-3, 0.01234, 0.1234, 12.34)] == [
        "0.123",
        "1.23",
        "12.3",
        "123",
        "12,340",
    ]
    assert [rate(x, "B/s") for x in (3.02e12, 1.5e9, 2e6)] == ["3.02 TB/s", "1.5 GB/s", "2 MB/s"]


@pytest.mark.gpu
@pytest.mark.parametrize("packing", [(), ("--packed", "3")], ids=["regular", "packed"])
def test_a_run_on_a_gpu(capsys, tmp_path, packing):
    path = tmp_path / "rows.jsonl"
    fa2 = "fa2-varlen" if packing else "fa2-dense"
    argv = ["--device", "cuda", "--backends", f"sdpa,{fa2}", "--heads", "16/1:64", *packing]
    code = bench.main([*argv, "--lengths", "256,500", "--seconds", "0.01", "--jsonl", str(path)])
    header, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert code == 0, capsys.readouterr().out
    assert header["ceilings"]["flops_per_second"]["bfloat16"] > 1e12
    assert {row["backend"] for row in rows} == {"sdpa", fa2, "dense FA-2", "dense cuDNN"}
    for row in rows:
        if row["backend"] == "dense cuDNN" and packing:
            assert row["note"] == "dense cuDNN: takes regular batches only"
        else:
            assert row["note"] is None
            assert row["both_ms"] > 0
            assert row["peak_bytes"] > 0
            assert row["parity"] < 1


# Rows without numbers


@pytest.mark.skipif(torch.cuda.is_available(), reason="FA-2 may run here")
def test_a_backend_that_was_asked_for_and_cannot_run(capsys, tmp_path, unchecked):
    argv = ("--backends", "fa2-dense,sdpa,fla", "--branches", "selected")
    code, _, rows, out = run_jsonl(capsys, tmp_path, *argv)
    assert code == 1
    notes = {row["backend"]: row["note"] for row in rows}
    assert "FlashAttention-2 needs a CUDA device, got cpu" in notes["fa2-dense"]
    assert "fla" in notes["fla"]
    assert notes["sdpa"] is None
    assert "[2]" in out


def test_out_of_memory_is_a_row_and_the_run_goes_on(capsys, tmp_path, unchecked, monkeypatch):
    honest = bench_run.timed_branch

    def fail(branch, *given):
        if branch == "selected":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return honest(branch, *given)

    monkeypatch.setattr(bench_run, "timed_branch", fail)
    code, _, rows, out = run_jsonl(capsys, tmp_path)
    assert code == 0
    notes = {row["branch"]: row["note"] for row in rows}
    assert notes.pop("selected") == "out of memory"
    assert set(notes.values()) == {None}
    assert "out of memory" in out


def test_inputs_that_do_not_fit(capsys, tmp_path, unchecked, monkeypatch):
    honest = bench_run.make_data

    def fail(wanted):
        if wanted.length == 100:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
        return honest(wanted)

    monkeypatch.setattr(bench_run, "make_data", fail)
    code, _, rows, _ = run_jsonl(capsys, tmp_path, lengths="64,100")
    assert code == 0
    notes = {(row["length"], row["backend"]): row["note"] for row in rows}
    assert notes[64, "sdpa"] is None
    assert notes[100, "sdpa"] == notes[100, "dense SDPA"] == "out of memory"


def test_inputs_that_cannot_be_made(capsys, tmp_path, unchecked, monkeypatch):
    def fail(wanted):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(bench_run, "make_data", fail)
    code, _, rows, out = run_jsonl(capsys, tmp_path)
    assert code == 1
    note = "inputs: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert {row["note"] for row in rows} == {note}
    assert f"- T = 64: {note}" in out


def test_a_kernel_that_fails_is_a_row_and_the_run_goes_on(capsys, tmp_path, unchecked, monkeypatch):
    honest = bench_run.timed_branch

    def fail(branch, *given):
        if branch == "select":
            raise RuntimeError("an illegal\nmemory access")
        return honest(branch, *given)

    monkeypatch.setattr(bench_run, "timed_branch", fail)
    code, _, rows, out = run_jsonl(capsys, tmp_path)
    assert code == 1
    notes = {row["branch"]: row["note"] for row in rows}
    assert notes.pop("select") == "sdpa, select: RuntimeError: an illegal memory access"
    assert set(notes.values()) == {None}
    assert "- T = 64: sdpa, select: RuntimeError: an illegal memory access" in out


def test_ctrl_c_keeps_what_was_measured(capsys, tmp_path, unchecked, monkeypatch):
    honest = bench_run.timed_branch

    def interrupt(branch, *given):
        if branch == "selected":
            raise KeyboardInterrupt
        return honest(branch, *given)

    monkeypatch.setattr(bench_run, "timed_branch", interrupt)
    code, _, rows, out = run_jsonl(capsys, tmp_path, "--plot", str(tmp_path / "a.png"))
    assert code == 130
    assert [row["branch"] for row in rows] == ["compressed", "select"]
    assert all(row["both_ms"] > 0 for row in rows)
    assert "compressed" in out
    assert "nothing of the whole to draw" in " ".join(out.split())
    assert not (tmp_path / "a.png").exists()


def test_rows_are_on_the_disk_as_soon_as_they_are_there(tmp_path, capsys, unchecked, monkeypatch):
    path, seen = tmp_path / "rows.jsonl", []
    honest = bench_run.timed_branch

    def look(branch, *given):
        seen.append(path.read_text().count("\n"))
        return honest(branch, *given)

    monkeypatch.setattr(bench_run, "timed_branch", look)
    path.write_text("an older run\n" * 99)
    run_jsonl(capsys, tmp_path)
    assert seen == [1, 2, 3, 4, 5, 6]


# Files


def test_the_plot(capsys, tmp_path, unchecked):
    path = tmp_path / "a.png"
    code, out, _ = run(capsys, "--plot", str(path), "--branches", "all", lengths="64,100")
    assert code == 0
    assert f"plot written to {path}" in out
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000


@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_other_kinds_of_plot(tmp_path, suffix, start):
    path = tmp_path / f"a.{suffix}"
    rows = [both("sdpa", "all", length, 1e-3 * length) for length in (64, 128)]
    assert draw(rows, CEILINGS, "a machine", path)
    assert path.read_bytes().startswith(start)
    assert not draw([both("sdpa", "window", 64, 1.0)], CEILINGS, "a machine", path)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_disk_without_room_for_the_plot(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.symlink_to("/dev/full")
    rows = [both("sdpa", "all", 64, 1e-3)]
    with pytest.raises(OSError, match="No space left on device") as error:
        draw(rows, CEILINGS, "a machine", path)
    assert error.value.filename == str(path)


def test_what_the_plot_shows(tmp_path):
    from matplotlib.figure import Figure  # what needs no plot runs without it

    figures = []
    honest = Figure.savefig

    def keep(self, path, **options):
        figures.append(self)
        honest(self, path, **options)

    rows = []
    for length in (64, 128, 256):
        timing = Timing(length * 1e-3, length * 1e-3, length * 1e-3, 5)
        for backend, branch in (("sdpa", "all"), ("sdpa", "all+select"), ("dense SDPA", "dense")):
            row = both(backend, branch, length, 1.0)
            measured = Measurement(forward=timing, backward=timing, both=timing)
            rows.append(dataclasses.replace(row, measured=measured))
    rows.append(dataclasses.replace(rows[0], backend="fa2-dense", note="out of memory"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        assert draw(rows, CEILINGS, "a machine", tmp_path / "a.png")
    [figure] = figures
    left, right = figure.axes
    assert figure.get_suptitle() == "a machine"
    assert (left.get_ylabel(), left.get_xlabel()) == ("time (ms)", "T (tokens)")
    lines = {line.get_label(): line for line in left.get_lines()}
    assert set(lines) == {
        "sdpa, all+select",
        "dense SDPA",
        "NSA's floor: arithmetic at 100 GFLOP/s",
        "NSA's floor: bytes at 10 GB/s",
    }
    assert list(lines["sdpa, all+select"].get_ydata()) == [64.0, 128.0, 256.0]
    floor = lines["NSA's floor: arithmetic at 100 GFLOP/s"]
    forward, backward = work("all+select", problem(length=256))
    assert floor.get_xdata()[-1] == 256
    assert floor.get_ydata()[-1] == pytest.approx(forward.flops / 1e11 * 1e3)
    more = forward.bytes + backward.bytes
    [floor] = [line for line in right.get_lines() if "bytes" in line.get_label()]
    assert floor.get_ydata()[-1] == pytest.approx(more / 1e10 * 1e3)


@pytest.fixture
def nothing_runs(monkeypatch):
    def fail(*given, **options):
        raise AssertionError("measured before the check")

    monkeypatch.setattr(bench, "measure_ceilings", fail)
    monkeypatch.setattr(bench_run, "make_data", fail)


def test_without_matplotlib(capsys, monkeypatch, nothing_runs, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run(capsys, "--plot", str(tmp_path / "a.png"))
    assert (code, out) == (2, "")
    assert "pip install 'nsa-torch[bench]'" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--plot", "--jsonl"])
def test_a_file_that_cannot_be_written(capsys, tmp_path, nothing_runs, flag):
    path = tmp_path / "missing" / "a.png"
    code, out, err = run(capsys, flag, str(path))
    assert (code, out) == (2, "")
    assert err == f"error: {path}: No such file or directory\n"


# The command line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lenghts", "64"], "expected a known flag, got --lenghts; did you mean --lengths?"),
        (["--lengths", "64,x"], "--lengths: expected integers, got 'x'"),
        (["--lengths", "0"], "--lengths: expected an int >= 1, got 0"),
        (["--lengths", "64,,128"], "--lengths: expected a list separated by commas, got '64,,128'"),
        (["--packed", "9", "--lengths", "8"], "--lengths: expected an int >= 9, got 8"),
        (["--packed", "0"], "--packed: expected an int >= 1, got 0"),
        (["--packed", "2", "--batch", "2"], "--packed: expected --batch 1, got --batch 2"),
        (["--batch", "two"], "argument --batch: expected an integer, got 'two'"),
        (["--backends", "sdap"], "--backends: expected one of the known names, got 'sdap'; did"),
        (["--backends", "auto"], "--backends: expected one of the known names, got 'auto'"),
        (["--branches", "windows"], "got 'windows'; did you mean 'window'?"),
        (["--backends", "fla", "--branches", "all"], "--backends fla: expected selected in"),
        (["--dtypes", "bf61"], "--dtypes: expected one of the known names, got 'bf61'; did you"),
        (["--preset", "papper"], "--preset: expected one of the known names, got 'papper'; did"),
        (["--provider", "maths"], "--provider: expected one of the known names, got 'maths'; did"),
        (["--heads", "64x4"], "--heads: expected Hq/Hkv[:Dk[/Dv]], such as 64/4:128, got '64x4'"),
        (["--heads", "6/4"], "--heads 6/4: num_heads: expected a multiple of num_kv_heads=4"),
        (["--heads", "0/4"], "--heads 0/4: num_heads: expected at least 1, got 0"),
        (["--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--seconds", "0"], "--seconds: expected a number in (0, 3600), got 0.0"),
        (["--seconds", "nan"], "--seconds: expected a number in (0, 3600), got nan"),
        (["--runs", "0"], "--runs: expected an int >= 1, got 0"),
        (["--plot", "a.jpeg"], "--plot: expected a name in .png, .svg, .pdf, got 'a.jpeg'"),
        (["--plot", "a.png", "--branches", "window"], "--plot: expected all or all+select in"),
        (["--find-fa2-min-len", "--backends", "sdpa"], "--find-fa2-min-len: expected no --backend"),
        (["everything"], "expected a flag, got 'everything'"),
    ],
)
def test_a_wrong_command_line_is_one_line(capsys, nothing_runs, argv, message):
    assert bench.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_bad_environment_is_one_line(capsys, nothing_runs, environment):
    environment({"NSA_FA2_PROVDER": "math"})
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    assert "did you mean 'NSA_FA2_PROVIDER'?" in err


def test_defaults():
    plan = make_plan(["--device", "cpu"])
    assert [trial.lengths for trial in plan.trials] == [(512,), (1024,), (2048,), (4096,)]
    assert {heads_label(trial.config) for trial in plan.trials} == {"4/2:32"}
    assert {trial.dtype for trial in plan.trials} == {torch.float32}
    assert plan.branches == BRANCHES
    argv = ["--preset", "paper", "--heads", "8/2,8/2:64", "--lengths", "9,8"]
    plan = make_plan(["--device", "cpu", *argv])
    assert [(heads_label(trial.config), trial.length) for trial in plan.trials] == [
        ("8/2:192/128", 8),
        ("8/2:192/128", 9),
        ("8/2:64", 8),
        ("8/2:64", 9),
    ]
    assert plan.trials[0].config.window == 512


def test_it_runs_as_a_module_and_needs_what_is_always_installed():
    code = """
import runpy, sys
import numpy, torch
before = {name.split(".")[0] for name in sys.modules}
sys.argv = ["bench", "--help"]
try:
    runpy.run_module("nsa.tools.bench", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code
assert not torch.cuda.is_initialized()
print(sorted({name.split(".")[0] for name in sys.modules} - before - sys.stdlib_module_names))
"""
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert "--find-fa2-min-len" in done.stdout
    assert set(ast.literal_eval(done.stdout.splitlines()[-1])) <= {"nsa", "rich"}
