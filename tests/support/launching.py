"""A tool on several processes, as ``torchrun`` starts them, but forked in 0.1 s each.

What differs from ``torchrun``: nobody ends the others when one has failed.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tests.support.processes import PRELOADED

TIMEOUT_S = 120.0


class Told(NamedTuple):
    """What one process printed, and how it ended."""

    code: int
    out: str
    errors: list[str]


class Launch:
    """Processes that run a tool of ``nsa.tools``."""

    def __init__(self, folder: Path, tool: str, commands: list[list[str]]) -> None:
        self._folder = folder
        self._store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.ranks = []
        for rank, argv in enumerate(commands):
            variables = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": len(commands),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": self._store.port,
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
            }
            texts = {name: str(value) for name, value in variables.items()}
            arguments = (str(folder), texts, tool, argv)
            self.ranks.append(context.Process(target=_run, args=arguments, daemon=True))
        for process in self.ranks:
            process.start()

    def wait(self) -> list[Told]:
        """Wait for all of them."""
        told = []
        for rank, process in enumerate(self.ranks):
            process.join(TIMEOUT_S)
            assert process.exitcode is not None, f"rank {rank} did not end"
            out, errors = (
                (self._folder / f"{rank}.{name}").read_text() for name in ("out", "errors")
            )
            told.append(Told(process.exitcode, out, errors.splitlines()))
        return told


@contextlib.contextmanager
def launch(*commands: list[str], tool: str = "train") -> Iterator[Launch]:
    """Start a process for each command line of a tool; what still runs at the end is killed."""
    with tempfile.TemporaryDirectory() as folder:
        launched = Launch(Path(folder), tool, list(commands))
        try:
            yield launched
        finally:
            for process in launched.ranks:
                process.kill()
                process.join()


def run_tool(size: int, argv: list[Any], tool: str = "train") -> list[Told]:
    """Run a command line of a tool on so many processes."""
    with launch(*[[str(part) for part in argv]] * size, tool=tool) as launched:
        return launched.wait()


def error_of(told: list[Told]) -> str:
    """The one line that all processes together said when they failed."""
    assert all(rank.code == 2 for rank in told), told
    (line,) = [line for rank in told for line in rank.errors]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def _run(folder: str, variables: dict[str, str], tool: str, argv: list[str]) -> None:
    main = importlib.import_module(f"nsa.tools.{tool}.__main__").main
    torch.set_num_threads(1)
    os.environ.update(variables)
    for number, name in ((1, "out"), (2, "errors")):
        path = Path(folder, f"{variables['RANK']}.{name}")
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.exit(main(argv))
