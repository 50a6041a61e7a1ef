"""`python -m nsa.tools.diagnose`: what it prints and its exit codes."""

import subprocess
import sys

import pytest
import torch

import nsa
from nsa.errors import BackendUnavailable
from nsa.settings import FLAGS
from nsa.testing.parity import ParityRow
from nsa.tools.common import problems
from nsa.tools.diagnose import __main__ as diagnose
from nsa.tools.diagnose import report
from nsa.tools.diagnose.report import ParityResult
from tests.support.diagnosing import run, run_json

# What it prints


def test_every_available_backend_is_held_to_the_oracle(capsys):
    code, found = run_json(capsys)
    assert found["problems"] == []
    assert code == 0
    assert found["ok"]
    available = {row["name"] for row in found["backends"] if row["available"]}
    assert {"reference", "sdpa"} <= available
    assert {row["backend"] for row in found["parity"]} == available
    assert {row["packed"] for row in found["parity"]} == {False, True}
    tensors = {row["tensor"] for row in found["parity"]}
    assert {"out", "dq", "dgates", "dcompressed.k", "lse.window", "selection"} <= tensors
    assert all(row["ok"] and row["error"] <= row["bound"] for row in found["parity"])


def test_what_is_not_available_says_why(capsys, no_parity):
    _, found = run_json(capsys)
    for row in found["backends"]:
        assert row["available"] or row["detail"]


def test_the_machine(capsys, no_parity):
    _, found = run_json(capsys)
    machine = found["machine"]
    assert (machine["nsa"], machine["torch"]) == (nsa.__version__, torch.__version__)
    assert machine["cores"] >= 1
    assert machine["cuda_runtime"] == torch.version.cuda
    assert machine["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert [provider["name"] for provider in found["providers"]] == ["flash_attn", "aten"]


def test_every_flag_with_value_and_source(capsys, no_parity, environment):
    environment({"NSA_CHECK": "1"})
    _, found = run_json(capsys)
    assert [row["flag"] for row in found["settings"]] == list(FLAGS)
    rows = {row["flag"]: (row["value"], row["source"]) for row in found["settings"]}
    assert rows["NSA_CHECK"] == (True, "environment")
    assert rows["NSA_BACKEND"] == ("auto", "default")


def test_tables_for_people(capsys, no_parity):
    code, out, _ = run(capsys)
    assert code == 0
    for text in ("Machine", "FlashAttention-2", "NSA_USE_FA2", "sdpa", "auto on cpu", "works."):
        assert text in out


def test_a_library_that_prints_does_not_spoil_the_json(capsys, no_parity, monkeypatch):
    def collect_reports(device):
        print("hello from a kernel library")
        return ()

    monkeypatch.setattr(report, "collect_reports", collect_reports)
    code, found = run_json(capsys)
    assert code == 0
    assert found["ok"]


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "nsa.tools.diagnose", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--json" in done.stdout


# Exit code 1: what was asked for does not work


def test_a_requested_backend_that_cannot_run(capsys, no_parity, monkeypatch):
    def refuse(config, *, backend, **problem):
        raise BackendUnavailable(f"backend={backend!r} asks for it, which cannot run this")

    monkeypatch.setattr(problems, "resolve", refuse)
    code, found = run_json(capsys, "--backend", "sdpa")
    assert code == 1
    assert found["problems"] == ["backend='sdpa' asks for it, which cannot run this"]
    assert [row["name"] for row in found["backends"] if row["requested"]] == ["sdpa"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="FA-2 may run here")
@pytest.mark.parametrize(
    "flags", [{"NSA_BACKEND": "fa2-dense"}, {"NSA_BACKEND": "fa2-varlen"}, {"NSA_USE_FA2": "1"}]
)
def test_a_backend_that_the_environment_requests(capsys, no_parity, environment, flags):
    environment(flags)
    code, out, _ = run(capsys)
    assert code == 1
    [(name, value)] = flags.items()
    [way_out] = out.rstrip().splitlines()[-1:]
    assert way_out == f"Without {name}, sdpa would run."
    end = " ".join(out.partition("Something is wrong:")[2].split())
    assert f"{name}={value} asks for fa2-" in end
    assert "(fix: use a CUDA GPU of compute capability 8.0 or newer)" in end


def test_a_requested_backend_that_runs(capsys, no_parity, environment):
    environment({"NSA_BACKEND": "sdpa"})
    code, found = run_json(capsys)
    assert code == 0
    assert [choice["backend"] for choice in found["choices"]] == ["sdpa", "sdpa"]
    assert found["choices"][0]["reason"] == "NSA_BACKEND=sdpa"


def test_the_flag_beats_the_environment(capsys, no_parity, environment):
    environment({"NSA_BACKEND": "reference"})
    code, found = run_json(capsys, "--backend", "sdpa")
    assert code == 0
    assert found["choices"][0]["backend"] == "sdpa"
    assert found["choices"][0]["reason"] == "backend='sdpa'"


@pytest.mark.parametrize("error", [2.0, float("inf"), float("nan")])
def test_parity_that_fails(capsys, monkeypatch, error):
    rows = [ParityRow("out", 1e-7, 1e-6), ParityRow("dq", error, 1.0)]
    monkeypatch.setattr(report, "attention_parity", lambda name, inputs: rows)
    code, found = run_json(capsys)
    assert code == 1
    assert not found["ok"]
    bad = [row for row in found["parity"] if not row["ok"]]
    assert {row["tensor"] for row in bad} == {"dq"}
    assert bad[0]["error"] == (2.0 if error == 2.0 else None)
    assert f"sdpa, regular float32 on cpu: dq is {error:.2e} off" in found["problems"][2]
    code, out, _ = run(capsys)
    assert code == 1
    assert "dq" in out


def test_selection_that_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(report, "attention_parity", lambda name, inputs: [])
    monkeypatch.setattr(report, "selection_faults", lambda name, inputs: ["a block is missing"])
    code, found = run_json(capsys)
    assert code == 1
    assert "sdpa, packed float32 on cpu: selection: a block is missing" in found["problems"]


def test_a_backend_that_raises(capsys, monkeypatch):
    def fail(name, inputs):
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(report, "attention_parity", fail)
    code, found = run_json(capsys)
    assert code == 1
    assert (
        "sdpa failed, regular float32 on cpu: RuntimeError: no kernel image is available for "
        "execution on the device" in found["problems"]
    )


def test_a_bad_environment_is_explained(capsys, no_parity, environment):
    environment({"NSA_BAKEND": "sdpa", "NSA_CHECK": "1"})
    code, found = run_json(capsys)
    assert code == 1
    assert "did you mean 'NSA_BACKEND'?" in found["settings_error"]
    assert found["problems"] == [found["settings_error"]]
    assert found["advice"][0].startswith("The environment is wrong")
    rows = {row["flag"]: (row["value"], row["source"]) for row in found["settings"]}
    assert rows["NSA_BAKEND"] == ("sdpa", "environment (unknown)")
    assert rows["NSA_CHECK"] == ("1", "environment")
    assert any(row["available"] for row in found["backends"])
    assert run(capsys)[0] == 1


def test_a_result_that_is_not_a_number_fails():
    row = {"backend": "x", "device": "cpu", "dtype": "float32", "packed": False, "tensor": "out"}
    assert not ParityResult(**row, error=float("nan"), bound=1.0).ok
    assert ParityResult(**row, error=1.0, bound=1.0).ok


# Exit code 2: the command line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bakend", "sdpa"], "expected a known flag, got --bakend; did you mean --backend?"),
        (["--backend", "sdap"], "--backend: expected one of the known names, got 'sdap'; did you"),
        (["--backend"], "--backend: expected one argument"),
        (["--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:99"], "--device: expected a device of this machine, got 'cuda:99'"),
        (["everything"], "expected a flag, got 'everything'"),
    ],
)
def test_a_wrong_command_line_is_one_line(capsys, argv, message):
    assert diagnose.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
