"""Kernels are built before they are launched, side by side, on whatever machine."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsa import BackendUnavailable
from nsa.core import build
from nsa.core.operators import BUILDING
from tests.support.absent_gpu import CODE, build_two, pretend

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, to build with"
)
NAMES = ["nsa_block_tokens_gather", "nsa_block_tokens_scatter"]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One with an empty cache, and kernels that nobody has built in this process."""
    pretend(monkeypatch)
    from nsa.core.block_tokens import kernels

    for kernel in (kernels.nsa_block_tokens_gather, kernels.nsa_block_tokens_scatter):
        monkeypatch.setattr(
            kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder)
        )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_launches_are_built_once_and_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from triton import knobs

    compiled: list[str] = []

    def listen(*, src: object, **others: object) -> None:
        compiled.append(src.fn.__name__)  # type: ignore[attr-defined]

    monkeypatch.setattr(knobs.compilation, "listener", listen)
    packed: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda x: x), torch.no_grad():
        assert build_two() == NAMES
    assert packed == []
    assert sorted(compiled) == NAMES
    assert {file.suffix for file in tmp_path.rglob("nsa_*")} >= {".cubin", ".json"}
    build_two()
    build_two("the same kernels under another key")
    assert sorted(compiled) == NAMES
    assert not BUILDING.get()


def test_a_folder_that_turns_out_to_be_locked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It was not empty, and a kernel is missing all the same; the next try may go well."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(BackendUnavailable, match=r"Not a directory.*got .*file: name another"):
        build_two()
    assert not BUILDING.get()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert build_two() == NAMES


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(self: object, make: object) -> None:
        raise subprocess.CalledProcessError(1, ["gcc", "main.c"])

    monkeypatch.setattr(build._Loading, "submit", submit)
    with pytest.raises(BackendUnavailable, match=r"'gcc', 'main.c'.*; expected a C compiler"):
        build_two()


def test_a_rehearsal_does_not_import_torchs_compiler() -> None:
    """A second or two, of the four that a first call may take."""
    code = "from tests.support.absent_gpu import rehearse_layer; print(*rehearse_layer())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=_here(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not {"sympy", "torch._dynamo", "torch._inductor"} & set(done.stdout.split())


def test_several_processes_on_an_empty_cache(tmp_path: Path) -> None:
    environment = {**_here(), "TRITON_CACHE_DIR": str(tmp_path / "shared")}
    command = [sys.executable, "-c", CODE]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in running:
        out, err = process.communicate()
        assert process.returncode == 0, err.decode()
        assert out.decode().strip() == str(NAMES)


def _here() -> dict[str, str]:
    """An environment where a process finds this library."""
    path = os.pathsep.join((os.getcwd(), os.environ.get("PYTHONPATH", "")))
    return {**os.environ, "PYTHONPATH": path}
