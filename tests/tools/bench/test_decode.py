"""``bench --decode``: a row for each shape, its figures, and what it refuses."""

import json
from pathlib import Path

import pytest

from nsa.backends.sdpa import decode
from nsa.tools.bench.__main__ import main


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    command = ["--decode", "3", "--lengths", "64,200", "--batch", "2", "--runs", "1"]
    assert main([*command, "--backends", "sdpa", "--jsonl", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][1:]
    assert [(row["batch"], row["length"], row["step"]) for row in rows] == [(2, 64, 3), (2, 200, 3)]
    for row in rows:
        assert row["seconds"] > 0
        assert row["parity"] <= 1
        assert row["dense_seconds"] is None  # a mask would be needed
    assert "One step of decode" in capsys.readouterr().out


def test_bytes_and_dense(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    command = ["--decode", "--lengths", "640", "--runs", "1", "--preset", "tiny"]
    assert main([*command, "--jsonl", str(file)]) == 0
    (row,) = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][1:]
    from nsa import NSAConfig

    c = NSAConfig.preset("tiny")
    tokens = c.num_compressed(640) + c.num_selected * c.select_block + c.window
    assert row["bytes"] == 4 * tokens * c.num_kv_heads * (c.head_dim + c.dv)
    assert row["dense_seconds"] > 0


def test_what_disagrees_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    window = decode._window
    monkeypatch.setattr(decode, "_window", lambda *args: window(*args) * 1.1)
    assert main(["--decode", "--lengths", "64", "--backends", "sdpa", "--runs", "1"]) == 1
    assert "parity failed" in capsys.readouterr().out


def test_a_backend_without_a_decode(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--decode", "--lengths", "64", "--backends", "reference", "--runs", "1"]) == 1
    assert "reference has none; sdpa decodes anywhere" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--decode", "9"], "--decode: expected an int from 1 to 8, got 9"),
        (["--decode", "0"], "--decode: expected an int from 1 to 8, got 0"),
        (["--decode", "--packed", "2"], "--decode: expected no --packed"),
        (["--decode", "--branches", "all"], "--decode: expected no --branches"),
        (["--decode", "--find-fa2-min-len"], "--decode: expected no --find-fa2-min-len"),
    ],
)
def test_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert message in capsys.readouterr().err
