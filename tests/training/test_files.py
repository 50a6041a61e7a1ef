"""Files of strangers, permissions, and what killed processes leave."""

import json
import os
import re
import socket
import stat
import time

import pytest

from nsa import DataError
from nsa.errors import show
from nsa.training.files import (
    parse_json,
    read_file,
    remove_leftovers,
    replace_atomically,
    sealed,
    temporary_of,
    unsealed,
)
from nsa.training.metrics import JsonlWriter


def _socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


ODD = {
    "a pipe": os.mkfifo,
    "a folder": lambda path: path.mkdir(),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a socket": _socket,
}


@pytest.mark.parametrize("kind", ODD)
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "x"
    ODD[kind](path)
    with pytest.raises(OSError, match=f"expected a regular file, got {kind}"):
        read_file(path, limit=10)


def test_the_size_is_looked_at_first(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    assert read_file(path, limit=10) == b"0123456789"
    os.truncate(path, 1 << 43)
    with pytest.raises(OSError, match=f"expected at most 10 bytes, got {1 << 43}"):
        read_file(path, limit=10)


def test_a_file_without_a_size_is_none_of_ours():
    with pytest.raises(OSError, match="expected a file at rest"):
        read_file("/proc/self/status", limit=1 << 20)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"[" * 200_000, "got one nested too deep"),
        (b'{"a":' * 200_000, "got one nested too deep"),
        (b"\xff\xfe\xfd", "expected JSON, got "),
        (b"[1]", "expected a JSON object"),
        (b'{"n": ' + b"9" * 5000 + b"}", "expected JSON, got Exceeds the limit"),
        (b"\x1b[31msecret", "expected JSON, got Expecting value"),
    ],
)
def test_what_is_no_json_object(data, text):
    with pytest.raises(ValueError, match=re.escape(text)) as error:
        parse_json(data)
    assert str(error.value).isprintable()
    assert "secret" not in str(error.value)


def test_a_seal_holds_its_values():
    values = {"step": 3, "share": 0.1, "names": ["é", None]}
    written = json.loads(json.dumps(sealed(values)))
    assert unsealed(written) == unsealed(values) == values
    with pytest.raises(ValueError, match="other values than its own SHA-256 says"):
        unsealed({**written, "step": 4})


def test_values_are_shown_short_and_printable():
    assert show("a\x1b[31m\u202e") == r"'a\x1b[31m\u202e'"
    assert show("x" * 10_000) == f"'{'x' * 199}…"
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    assert show(nested) == "list too long to print"
    while nested:  # or freeing it takes as deep a stack
        (nested,) = nested


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
def test_permissions_are_kept(tmp_path, mode, monkeypatch):
    path = tmp_path / "x"
    path.touch()
    path.chmod(mode)
    seen = []
    original = os.fsync
    monkeypatch.setattr(
        "os.fsync", lambda file: (seen.append(os.fstat(file).st_mode), original(file))
    )
    replace_atomically(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert not stat.S_IMODE(seen[0]) & ~mode  # never wider, not even before it has its name


def test_links_are_replaced_and_never_written_through(tmp_path):
    """A temporary name that is foreseen, the file itself, and metrics."""
    other = tmp_path / "other"
    other.write_text('{"step": 1}\n{"step": 5}\n')
    other.chmod(0o600)
    before = other.read_bytes()
    for name in ("x", "metrics.jsonl"):
        path = tmp_path / name
        path.symlink_to(other)
        temporary_of(path).symlink_to(other)
    replace_atomically(tmp_path / "x", b"new")
    with JsonlWriter(tmp_path / "metrics.jsonl", step=5, say=pytest.fail) as file:
        file.write(step=6)
    assert other.read_bytes() == before
    assert (tmp_path / "x").read_bytes() == b"new"
    assert (tmp_path / "metrics.jsonl").read_bytes() == before + b'{"step": 6}\n'
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "other", "x"]


def test_leftovers_of_processes_that_are_gone(tmp_path, gone):
    host = temporary_of(tmp_path / "x").name.split(".")[2]
    removed = [
        f".x.{gone}.tmp", f".x.{host}.{gone}.tmp", f".y.{host}.{gone}.old.tmp",
        f".x.{host}.{os.getpid()}.tmp", ".x.h00000000.1.tmp", f".x.{host}.{'9' * 30}.tmp",
    ]  # fmt: skip
    kept = [
        f".x.{host}.{os.getppid()}.tmp",  # runs
        f".x.h11111111.{gone}.tmp",  # runs, perhaps, on another machine
        f".z.{host}.{gone}.tmp", f"x.{host}.{gone}.tmp", ".x.tmp", f".x.y.{gone}.tmp", "x",
    ]  # fmt: skip
    for name in removed + kept:
        (tmp_path / name).touch()
    (tmp_path / removed[2]).unlink()
    (tmp_path / removed[2]).mkdir()
    (tmp_path / removed[2] / "file").touch()
    (tmp_path / removed[3]).unlink()
    (tmp_path / removed[3]).symlink_to(tmp_path / "x")
    week_ago = time.time() - 7 * 24 * 3600
    os.utime(tmp_path / ".x.h00000000.1.tmp", (week_ago, week_ago))
    remove_leftovers(tmp_path, "x|y")
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
    remove_leftovers(tmp_path / "not there", "x")


def test_metrics_that_vanish_are_spoken_of(tmp_path):
    path, notes = tmp_path / "metrics.jsonl", []
    with JsonlWriter(path, step=4, say=notes.append) as file:
        file.write(step=5)
        path.unlink()
        file.write(step=6)
        file.write(step=7)
    assert notes == [
        f"note: {path} is missing; the new one begins after step 4",
        f"note: {path} was removed while training; its earlier lines are gone",
    ]
    assert path.read_text() == '{"step": 6}\n{"step": 7}\n'


@pytest.mark.parametrize("kind", ODD)
def test_metrics_of_another_kind(tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    ODD[kind](path)
    with pytest.raises(DataError, match=f"expected a regular file, got {kind}"):
        JsonlWriter(path, step=0, say=pytest.fail)


def test_deep_metrics_are_dropped(tmp_path):
    path, notes = tmp_path / "metrics.jsonl", []
    path.write_bytes(b"[" * 100_000 + b'\n{"step": 1}\n')
    JsonlWriter(path, step=1, say=notes.append)._file.close()
    assert path.read_bytes() == b'{"step": 1}\n'
    assert notes == [f"note: {path}: dropped damaged lines: 1"]
