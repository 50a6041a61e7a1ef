"""`diagnose` answers whether FlashAttention-2 is really used: its sources, and what is chosen."""

import pytest
import torch
from torch.nn import attention

from nsa.backends import TABLE
from nsa.backends.fa2 import providers as fa2_providers
from nsa.tools.common import problems as trials
from nsa.tools.diagnose import report
from tests.support import flash_attn_stubs as stubs
from tests.support.diagnosing import run, run_json

MATH = {"NSA_USE_FA2": "1", "NSA_FA2_PROVIDER": "math"}
PACKAGE = {"NSA_USE_FA2": "1", "NSA_FA2_PROVIDER": "flash_attn"}
STUBS = {
    "ImportError": ((stubs.IMPORT_ERROR,), "broken", "ImportError: flash_attn_2_cuda.so: undef"),
    "OSError": ((stubs.OS_ERROR,), "broken", "OSError: libcudart.so.12: cannot open shared"),
    "no kernel": ((stubs.NO_KERNEL,), "broken", "CUDA error: no kernel image is available"),
    "wrong": ((stubs.WRONG_OUT,), "wrong numbers", "wrong numbers (out: relative error 0.05)"),
    "version 4": ((stubs.RIGHT, "flash-attn-4"), "absent", "only flash-attn-4 2.8.3 is installed"),
    "no metadata": ((stubs.RIGHT, None), "absent", "folder without a distribution is not used"),
}
really_installed = fa2_providers._version("flash-attn") is not None


@pytest.fixture
def half(monkeypatch):
    """Trials in bfloat16 alone, as FA-2 takes it."""
    monkeypatch.setattr(trials, "_dtypes", lambda device: (torch.bfloat16,))


def branches(choice):
    return {row["branch"]: row for row in choice["branches"]}


# The package, installed in many ways


@pytest.mark.parametrize("case", STUBS)
def test_a_package_that_does_not_work(capsys, no_parity, environment, install, fits, case):
    installed, status, error = STUBS[case]
    if status == "absent" and really_installed:
        pytest.skip("flash-attn is installed here")
    install(*installed)
    environment({})
    code, found = run_json(capsys)
    package = found["providers"][0]
    assert (code, package["status"]) == (0, status)
    assert error in package["detail"]
    assert package["fix"] is not None
    assert any(error in line for line in found["advice"]) == (status != "absent")
    environment(PACKAGE)
    code, found = run_json(capsys)
    assert code == 1
    [problem] = found["problems"]
    assert problem.startswith("NSA_USE_FA2=1 asks for fa2-dense, which cannot run this: flash_attn")
    assert f"{package['detail']} (fix: {package['fix']}); backends that can: " in problem
    code, out, _ = run(capsys)
    assert code == 1
    end = " ".join(out.partition("Something is wrong:")[2].split())
    assert end == f"- {problem} Without NSA_USE_FA2, sdpa would run."


@pytest.mark.parametrize("case", ["ImportError", "OSError"])
def test_a_package_that_does_not_import_is_seen_without_a_gpu(capsys, no_parity, install, case):
    installed, _, error = STUBS[case]
    install(*installed)
    code, found = run_json(capsys)
    assert code == 0
    assert found["providers"][0]["status"] == "broken"
    assert error in found["providers"][0]["detail"]
    assert any("built for another torch" in line for line in found["advice"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a device here")
def test_a_package_is_not_called_without_a_gpu(capsys, no_parity, install):
    install(stubs.NO_KERNEL)
    code, found = run_json(capsys)
    assert code == 0
    assert found["providers"][0]["status"] == "not run"
    assert found["providers"][0]["detail"] == "imports; not called: torch sees no CUDA device"
    assert found["advice"] == []


def test_a_package_that_works_is_what_runs(capsys, environment, install, fits, half, monkeypatch):
    """With the numbers: the stand-in's own, through both backends."""
    both = {name: row for name, row in TABLE.items() if name.startswith("fa2-")}
    monkeypatch.setattr(report, "TABLE", both)
    install(stubs.RIGHT)
    environment({"NSA_USE_FA2": "1"})
    code, found = run_json(capsys)
    assert found["problems"] == []
    assert code == 0
    assert found["providers"][0]["status"] == "works"
    assert {row["backend"] for row in found["parity"]} == {"fa2-dense", "fa2-varlen"}
    for choice, backend in zip(found["choices"], ("fa2-dense", "fa2-varlen"), strict=True):
        rows = branches(choice)
        assert choice["backend"] == backend
        assert rows.pop("select") == {
            "branch": "select",
            "backend": "sdpa",
            "fa2": False,
            "provider": None,
            "why": "FA-2 has no such step",
        }
        assert set(rows) == {"compressed", "selected", "window"}
        for row in rows.values():
            assert (row["backend"], row["provider"]) == (backend, "flash_attn 2.8.3")
            assert row["fa2"]


def test_the_answer(capsys, no_parity, environment, install, fits, half):
    install(stubs.RIGHT)
    environment({"NSA_USE_FA2": "1"})
    out = " ".join(run(capsys)[1].split())
    assert (
        "FA-2 is used: yes, flash_attn 2.8.3, for regular bfloat16 (compressed, selected, window), "
        "packed bfloat16 (compressed, selected, window); --profile shows the kernels" in out
    )
    environment({"NSA_BACKEND": "sdpa"})
    assert "FA-2 is used: no Everything" in " ".join(run(capsys)[1].split())


def test_auto_on_cuda_in_words(capsys, no_parity, environment, install, fits, half):
    install(stubs.RIGHT)
    environment({"NSA_BACKEND": "fa2-dense"})
    code, found = run_json(capsys)
    regular, packed = found["choices"]
    assert code == 0  # what it can run is run
    assert regular["backend"] == "fa2-dense"
    assert packed["backend"] is None
    assert packed["branches"] == []
    assert "fa2-dense takes regular batches, got cu_seqlens: use fa2-varlen" in packed["reason"]
    assert "refused" in run(capsys)[1]


# Flags


def test_branches_that_flags_send_elsewhere(capsys, no_parity, environment):
    environment(MATH | {"NSA_USE_FA2_WIN": "0", "NSA_FA2_MIN_LEN_CMP": "1500"})
    code, found = run_json(capsys)
    assert code == 0
    regular, packed = (branches(choice) for choice in found["choices"])
    for rows in (regular, packed):
        assert (rows["window"]["backend"], rows["window"]["why"]) == ("sdpa", "NSA_USE_FA2_WIN=0")
    assert [choice["length"] for choice in found["choices"]] == [2048, 1024]
    assert regular["compressed"]["backend"] == "fa2-dense"
    assert packed["compressed"]["backend"] == "sdpa"
    assert packed["compressed"]["why"] == "shorter than NSA_FA2_MIN_LEN_CMP=1500"
    out = run(capsys)[1]
    assert "NSA_USE_FA2_WIN=0" in out
    assert "2,048 tokens" in out


def test_math_is_not_fa2(capsys, no_parity, environment):
    environment(MATH)
    code, found = run_json(capsys)
    assert code == 0
    rows = branches(found["choices"][0])
    assert (rows["window"]["backend"], rows["window"]["provider"]) == ("fa2-dense", "math")
    assert not any(row["fa2"] for row in rows.values())
    assert "NSA_FA2_PROVIDER=math computes in plain PyTorch" in " ".join(found["advice"])
    out = run(capsys)[1]
    assert "math: not FA-2, plain PyTorch" in out
    assert "FA-2 is used: no" in out


def test_a_wrong_environment_runs_nothing(capsys, no_parity, environment):
    environment({"NSA_USE_FA2": "yes"})
    code, found = run_json(capsys)
    assert code == 1
    assert found["choices"] == []


def test_the_way_out_names_what_asked(capsys, no_parity, environment):
    environment({"NSA_BACKEND": "fa2-varlen", "NSA_USE_FA2": "1"})
    _, found = run_json(capsys)
    assert found["way_out"] == "Without NSA_BACKEND and NSA_USE_FA2, sdpa would run."
    environment({"NSA_BACKEND": "reference"})
    code, found = run_json(capsys, "--backend", "compiled")
    if code == 1:
        assert found["way_out"] == "Without --backend compiled, reference would run."
    environment({"NSA_USE_FA2": "1"})
    _, found = run_json(capsys, "--backend", "fa2-dense")
    assert found["way_out"] is None  # the environment asks for the same


# PyTorch's own


@pytest.mark.skipif(
    not hasattr(attention, "current_flash_attention_impl"), reason="not in this version of torch"
)
def test_another_implementation_is_shown(capsys, no_parity, monkeypatch):
    monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: "FA4")
    _, found = run_json(capsys)
    aten = found["providers"][1]
    assert aten["status"] == "not run"
    assert aten["detail"] == "FA4 is active in place of torch's FlashAttention-2 kernels"
    assert aten["fix"] == "torch.nn.attention.restore_flash_attention_impl()"
