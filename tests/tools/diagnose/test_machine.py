"""`diagnose` looks at the machine, and advises."""

import dataclasses
import types

import pytest
import torch
from rich.console import Console

from nsa.backends.fa2.providers import Report
from nsa.settings import Settings
from nsa.tools.common import machine as machine_module
from nsa.tools.common.machine import Gpu, collect_machine
from nsa.tools.diagnose.advice import advice
from nsa.tools.diagnose.tables import _tiles
from nsa.tools.diagnose.tiles import tile_rows

ABSENT = Report(name="flash_attn", version=None, status="absent", detail="not installed")
H100 = Gpu(name="H100", capability="9.0", memory_gib=80.0, has_kernels=True)


@pytest.fixture(scope="module")
def machine():
    """A healthy machine with one GPU."""
    return dataclasses.replace(
        collect_machine(),
        cuda_runtime="13.0",
        cuda_driver="580.1",
        cuda_messages=(),
        gpus=(H100,),
        gpus_of_driver=("H100",),
        triton="3.6.0",
        variables={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
    )


def advise(machine, report=ABSENT, settings=None, mistake=None):
    return list(advice(machine, (report,), settings or Settings(), mistake))


def test_nothing_to_advise(machine):
    assert advise(machine) == []


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
    [line] = advise(dataclasses.replace(machine, **changes))
    assert text in line


def test_a_wrong_environment_comes_first(machine):
    machine = dataclasses.replace(machine, triton=None)
    first, _ = advise(machine, mistake="NSA_CHECK: expected 0 or 1, got 'yes'")
    assert "The environment is wrong" in first
    assert "got 'yes'" in first


@pytest.mark.parametrize("status", ["broken", "wrong numbers"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("flash_attn", "flash_attn 1.2: it is odd (fix: mend it); or uninstall it, since PyTorch"),
        ("aten", "aten (torch 1.2): it is odd (fix: mend it)."),
    ],
)
def test_a_source_that_does_not_work(machine, status, name, text):
    report = Report(name=name, version="1.2", status=status, detail="it is odd", fix="mend it")
    [line] = advise(machine, report)
    assert line.startswith(text)


def test_math_is_not_fa2(machine):
    [line] = advise(machine, settings=Settings(fa2_provider="math"))
    assert "NSA_FA2_PROVIDER=math computes in plain PyTorch" in line


def test_the_newer_allocator_variable_counts_too(machine):
    variables = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert advise(dataclasses.replace(machine, variables=variables)) == []


def test_a_driver_that_does_not_answer(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    for script in ("#!/bin/sh\nexit 9\n", "not a program", "#!/bin/sh\n"):
        program.write_text(script)
        program.chmod(0o755)
        machine = collect_machine()
        assert (machine.cuda_driver, machine.gpus_of_driver) == (None, ())
    program.write_text("#!/bin/sh\necho '580.65.06, NVIDIA H100 80GB HBM3'\n")
    machine = collect_machine()
    assert machine.cuda_driver == "580.65.06"
    assert machine.gpus_of_driver == ("NVIDIA H100 80GB HBM3",)


def test_a_torch_that_complains_about_its_driver(monkeypatch):
    def complain():
        raise RuntimeError("CUDA driver initialization failed,\nyou might not have a CUDA gpu.")

    monkeypatch.setattr(torch.cuda, "device_count", complain)
    machine = collect_machine()
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
        return machine_module._gpu(0)

    assert gpu(9, 0, "sm_80", "sm_90").capability == "9.0"
    assert gpu(9, 0, "sm_80", "sm_90").has_kernels
    assert gpu(9, 0, "sm_80", "sm_90a").has_kernels
    assert gpu(8, 9, "sm_80", "sm_90").has_kernels
    assert gpu(12, 1, "sm_90", "compute_90").has_kernels
    assert not gpu(7, 5, "sm_80", "sm_90", "compute_90").has_kernels
    assert not gpu(10, 0, "sm_80", "sm_90").has_kernels


def test_tiles_are_those_of_the_gpu():
    """An H100's own are measured; on another card they are untuned, with the command to mend it."""
    ada = dataclasses.replace(H100, name="RTX 4090", capability="8.9")
    old = dataclasses.replace(H100, name="T4", capability="7.5")
    rows = tile_rows((H100, ada, ada, old))
    assert {row.gpu for row in rows} == {"H100", "RTX 4090"}
    assert len(rows) == 6
    tuned = {(row.gpu, row.heads) for row in rows if row.tuned}
    assert tuned == {("H100", "64/4:128"), ("H100", "12/2:64")}
    assert rows[0].selected == "H100, bf16"
    console = Console(width=100)
    with console.capture() as printed:
        console.print(_tiles(rows))
    assert "bench --tune --heads 64/4:192/128" in " ".join(printed.get().split())
