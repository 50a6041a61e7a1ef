"""`python -m nsa.tools.bench --tune`: what is tried, what is chosen, what is printed."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from nsa import BackendUnavailable
from nsa.backends.compiled.select import tiles as select
from nsa.backends.compiled.selected import tiles as selected
from nsa.backends.compiled.tiling import SM_90, UNTUNED
from nsa.backends.compiled.window import tiles as window
from nsa.tools.bench.flags import make_plan
from nsa.tools.bench.tune.candidates import (
    select_candidates,
    selected_candidates,
    window_candidates,
)
from nsa.tools.bench.tune.search import (
    MARGIN,
    Bench,
    Candidate,
    Found,
    Launch,
    choose_group,
    fault,
    search,
)
from tests.support.benching import problem, run

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, whose launches it calls"
)
GPUS = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
ADA = (8, 9)
SHAPES = [(64, 64, 6), (128, 128, 16), (192, 128, 16), (256, 256, 8), (80, 80, 1)]
RIGHT = torch.arange(1.0, 13.0).reshape(3, 4)


# What is tried


def all_candidates(D: int, V: int, G: int, gpu: tuple[int, int]) -> Iterator[list[Candidate]]:
    bf16 = torch.bfloat16
    for part in ("fwd", "bwd_dq", "bwd_dkv"):
        yield [*window_candidates(part, bf16, D, V, gpu)]
    fit = partial(select.select_tiles, bf16, G, D, 16, 128, capability=gpu)
    yield [*select_candidates(select.tile_row(bf16, D, G, gpu), fit)]
    sizes = {"width": 16, "select_block": 64, "dtype": bf16, "length": 8192, "capability": gpu}
    row = selected.tile_row(D, V, G, bf16, gpu)
    for part in ("forward", "dq", "dkv"):
        fit = partial(selected.tiles_for, D, V, G, **sizes)
        yield [*selected_candidates(part, row, fit)]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("D", "V", "G"), SHAPES)
def test_candidates(D: int, V: int, G: int, gpu: tuple[int, int]) -> None:
    """Today's come first, none is tried twice, and each is what its entry makes."""
    bf16 = torch.bfloat16
    today = window.tiles_for(bf16, D, V, gpu)
    parts = [*all_candidates(D, V, G, gpu)]
    for candidates in parts:
        assert len(candidates) > 1
        assert len({(x.tiles, x.group) for x in candidates}) == len(candidates)
    for part, candidates in zip(("fwd", "bwd_dq", "bwd_dkv"), parts, strict=False):
        assert candidates[0].tiles == getattr(today, part)
        for x in candidates:
            row = window.fitted(replace(today, **x.entry), bf16, D, V, gpu)
            assert getattr(row, part) == x.tiles
    sizes = {"width": 16, "select_block": 64, "dtype": bf16, "length": 8192, "capability": gpu}
    row = selected.tile_row(D, V, G, bf16, gpu)
    for part, candidates in zip(("forward", "dq", "dkv"), parts[4:], strict=True):
        assert candidates[0].tiles == getattr(selected.tiles_for(D, V, G, **sizes), part)
        for x in candidates:
            made = selected.tiles_for(D, V, G, **sizes, row=replace(row, **x.entry))
            assert getattr(made, part) == x.tiles
            assert x.group == x.entry["rows"]


# What is chosen


class Machine:
    """Tiles are numbers: a call takes so many seconds, and what it computes can be set."""

    def __init__(
        self, wrong: dict[int, Tensor] | None = None, broken: tuple[int, ...] = ()
    ) -> None:
        self.wrong, self.broken = wrong or {}, broken
        self.built: list[int] = []
        self.now = 0.0

    def launch(self, *tiles: int, groups: tuple[Any, ...] = (), counts: bool = True) -> Launch:
        groups = groups or (None,) * len(tiles)
        return Launch(
            name="a launch",
            call=self.call,
            rehearse=self.built.append,
            candidates=tuple(
                Candidate(x, {"tiles": x}, group) for x, group in zip(tiles, groups, strict=True)
            ),
            counts=counts,
        )

    def call(self, tiles: int) -> tuple[Tensor, ...]:
        self.now += tiles
        return (self.wrong.get(tiles, RIGHT),)

    def bench(self) -> Bench:
        def build(jobs: Any) -> Iterator[str]:
            for (_, tiles), rehearse in jobs:
                rehearse()
                yield "does not fit" if tiles in self.broken else ""

        def seconds(call: Callable[[], object], times: int) -> float:
            before = self.now
            call()
            return self.now - before

        return Bench(build, seconds)

    def search(self, *launches: Launch) -> tuple[list[Found], int]:
        found, steps = [Found(launch) for launch in launches], []
        search(found, self.bench(), steps.append)
        return found, len(steps)


def test_the_fastest_is_chosen() -> None:
    machine = Machine()
    (found,), steps = machine.search(machine.launch(50, 40, 30, 60))
    assert found.best(None).candidate.entry == {"tiles": 30}
    assert machine.built == [50, 40, 30, 60]
    assert steps == 8


def test_todays_tiles_stay_where_nothing_is_much_faster() -> None:
    today = 1000
    for other, chosen in ((today * (1 - MARGIN) + 1, today), (today * (1 - MARGIN) - 1, None)):
        machine = Machine()
        (found,), _ = machine.search(machine.launch(today, other))
        assert found.best(None).candidate.tiles == (chosen or other)


def test_what_does_not_build_or_computes_something_else_is_not_chosen() -> None:
    wrong = {1: RIGHT * 1.5, 2: RIGHT.clone().index_fill_(0, torch.tensor([1]), math.nan)}
    machine = Machine(wrong, broken=(3,))
    (found,), steps = machine.search(machine.launch(50, 1, 2, 3, 40))
    assert found.best(None).candidate.tiles == 40
    notes = {x.candidate.tiles: x.note for x in found.trials if x.note}
    assert notes[1] == "computes something else: result 0 is off by 2.9e-01"
    assert "not finite" in notes[2]
    assert notes[3] == "does not fit"
    assert steps == 10


def test_a_candidate_that_fails_when_it_runs() -> None:
    machine = Machine()
    launch = machine.launch(50, 1, 40)

    def call(tiles: int) -> tuple[Tensor, ...]:
        if tiles == 1:
            raise RuntimeError("misaligned\naddress")
        return machine.call(tiles)

    (found,), _ = machine.search(replace(launch, call=call))
    assert found.trials[1].note == "RuntimeError: misaligned address"
    assert found.best(None).candidate.tiles == 40


def test_launches_of_a_table_agree_in_a_group() -> None:
    """Rows of 64 are faster together, though the first launch alone would take 32."""
    machine = Machine()
    first = machine.launch(100, 90, groups=(64, 32))
    second = machine.launch(100, 40, 120, groups=(64, 64, 32))
    found, _ = machine.search(first, second)
    assert choose_group(found) == 64
    assert [one.best(64).candidate.tiles for one in found] == [100, 40]
    unused = replace(second, counts=False)
    found, _ = machine.search(first, unused)
    assert choose_group(found) == 32


def test_a_group_that_a_launch_cannot_run_is_not_chosen() -> None:
    machine = Machine(broken=(7,))
    found, _ = machine.search(
        machine.launch(100, 9, groups=(64, 32)), machine.launch(100, 7, groups=(64, 32))
    )
    assert choose_group(found) == 64


def test_todays_tiles_that_do_not_build() -> None:
    machine = Machine(broken=(50,))
    match = r"expected today's tiles to build, got does not fit \(a launch, 50\)"
    with pytest.raises(BackendUnavailable, match=match):
        machine.search(machine.launch(50, 40))


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ("row", "result 0 is off by"),
        ("rounded", ""),
        ("lse", "result 1 is not finite"),
        ("lists", "50.0% of the lists differ"),
        ("a list", ""),
    ],
)
def test_what_counts_as_something_else(changed: str, text: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 400, 4, 64, generator=generator).bfloat16()
    lse = torch.randn(1, 400, 4, generator=generator)
    lse[:, :31] = -math.inf
    lists = torch.zeros(1, 400, 2, 4, dtype=torch.int32)
    y, other_lse, other_lists = x.clone(), lse.clone(), lists.clone()
    if changed == "row":
        y[0, 399, 3] = y[0, 398, 3]
    elif changed == "rounded":
        y = (x.double() * (1 + 2**-9)).bfloat16()
        other_lse = lse * (1 + 1e-6)
    elif changed == "lse":
        other_lse[0, 31, 0] = -math.inf
    elif changed == "lists":
        other_lists[0, :200, :, 1] = 5
    else:
        other_lists[0, 7, 0, 1] = 5
    found = fault((y, other_lse, other_lists), (x, lse, lists))
    assert text in found
    assert bool(text) == bool(found)


# What is printed


@dataclass(frozen=True)
class FakeTable:
    file: str
    into: str
    row: Any
    launches: tuple[Launch, ...] = ()


def measured_found(part: str, today: Any, best: Any, entry: Any) -> Found:
    machine = Machine()
    launch = machine.launch(50, 40)
    candidates = (Candidate(today, {}), Candidate(best, entry))
    found = Found(replace(launch, name=part, candidates=candidates), complete=True)
    (timed,), _ = machine.search(launch)
    for trial, candidate in zip(timed.trials, candidates, strict=True):
        found.trials.append(replace(trial, candidate=candidate))
    return found


@needs_triton
def test_rows_can_be_put_into_the_tables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is found on its GPU afterwards, as measured, and an H100 keeps its own."""
    from nsa.tools.bench.tune.report import print_found

    bf16, tiles = torch.bfloat16, window.Tiles(64, 32, 4, 2)
    rows = (
        window.tile_row(bf16, 128, 128, ADA),
        select.tile_row(bf16, 128, 16, ADA),
        selected.tile_row(128, 128, 16, bf16, ADA),
    )
    before = window.tile_row(bf16, 128, 128), select.tile_row(bf16, 128, 16)
    small = select.SelectTiles(64, 32, 4, 2)
    query = selected.QueryTiles(tokens=2, block_n=32, num_warps=4, num_stages=4)
    done = [
        (
            FakeTable("window/tiles.py", "TILES", rows[0]),
            [measured_found("forward", rows[0].fwd, tiles, {"fwd": tiles})],
        ),
        (
            FakeTable("select/tiles.py", "ROWS", rows[1]),
            [measured_found("selection", rows[1].tiles, small, {"tiles": small})],
        ),
        (
            FakeTable("selected/tiles.py", "ROWS", rows[2]),
            [measured_found("forward", query, query, {"forward": (32, 4), "rows": 32})],
        ),
    ]
    key = (ADA, 128, 128)
    print_found(done, "a title", "A Card, bf16", key, Console(width=100))  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert all(text in out for text in ("a title", "+25%", "40,000"))
    for of, _ in done:
        assert f"a row for {of.into} of nsa/backends/compiled/{of.file}:" in out
    lines = [line for line in out.splitlines() if line.endswith("),")]
    scope = {**vars(window), **vars(selected), **vars(select)}
    entry = eval(f"{{{lines[0]}}}", scope)
    monkeypatch.setattr(window, "TILES", window.TILES | entry)
    for module, line in ((select, lines[1]), (selected, lines[2])):
        [row] = eval(f"[{line}]", dict(vars(module)))
        monkeypatch.setattr(module, "ROWS", (*module.ROWS, row))
    found = window.tile_row(bf16, 128, 128, ADA)
    assert (found.fwd, found.bwd_dq, found.measured) == (tiles, rows[0].bwd_dq, "A Card, bf16")
    assert select.tile_row(bf16, 128, 16, ADA).tiles == small
    row = selected.tile_row(128, 128, 16, bf16, ADA)
    assert (row.rows, row.forward, row.dq, row.measured) == (32, (32, 4), (64, 2), "A Card, bf16")
    assert before == (window.tile_row(bf16, 128, 128), select.tile_row(bf16, 128, 16))
    assert selected.tile_row(128, 128, 16, bf16) is selected.LARGE_HEADS
    assert select.tile_row(bf16, 128, 16, (8, 0)).measured == UNTUNED
    other = selected.tile_row(128, 128, 8, bf16, ADA)  # of another group
    assert (other.rows, other.G, other.measured) == (32, 8, UNTUNED)
    assert selected.tile_row(128, 128, 8, bf16).rows == 64


@pytest.fixture
def a_card(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A run in which there is one table of two launches, and everything takes no time."""
    from nsa.tools.bench.parity import Parity
    from nsa.tools.bench.tune import run as tune_run

    machine, row = Machine(), select.Row(64, 6, False, select.SMALL_GROUP.tiles, UNTUNED, ADA)
    launches = tuple(replace(machine.launch(50, 40), name=name) for name in ("first", "second"))
    tiles = row.tiles, replace(row.tiles, rows=32)
    launches = tuple(
        replace(
            x,
            call=lambda t: machine.call(40 if t.rows == 32 else 50),
            rehearse=lambda t: None,
            candidates=tuple(Candidate(t, {"tiles": t}) for t in tiles),
        )
        for x in launches
    )
    table = FakeTable("select/tiles.py", "ROWS", row, launches)
    bench = machine.bench()
    monkeypatch.setattr(tune_run, "make_data", lambda trial: None)
    monkeypatch.setattr(tune_run, "tables", lambda data: (table,))
    monkeypatch.setattr(tune_run, "backend_parity", lambda name, trial: Parity(0.1))
    monkeypatch.setattr(tune_run, "Bench", lambda *parts: bench)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
    monkeypatch.setattr(tune_run, "capability_of", lambda device: ADA)
    return machine


def tuned(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    from nsa.tools.bench.tune.run import tune

    trial = problem(dtype=torch.bfloat16)
    try:
        code = tune([trial], lambda call, runs: [], Console(width=100), seconds=0.1, runs=1)
    except KeyboardInterrupt:
        code = 130
    return code, capsys.readouterr().out


@needs_triton
def test_a_run(a_card: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = tuned(capsys)
    assert code == 0
    for text in ("A Card (sm_89)", "tiles untuned", "first", "second", "rows 32", "+25%"):
        assert text in out
    assert 'measured="A Card, bf16, G 2"' in out.replace("'", '"')
    assert "capability=(8, 9)" in out
    assert "not all was tried" not in out


@needs_triton
def test_ctrl_c_prints_what_was_found(
    a_card: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = a_card.call

    def call(tiles: int) -> tuple[Tensor, ...]:
        calls.append(tiles)
        if len(calls) > 6:  # in the second launch
            raise KeyboardInterrupt
        return real(tiles)

    monkeypatch.setattr(a_card, "call", call)
    code, out = tuned(capsys)
    assert code == 130
    assert all(text in out for text in ("+25%", "not all was tried", "capability=(8, 9)"))


@needs_triton
def test_ctrl_c_at_once_prints_no_row(
    a_card: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(tiles: int) -> tuple[Tensor, ...]:
        raise KeyboardInterrupt

    monkeypatch.setattr(a_card, "call", call)
    code, out = tuned(capsys)
    assert code == 130
    assert "not tried" in out
    assert "Row(" not in out


@needs_triton
def test_kernels_are_built_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anew for every problem; what fails is a note, a machine that cannot build is not."""
    from nsa.tools.bench.tune import run as tune_run

    keys = set()

    def build_once(key: Any, device: torch.device, rehearse: Callable[[], object]) -> None:
        keys.add(key)
        rehearse()

    def unbuildable() -> None:
        raise BackendUnavailable("no C compiler")

    monkeypatch.setattr(tune_run, "build_once", build_once)
    jobs = [(("a", 1), list), (("a", 2), lambda: 1 / 0 * [])]
    with pytest.raises(ZeroDivisionError):
        [*tune_run.build_side_by_side(problem(), jobs)]
    jobs[1] = (("a", 2), lambda: {}["a"])
    notes = [*tune_run.build_side_by_side(problem(), jobs)]
    assert notes == ["", "KeyError: 'a'"]
    assert len(keys) == 2
    [*tune_run.build_side_by_side(problem(length=65), jobs[:1])]
    assert len(keys) == 3
    with pytest.raises(BackendUnavailable, match="no C compiler"):
        [*tune_run.build_side_by_side(problem(), [(("a", 3), unbuildable)])]


# The command line


def test_without_a_gpu_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--tune", "--dtypes", "bf16")
    assert (code, out) == (2, "")
    assert err == (
        "error: --tune: expected a CUDA GPU, the one that the tiles are for, got cpu: run it on a "
        "machine that has that GPU, with a PyTorch built for CUDA\n"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--backends", "sdpa"), "--tune: expected no --backends"),
        (("--packed", "2"), "--tune: expected no --packed"),
        (("--jsonl", "x"), "--tune: expected no --jsonl"),
        (("--decode",), "--tune: expected no --decode"),
        (("--find-fa2-min-len",), "--tune: expected no --find-fa2-min-len"),
        (("--dtypes", "bf16,fp32"), "expected bf16 or fp16 in --dtypes, got float32"),
    ],
)
def test_what_it_cannot_go_with(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "--tune", *argv)
    assert code == 2
    assert message in err


def test_its_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa.tools.bench.flags.choose_device", lambda name: torch.device("cuda"))
    plan = make_plan(["--tune", "--heads", "64/4:128,32/8:128"])
    assert plan.tune
    assert [trial.length for trial in plan.trials] == [8192, 8192]
    assert {trial.dtype for trial in plan.trials} == {torch.bfloat16}
    assert not make_plan([]).tune


def test_rows_that_stand_are_an_h100s() -> None:
    assert {row.capability for row in (*select.ROWS, *selected.ROWS)} == {SM_90}
