"""The harness of the other tests here: what ranks return, and what is said of one that fails."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.support.processes import run_ranks


def summed(factor: int) -> tuple[int, list[float]]:
    x = torch.full((2,), float(factor * dist.get_rank()))
    dist.all_reduce(x)
    return dist.get_rank(), x.tolist()


def fails_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 does not want to")
    dist.barrier()


def sleeps() -> None:
    time.sleep(60)


def test_every_rank_returns_what_it_computed():
    assert run_ranks(summed, 3, 2) == [(rank, [6.0, 6.0]) for rank in range(3)]


def test_a_rank_that_fails_is_named_and_ends_the_others():
    with pytest.raises(AssertionError, match=r"rank 1:\n(.|\n)*rank 1 does not want to"):
        run_ranks(fails_on_one, 2)


def test_ranks_that_hang_are_ended():
    with pytest.raises(AssertionError, match="did not end: \\[0, 1\\]"):
        run_ranks(sleeps, 2, timeout=2.0)
