"""How a process joins the others, and what it says when it cannot."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nsa.distributed.ranks import Ranks, launched
from nsa.errors import UsageError
from tests.support.training_runs import flags, write_texts

ROOT = Path(__file__).parents[2]
TORCHRUN = {
    "WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


def error_of_joining(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    for name, value in {**TORCHRUN, **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as caught, launched(print):
        pass
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("WORLD_SIZE", "two", "an integer >= 1"),
        ("WORLD_SIZE", "-1", "an integer >= 1"),
        ("RANK", "x", "0 … 1"),
        ("RANK", "2", "0 … 1"),
        ("LOCAL_RANK", "abc", "0 … 1"),
        ("LOCAL_RANK", "-1", "0 … 1"),
        ("LOCAL_WORLD_SIZE", "3", "1 … 2"),
    ],
)
def test_variables_that_are_no_numbers(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    """They are read before anything is waited for."""
    error = error_of_joining(monkeypatch, **{name: value})
    assert error == f"{name}: expected {expected}, which torchrun sets, got {value!r}"


@pytest.mark.parametrize("variables", [{"MASTER_ADDR": ""}, {"MASTER_PORT": "99999"}])
def test_an_address_that_is_none(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    error = error_of_joining(monkeypatch, **variables)
    assert error.startswith("expected the variables that torchrun sets, got: ")


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        error = error_of_joining(monkeypatch, MASTER_PORT=port)
    assert error.startswith(f"expected to meet the other processes at 127.0.0.1:{port}, got: ")
    assert "\n" not in error


def test_one_process_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with launched(print) as ranks:
        assert type(ranks) is Ranks


WITHOUT = """
import importlib.abc, sys

class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch.distributed":
            import torch
            for part in [name for name in vars(torch._C) if name in PARTS]:
                delattr(torch._C, part)

PARTS = ("_c10d_init", "_rpc_init", "_dist_autograd_init", "_faulty_agent_init")
sys.meta_path.insert(0, Without())
import os
import torch
assert not torch.distributed.is_available()
from nsa.tools.diagnose.ranks import collect_distributed
from nsa.tools.train.__main__ import main
assert not collect_distributed().available
assert main(sys.argv[1:]) == 0
os.environ["WORLD_SIZE"] = "2"
sys.exit(main(sys.argv[1:]))
"""
"""One process trains; several are refused."""


def test_a_torch_built_without_distributed(tmp_path: Path) -> None:
    argv = flags(data=write_texts(tmp_path / "data"), steps=1)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT, *argv, "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.stderr == (
        "error: expected a torch with torch.distributed to run on several processes, got one built "
        "without; start the command without torchrun\n"
    )
    assert done.returncode == 2
