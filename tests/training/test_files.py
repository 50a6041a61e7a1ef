"""Files of strangers, permissions, and what killed processes leave."""

import errno
import json
import os
import re
import shutil
import socket
import stat
import time

import pytest

from nsa import DataError
from nsa.errors import show
from nsa.training.files import (
    open_regular,
    parse_json,
    read_file,
    remove_leftovers,
    replace_atomically,
    sealed,
    temporary_of,
    to_json,
    unsealed,
    write_durably,
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
    with pytest.raises(OSError, match=f"expected a regular file, got {kind}") as error:
        read_file(path, limit=10)
    assert (error.value.errno, error.value.filename) == (errno.EINVAL, str(path))


def test_a_kind_without_a_name(tmp_path, monkeypatch):
    nothing = os.stat_result((0,) * 10)
    monkeypatch.setattr("os.stat", lambda *args, **options: nothing)
    with pytest.raises(OSError, match="expected a regular file, got something else"):
        open_regular(tmp_path / "x")


def test_the_size_is_looked_at_first(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    assert read_file(path, limit=10) == b"0123456789"
    os.truncate(path, 1 << 43)
    with pytest.raises(OSError, match=f"expected at most 10 bytes, got {1 << 43}") as error:
        read_file(path, limit=10)
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(path))


def test_a_file_that_changes_its_kind_while_it_is_opened(tmp_path, monkeypatch):
    """It is opened without waiting, looked at again, and closed."""
    path, opened, original = tmp_path / "x", [], os.open
    os.mkfifo(path)

    def note(name, flags, *rest):
        opened.append((original(name, flags | os.O_NONBLOCK, *rest), flags))
        return opened[-1][0]

    regular = os.stat(__file__)
    with monkeypatch.context() as patch:
        patch.setattr("os.stat", lambda *args, **options: regular)
        patch.setattr("os.open", note)
        with pytest.raises(OSError, match="expected a regular file, got a pipe"):
            open_regular(path)
    ((descriptor, flags),) = opened
    assert flags & os.O_NONBLOCK
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_errors_name_their_file_and_leave_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(FileExistsError) as error:
        write_durably(path, b"new")
    assert error.value.filename == str(path)

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="No space left") as error:
        write_durably(tmp_path / "y", b"new")
    assert error.value.filename == str(tmp_path / "y")
    (tmp_path / "y").unlink()
    with pytest.raises(OSError, match="No space left"):
        replace_atomically(path, b"new")
    assert os.listdir(tmp_path) == ["x"]
    assert path.read_text() == "old"


def test_permissions_of_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        replace_atomically(tmp_path / "x", b"new")
        write_durably(tmp_path / "y", b"new", mode=0o604)
        (tmp_path / "link").symlink_to("x")
        replace_atomically(tmp_path / "link", b"new")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).lstat().st_mode) for name in ("x", "y", "link")]
    assert modes == [0o640, 0o600, 0o640]
    before = os.umask(0)
    try:
        write_durably(tmp_path / "z", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "z").stat().st_mode) == 0o666


def test_odd_permissions_are_dropped(tmp_path):
    path = tmp_path / "x"
    path.touch()
    path.chmod(0o4755)
    replace_atomically(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_what_is_renamed_is_on_the_disk(tmp_path, monkeypatch):
    seen, original = [], os.fsync

    def note(descriptor):
        seen.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        original(descriptor)

    monkeypatch.setattr("os.fsync", note)
    before = len(os.listdir("/proc/self/fd"))
    replace_atomically(tmp_path / "x", b"new")
    assert seen == [str(temporary_of(tmp_path / "x")), str(tmp_path)]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_without_a_size_is_none_of_ours():
    with pytest.raises(OSError, match="expected a file at rest, got one that grows") as error:
        read_file(path := "/proc/self/status", limit=1 << 20)
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, path)


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


def test_json_that_people_may_read():
    assert to_json({"a": [1], "b": "é"}) == b'{\n "a": [\n  1\n ],\n "b": "\\u00e9"\n}\n'


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


def test_leftovers_that_are_links_or_cannot_be_removed(tmp_path, gone, monkeypatch):
    """Links are removed, not what they lead to; what stays stops nothing."""
    target, original = tmp_path / "target", shutil.rmtree
    (target / "inside").mkdir(parents=True)
    for number, to in enumerate((target, tmp_path / "nowhere")):
        (tmp_path / f".x{number}.{gone}.tmp").symlink_to(to)
    for number in range(2, 5):
        (tmp_path / f".x{number}.{gone}.tmp").mkdir()

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError
        if not path.endswith(f".x3.{gone}.tmp"):
            original(path, ignore_errors)

    monkeypatch.setattr("shutil.rmtree", refuse)
    remove_leftovers(tmp_path, "x.")
    assert sorted(os.listdir(tmp_path)) == [f".x3.{gone}.tmp", "target"]
    assert os.listdir(target) == ["inside"]


def test_leftovers_of_another_user(tmp_path, gone, monkeypatch):
    """Whose processes may not be signalled, and so are there."""
    name = temporary_of(tmp_path / "x").name.replace(str(os.getpid()), str(gone))
    (tmp_path / name).touch()

    def refuse(process, number):
        assert (process, number) == (gone, 0)
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr("os.kill", refuse)
        remove_leftovers(tmp_path, "x")
    assert os.listdir(tmp_path) == [name]
    remove_leftovers(tmp_path, "x")
    assert os.listdir(tmp_path) == []


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
