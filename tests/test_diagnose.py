"""`python -m nsa.tools.diagnose`: what it prints, its exit codes, broken installations."""

import dataclasses
import json
import subprocess
import sys
import types

import pytest
import torch
from torch.nn import functional as F

from nsa.errors import BackendUnavailable
from nsa.settings import FLAGS, read_environment
from nsa.testing.parity import ParityRow
from nsa.tools import _flash_attn, _machine, diagnose
from nsa.tools._advice import advice
from nsa.tools._diagnosis import ParityResult
from nsa.tools._flash_attn import Provider, look_at_flash_attn, look_at_torch
from nsa.tools._machine import Gpu, look_at_machine

CPU = torch.device("cpu")


@pytest.fixture
def environment():
    yield read_environment
    read_environment()


@pytest.fixture
def no_parity(monkeypatch):
    """Takes the numbers out, for tests that are about something else."""
    monkeypatch.setattr(diagnose, "attention_parity", lambda name, inputs: [])
    monkeypatch.setattr(diagnose, "selection_faults", lambda name, inputs: [])


def run(capsys, *argv):
    code = diagnose.main([*argv, "--device", "cpu"])
    out, err = capsys.readouterr()
    return code, out, err


def run_json(capsys, *argv):
    code, out, _ = run(capsys, *argv, "--json")
    return code, json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


# What it prints


def test_every_available_backend_is_held_to_the_oracle(capsys):
    code, found = run_json(capsys)
    assert code == 0
    assert found["ok"]
    assert found["problems"] == []
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
    assert machine["torch"] == torch.__version__
    assert machine["cores"] >= 1
    assert machine["cuda_runtime"] == torch.version.cuda
    assert machine["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert [provider["name"] for provider in found["providers"]] == [
        "flash-attn (package)",
        "PyTorch's own",
    ]


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
    def look(device):
        print("hello from a kernel library")
        return look_at_torch(device)

    monkeypatch.setattr(diagnose, "look_at_torch", look)
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

    monkeypatch.setattr(diagnose, "resolve", refuse)
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
    assert f"{name}={value} asks for" in " ".join(out.split())
    assert "Something is wrong." in out


def test_a_requested_backend_that_runs(capsys, no_parity, environment):
    environment({"NSA_BACKEND": "sdpa"})
    code, found = run_json(capsys)
    assert code == 0
    assert found["choice"].startswith("sdpa (NSA_BACKEND=sdpa)")


def test_the_flag_beats_the_environment(capsys, no_parity, environment):
    environment({"NSA_BACKEND": "reference"})
    code, found = run_json(capsys, "--backend", "sdpa")
    assert code == 0
    assert found["choice"].startswith("sdpa (backend='sdpa')")


@pytest.mark.parametrize("error", [2.0, float("inf"), float("nan")])
def test_parity_that_fails(capsys, monkeypatch, error):
    rows = [ParityRow("out", 1e-7, 1e-6), ParityRow("dq", error, 1.0)]
    monkeypatch.setattr(diagnose, "attention_parity", lambda name, inputs: rows)
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
    monkeypatch.setattr(diagnose, "attention_parity", lambda name, inputs: [])
    monkeypatch.setattr(diagnose, "selection_faults", lambda name, inputs: ["a block is missing"])
    code, found = run_json(capsys)
    assert code == 1
    assert "sdpa, packed float32 on cpu: selection: a block is missing" in found["problems"]


def test_a_backend_that_raises(capsys, monkeypatch):
    def fail(name, inputs):
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(diagnose, "attention_parity", fail)
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


# flash-attn, installed in many ways


def right(q, k, v, causal):
    assert causal
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def not_causal(q, k, v, causal):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def not_a_number(q, k, v, causal):
    return right(q, k, v, causal) * float("nan")


def no_kernel(q, k, v, causal):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


def in_a_tuple(q, k, v, causal):
    return right(q, k, v, causal), None


@pytest.fixture
def install(monkeypatch):
    """Pretends that distributions are installed, and puts a `flash_attn` in place."""

    def put(versions, *, function=None, source=None, tmp_path=None):
        monkeypatch.setattr(_flash_attn, "version_of", versions.get)
        monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
        if function is not None:
            module = types.ModuleType("flash_attn")
            module.flash_attn_func = function
            monkeypatch.setitem(sys.modules, "flash_attn", module)
        if source is not None:
            (tmp_path / "flash_attn").mkdir()
            (tmp_path / "flash_attn" / "__init__.py").write_text(source)
            monkeypatch.syspath_prepend(tmp_path)

    yield put
    sys.modules.pop("flash_attn", None)


INSTALLED = {"flash-attn": "2.8.3"}


def test_flash_attn_is_absent(install):
    install({})
    found = look_at_flash_attn(CPU)
    assert (found.status, found.version, found.detail) == ("absent", None, "not installed")


def test_flash_attn_works(install):
    install(INSTALLED, function=right)
    found = look_at_flash_attn(CPU)
    assert (found.status, found.version) == ("works", "2.8.3")
    assert "relative error" in found.detail


def test_flash_attn_is_not_called_without_a_device(install):
    install(INSTALLED, function=no_kernel)
    found = look_at_flash_attn(None)
    assert found.status == "not run"
    assert found.detail == "imports; not called: torch sees no CUDA device"


@pytest.mark.parametrize("function", [not_causal, not_a_number])
def test_flash_attn_is_wrong(install, function):
    install(INSTALLED, function=function)
    found = look_at_flash_attn(CPU)
    assert found.status == "wrong numbers"
    assert "wrong numbers" in advice(look_at_machine(), found, None)[-1]


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (no_kernel, "RuntimeError: FlashAttention only supports Ampere GPUs or newer."),
        (in_a_tuple, "TypeError: flash_attn_func: expected a tensor, got tuple"),
    ],
)
def test_flash_attn_cannot_be_called(install, function, error):
    install(INSTALLED, function=function)
    found = look_at_flash_attn(CPU)
    assert (found.status, found.detail) == ("broken", error)


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        (
            "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E')",
            "built for another torch",
        ),
        (
            "raise OSError('libcudart.so.12: cannot open shared object file: No such file')",
            "built for another torch",
        ),
        ("raise RuntimeError('no good')", "does not work (RuntimeError: no good)"),
        ("", "does not work (AttributeError: "),
    ],
)
def test_flash_attn_cannot_be_imported(install, tmp_path, source, hint):
    install(INSTALLED, source=source, tmp_path=tmp_path)
    found = look_at_flash_attn(CPU)
    assert found.status == "broken"
    assert hint in advice(look_at_machine(), found, None)[-1]


def test_flash_attn_4_is_not_flash_attn_2(install, tmp_path):
    install({"flash-attn-4": "4.0.0"}, source="raise ImportError('no')\n", tmp_path=tmp_path)
    found = look_at_flash_attn(CPU)
    assert (found.status, found.version) == ("absent", None)
    assert "only flash-attn-4 4.0.0 is installed" in found.detail


def test_a_flash_attn_folder_without_a_distribution_is_tried(install, tmp_path):
    install({}, source="raise ImportError('half copied')\n", tmp_path=tmp_path)
    found = look_at_flash_attn(CPU)
    assert (found.status, found.detail) == ("broken", "ImportError: half copied")


def test_a_broken_flash_attn_does_not_fail_what_does_not_ask_for_it(
    capsys, no_parity, install, tmp_path
):
    source = "raise ImportError('undefined symbol: x')\n"
    install(INSTALLED, source=source, tmp_path=tmp_path)
    code, found = run_json(capsys)
    assert code == 0
    assert found["providers"][0]["status"] == "broken"
    assert found["providers"][0]["detail"] == "ImportError: undefined symbol: x"
    assert any("built for another torch" in line for line in found["advice"])


def test_pytorchs_own(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert look_at_torch(CPU).status == "absent"
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert look_at_torch(None).status == "not run"


# Advice


NONE = Provider(name="flash-attn (package)", version=None, status="absent", detail="")
H100 = Gpu(name="H100", capability="9.0", memory_gib=80.0, has_kernels=True)


@pytest.fixture(scope="module")
def machine():
    """A healthy machine with one GPU."""
    return dataclasses.replace(
        look_at_machine(),
        cuda_runtime="13.0",
        cuda_driver="580.1",
        cuda_messages=(),
        gpus=(H100,),
        gpus_of_driver=("H100",),
        triton="3.6.0",
        variables={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
    )


def test_nothing_to_advise(machine):
    assert advice(machine, NONE, None) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"variables": {}}, "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"),
        ({"gpus": (), "cuda_runtime": None, "torch": "2.13.0+cpu"}, "2.13.0+cpu is a CPU-only"),
        ({"gpus": (), "variables": {"CUDA_VISIBLE_DEVICES": "-1"}}, "CUDA_VISIBLE_DEVICES=-1 may"),
        ({"gpus": (), "variables": {}}, "this torch wants CUDA 13.0; update the driver"),
        ({"cuda_messages": ("The driver is too old",)}, "The driver is too old"),
        ({"gpus": (dataclasses.replace(H100, has_kernels=False),)}, "build has no code"),
        ({"gpus": (dataclasses.replace(H100, capability="7.5"),)}, "FlashAttention-2 needs 8.0"),
        ({"triton": None}, "triton is not installed"),
    ],
)
def test_advice(machine, changes, text):
    [line] = advice(dataclasses.replace(machine, **changes), NONE, None)
    assert text in line


def test_the_newer_allocator_variable_counts_too(machine):
    variables = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert advice(dataclasses.replace(machine, variables=variables), NONE, None) == []


def test_a_driver_that_does_not_answer(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setattr(_machine.shutil, "which", lambda name: str(program))
    for script in ("#!/bin/sh\nexit 9\n", "not a program", "#!/bin/sh\n"):
        program.write_text(script)
        program.chmod(0o755)
        machine = look_at_machine()
        assert (machine.cuda_driver, machine.gpus_of_driver) == (None, ())
    program.write_text("#!/bin/sh\necho '580.65.06, NVIDIA H100 80GB HBM3'\n")
    machine = look_at_machine()
    assert machine.cuda_driver == "580.65.06"
    assert machine.gpus_of_driver == ("NVIDIA H100 80GB HBM3",)


def test_a_torch_that_complains_about_its_driver(monkeypatch):
    def complain():
        raise RuntimeError("CUDA driver initialization failed,\nyou might not have a CUDA gpu.")

    monkeypatch.setattr(torch.cuda, "device_count", complain)
    machine = look_at_machine()
    assert machine.gpus == ()
    assert machine.cuda_messages == (
        "CUDA driver initialization failed, you might not have a CUDA gpu.",
    )


def test_code_for_a_gpu(monkeypatch):
    def gpu(major, minor, *built_for):
        properties = types.SimpleNamespace(
            name="GPU", major=major, minor=minor, total_memory=80 * 2**30
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built_for))
        return _machine._gpu(0)

    assert gpu(9, 0, "sm_80", "sm_90").capability == "9.0"
    assert gpu(9, 0, "sm_80", "sm_90").has_kernels
    assert gpu(9, 0, "sm_80", "sm_90a").has_kernels
    assert gpu(8, 9, "sm_80", "sm_90").has_kernels
    assert gpu(12, 1, "sm_90", "compute_90").has_kernels
    assert not gpu(7, 5, "sm_80", "sm_90", "compute_90").has_kernels
    assert not gpu(10, 0, "sm_80", "sm_90").has_kernels


def test_a_result_that_is_not_a_number_fails():
    row = {"backend": "x", "device": "cpu", "dtype": "float32", "packed": False, "tensor": "out"}
    assert not ParityResult(**row, error=float("nan"), bound=1.0).ok
    assert ParityResult(**row, error=1.0, bound=1.0).ok
