"""What a machine lacks for ``compiled`` is said beforehand, by every way of asking."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nsa import BackendUnavailable, NSAConfig, resolve
from nsa.backends import dispatch
from nsa.core import toolchain

CUDA_PROBLEM = {
    "device": "cuda",
    "dtype": torch.bfloat16,
    "length": 100,
    "packed": False,
    "needs_grad": True,
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """One that has everything: a compiler, headers, folders."""
    monkeypatch.delenv("CC", raising=False)
    _program(tmp_path / "bin", "gcc")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    _include(monkeypatch, tmp_path)
    (tmp_path / "Python.h").touch()
    caches = (toolchain.gpu_refusal, toolchain.cpu_refusal, dispatch._resolve, dispatch._log_once)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def _program(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.touch(mode=0o755)
    return path


def _include(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(toolchain.sysconfig, "get_paths", lambda scheme: {"include": str(folder)})


def test_a_machine_that_has_all() -> None:
    assert toolchain.gpu_refusal() is None


def test_no_c_compiler(machine: Path) -> None:
    (machine / "bin" / "gcc").unlink()
    _program(machine / "bin", "cc")  # triton does not look for this name
    assert toolchain.gpu_refusal() == (
        "compiled needs a C compiler on a GPU, with which triton builds the launchers of kernels, "
        "and found none: install gcc, or name a compiler in the variable CC"
    )


@pytest.mark.parametrize("name", ["clang", "CC", "impl"])
def test_another_compiler(machine: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "bin" / "gcc").unlink()
    if name == "clang":
        _program(machine / "bin", "clang")
    elif name == "CC":
        monkeypatch.setenv("CC", str(_program(machine / "elsewhere", "icx")))
    else:
        knobs = SimpleNamespace(build=SimpleNamespace(impl=print))
        monkeypatch.setitem(sys.modules, "triton.knobs", knobs)
    assert toolchain.gpu_refusal() is None


@pytest.mark.parametrize("named", ["ccache gcc", "/no/such/gcc"])
def test_cc_names_no_program(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton runs what CC says as one program."""
    monkeypatch.setenv("CC", named)
    refusal = toolchain.gpu_refusal()
    assert refusal is not None
    assert f"and CC={named!r} names no program: install gcc" in refusal


def test_no_headers_of_python(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "Python.h").unlink()
    refusal = toolchain.gpu_refusal()
    assert refusal is not None
    assert f"there is no Python.h in {machine}: install python3-dev" in refusal
    monkeypatch.setenv("CPATH", "/somewhere")
    toolchain.gpu_refusal.cache_clear()
    assert toolchain.gpu_refusal() is None


@pytest.mark.parametrize("variable", [toolchain.TRITON_DIR, toolchain.INDUCTOR_DIR])
def test_folders_that_cannot_be_written_to(
    machine: Path, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine / "file").touch()  # root may write anywhere else
    monkeypatch.setenv(variable, str(machine / "file" / "deep"))
    refusal = toolchain.gpu_refusal()
    assert refusal is not None
    assert f"{machine}/file/deep cannot be written to: name another in" in refusal
    assert refusal.endswith(variable)
    if variable == toolchain.INDUCTOR_DIR:
        assert toolchain.cpu_refusal() == refusal


def test_a_read_only_home(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(toolchain.TRITON_DIR)
    monkeypatch.setenv("HOME", str(machine))
    (machine / "inductor").mkdir()
    real = os.access

    def access(path: str | Path, mode: int) -> bool:
        return real(path, mode) and not (mode & os.W_OK and Path(path) in locked)

    locked = [machine]
    monkeypatch.setattr(os, "access", access)
    refusal = toolchain.gpu_refusal()
    assert refusal is not None
    assert f"{machine}/.triton/cache cannot be written to" in refusal
    (machine / ".triton" / "cache" / "kernel").mkdir(parents=True)  # filled before
    locked.append(machine / ".triton" / "cache")
    toolchain.gpu_refusal.cache_clear()
    assert toolchain.gpu_refusal() is None


def test_a_request_is_refused_and_auto_goes_on(
    machine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (machine / "bin" / "gcc").unlink()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = NSAConfig.preset("tiny")
    with pytest.raises(BackendUnavailable, match="compiled, which cannot run this: .* C compiler"):
        resolve(config, backend="compiled", **CUDA_PROBLEM)
    with caplog.at_level(logging.INFO, logger="nsa"):
        found = resolve(config, **CUDA_PROBLEM)
    assert found.backend != "compiled"
    assert "needs a C compiler on a GPU" in found.reason
    assert found.reason in caplog.text


_NO_COMPILER = """
import torch
import nsa
layer = nsa.NSAttention(64, nsa.NSAConfig.preset("tiny"), backend={backend!r}, device="cuda")
x = torch.randn(2, 100, 64, device="cuda", requires_grad=True)
try:
    layer(x).sum().backward()
except nsa.BackendUnavailable as error:
    print("refused:", error)
else:
    print("ran:", layer.resolution)
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "begins"), [("compiled", "refused: "), (None, "ran: "), ("sdpa", "ran: ")]
)
def test_a_gpu_machine_without_a_compiler(backend: str | None, begins: str, machine: Path) -> None:
    environment = {**os.environ, "PATH": str(machine / "nothing")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", _NO_COMPILER.format(backend=backend)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(begins)
    assert "Traceback" not in done.stderr
    if backend != "sdpa":
        assert "needs a C compiler" in done.stdout
