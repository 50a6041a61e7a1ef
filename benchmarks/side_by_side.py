"""Runs jobs in a few processes on one GPU: Triton compiles one kernel at a time in each.

What they compiled is in Triton's cache on disk, for the timings that follow in one process.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Job = TypeVar("Job")


def side_by_side(work: Callable[[Job], str], jobs: Iterable[Job], workers: int = 8) -> None:
    """Prints ``work(job)`` of every job in order; an empty string prints nothing.

    A process that dies, of a compiler's assertion or a GPU error say, ends the rest of the jobs
    but not the caller.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            for line in pool.map(work, jobs):
                if line:
                    print(line, flush=True)
        except BrokenProcessPool as error:
            print(f"a worker died: {error}", flush=True)
