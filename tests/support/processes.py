"""Process groups for tests: a function runs on every rank, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "nsa.backends.sdpa.steps",
    "nsa.distributed.context.parallel",
    "nsa.tools.train.__main__",
    "tests.support.layers",
]
"""Imported once, by the server that all ranks are forked from: a rank then starts in 0.1 s."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout: float = 120.0,
    device: str = "cpu",
) -> list[Any]:
    """Call ``function(*arguments)`` in ``world_size`` processes of one process group.

    Args:
        function: of a module, so that it can be pickled, as what it returns can be.
        arguments: the same for every rank; pickled.
        timeout: seconds for all of them together; collectives that wait so long fail, too.
        device: "cpu", by gloo, or "cuda", by NCCL with a GPU for each rank.

    Returns:
        what the function returned on each rank, in the order of ranks.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or the ranks that did not
            end. All ranks have ended then.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=_run_rank,
                args=(function, rank, world_size, folder, timeout, device, arguments),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, Path(folder), time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return [torch.load(_result(folder, rank), weights_only=False) for rank in range(world_size)]


def _wait(ranks: list[Any], folder: Path, deadline: float) -> None:
    running = dict(enumerate(ranks))
    while running:
        left = deadline - time.monotonic()
        assert left > 0, f"ranks that did not end: {sorted(running)}"
        multiprocessing.connection.wait([p.sentinel for p in running.values()], left)
        for rank, process in [*running.items()]:
            if process.exitcode is None:
                continue
            del running[rank]
            if process.exitcode != 0:
                failed = sorted(folder.glob("*.failed"), key=lambda path: path.stat().st_mtime_ns)
                told = failed[0].read_text() if failed else f"exit code {process.exitcode}"
                raise AssertionError(f"rank {failed[0].stem if failed else rank}:\n{told}")


def _result(folder: str, rank: int) -> str:
    return os.path.join(folder, f"{rank}.pt")


def _run_rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    timeout: float,
    device: str,
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.FileStore(os.path.join(folder, "store"), world_size)
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    try:
        torch.save(function(*arguments), _result(folder, rank))
    except BaseException:
        # renamed when it is whole: it may be read at once
        written = Path(folder, f"{rank}.writing")
        written.write_text(traceback.format_exc())
        written.rename(Path(folder, f"{rank}.failed"))
        raise
    finally:
        dist.destroy_process_group()
