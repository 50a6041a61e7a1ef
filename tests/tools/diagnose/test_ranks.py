"""What ``diagnose`` says of several processes, and the sum that it asks them for."""

import json

import pytest
import torch
import torch.distributed as dist

from nsa.distributed.ranks import Ranks
from nsa.errors import UsageError
from nsa.tools.diagnose import __main__ as diagnose
from nsa.tools.diagnose import ranks
from tests.support.launching import error_of, run_tool


def test_what_this_machine_has(monkeypatch):
    found = ranks.collect_distributed()
    assert found.available == dist.is_available()
    assert found.gloo
    assert found.gpus == torch.cuda.device_count()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    lacking = {(0, 2), (2, 0)}
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *pair: pair not in lacking)
    assert ranks.collect_distributed().peers == "4 of 6 pairs (0 not 2, 2 not 0)"
    lacking.clear()
    assert ranks.collect_distributed().peers == "every GPU reaches every other"


def test_it_is_part_of_the_diagnosis(no_parity, capsys):
    assert diagnose.main(["--backend", "sdpa", "--device", "cpu"]) == 0
    table = capsys.readouterr().out.partition("Several processes")[2]
    for text in ("torch.distributed", "gloo (CPUs)", "NCCL (GPUs)", "peer access"):
        assert text in table
    assert diagnose.main(["--backend", "sdpa", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["distributed"]
    assert set(found) == {"available", "gloo", "nccl", "gpus", "peers"}


def test_a_sum_needs_several_processes():
    with pytest.raises(UsageError, match="expected several processes, got one; start it with"):
        ranks.all_reduce(Ranks(), "auto")


def test_the_sum_of_two_processes():
    told = run_tool(2, ["--all-reduce", "--json"], tool="diagnose")
    assert [rank.code for rank in told] == [0, 0]
    assert told[1].out == ""
    rows = json.loads(told[0].out)
    assert [(row["backend"], row["processes"], row["mib"]) for row in rows] == [
        ("gloo", 2, 1),
        ("gloo", 2, 16),
    ]
    assert all(row["right"] and row["gigabytes_per_second"] > 0 for row in rows)


def test_nothing_else_runs_on_several_processes():
    told = run_tool(2, [], tool="diagnose")
    assert error_of(told) == "expected --all-reduce with 2 processes, got no such flag"
    told = run_tool(2, ["--all-reduce", "--profile"], tool="diagnose")
    assert error_of(told) == "--all-reduce: expected no --profile, which it does not look at"
