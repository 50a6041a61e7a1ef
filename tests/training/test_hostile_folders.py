"""Run folders of a stranger, a broken disk or a mistake: refused in one line, or resumed right.

``-m slow`` draws many more.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from nsa.tools.generate import __main__ as generate
from nsa.tools.train import __main__ as train
from nsa.training.files import sealed, temporary_of, to_json
from tests.support.training_runs import assert_same_run, flags, write_texts

SECRET = "SECRET\x1b[31m"
CHECKPOINT = "checkpoints/step-000002"
FILES = [
    "config.json",
    "metrics.jsonl",
    "lock",
    "checkpoints",
    "checkpoints/latest",
    CHECKPOINT,
    *(f"{CHECKPOINT}/{name}.json" for name in ("manifest", "state")),
    *(f"{CHECKPOINT}/{name}.safetensors" for name in ("model", "optimizer", "rng")),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 4 steps, never interrupted; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_texts(folder / "data")
    argv = flags(data=data, steps=4, save_every=2, eval_every=4)
    assert train.main([*argv, "--out", str(folder / "whole")]) == 0
    return folder / "whole"


@pytest.fixture
def run(finished, tmp_path):
    """The same after its second step, to be damaged; what lies outside of it must stay as it is."""
    folder = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    (folder / "checkpoints" / "latest").write_text("step-000002\n")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text(SECRET)
    (outside / "lines").write_text('{"step": 1}\n{"step": 9}\n')
    (outside / "step-000002").mkdir()
    return folder


# -- damages: each changes a run, as ``draw`` says ----------------------------------------------


def _clear(path: Path) -> Path:
    """Remove what is there, so that nothing is written through a link or waits for a pipe."""
    if not path.parent.is_dir() or path.parent.is_symlink():
        _clear(path.parent).mkdir()
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return path


def _content(path: Path) -> bytes:
    """Of a file that is one; b"" where another damage was there before."""
    small = path.is_file() and path.stat().st_size < 1 << 24
    return path.read_bytes() if small else b""


def another_kind(run: Path, draw: random.Random) -> None:
    path = _clear(run / draw.choice(FILES))
    outside = run.parent / "outside"
    names = ["secret", "lines", "step-000002", "."]
    targets = ["/dev/zero", "/dev/full", "/dev/stdin", "/nowhere", path]
    targets += [outside / name for name in names]
    kind = draw.choice(["pipe", "folder", "socket", "device", *["link"] * 5])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        before = os.getcwd()
        os.chdir(path.parent)  # the name of a socket must be short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
        os.chdir(before)
    else:
        path.symlink_to(draw.choice(targets))


def another_content(run: Path, draw: random.Random) -> None:
    path = run / draw.choice(FILES)
    before = _content(path)
    contents = [
        b"",
        b"[" * 100_000,
        b'{"step":' * 100_000,
        SECRET.encode() * draw.choice([1, 1000, 100_000]),
        b'{"step": 1, "x": "' + SECRET.encode(),
        bytes(draw.randrange(256) for _ in range(500)),
        before[: draw.randrange(len(before) + 1)],
        before + b"\0",
        before.replace(b"\n", b"\r\n"),
        before[::-1],
        b"\xef\xbb\xbf" + before,
        before.decode("latin-1").encode("utf-16"),
    ]
    _clear(path).write_bytes(draw.choice(contents))


def a_huge_file(run: Path, draw: random.Random) -> None:
    path = run / draw.choice(FILES)
    if path.exists() and not path.is_file():
        _clear(path)
    with open(path, "ab") as file:
        file.truncate(1 << draw.choice([22, 33, 42]))


def a_missing_file(run: Path, draw: random.Random) -> None:
    _clear(run / draw.choice(FILES))


def a_flipped_bit(run: Path, draw: random.Random) -> None:
    path = draw.choice([path for path in sorted(run.rglob("*")) if _content(path)])
    content = bytearray(_content(path))
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    _clear(path).write_bytes(content)


def another_latest(run: Path, draw: random.Random) -> None:
    names = ["../..", "/etc/passwd", "step-000009", "step-000002\0", SECRET, "step-" + SECRET,
             "step-000002/../../../outside/step-000002", "x" * 20_000_000, "step-000002 \n\n", "é",
             "step-" + "9" * 5000]  # fmt: skip
    _clear(run / "checkpoints" / "latest").write_text(draw.choice(names))


def strange_neighbours(run: Path, draw: random.Random) -> None:
    folder = draw.choice([run, run / "checkpoints"])
    names = [SECRET, f"step-{SECRET}", "step-000003", "step-000004", "step-999999", "step-0",
             "step-" + "9" * 200, temporary_of(Path("latest")).name, ".config.json.1.tmp",
             temporary_of(Path("config.json")).name, temporary_of(Path("step-000004")).name,
             "step-000004.aside1", ".step-000001.1.old.tmp"]  # fmt: skip
    for name in draw.sample(names, 4):
        path = _clear(folder / name)
        kind = draw.choice(["file", "folder", "link", "pipe", "loop"])
        if kind == "file":
            path.write_text(SECRET)
        elif kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(path if kind == "loop" else run.parent / "outside" / "secret")


ODD: list[object] = [
    None, True, -1, 0, 1, 1.5, 1e308, float("nan"), 2**63, 10**20, 10**400, "", SECRET,
    "x" * 50_000, [], {}, [1], [[[[[]]]]], {"a": {}}, [0] * 10_000, "cuda", "cpu", "step-000002",
]  # fmt: skip


def another_value(run: Path, draw: random.Random) -> None:
    """One value of a file of JSON, with checksums that fit."""
    names = [name for name in FILES if name.endswith(".json") and (run / name).is_file()]
    name = draw.choice(names)
    try:
        values = json.loads(_content(run / name))
        table = values
        while True:
            keys = list(table) if isinstance(table, dict) else range(len(table))
            key = draw.choice(keys)
            if not isinstance(table[key], dict | list) or not table[key] or draw.random() < 0.3:
                break
            table = table[key]
        table[key] = draw.choice(ODD)
        if name != FILES[7]:
            values = sealed({key: value for key, value in values.items() if key != "sha256"})
    except (ValueError, IndexError, TypeError, AttributeError):
        return  # damaged already
    _clear(run / name).write_bytes(to_json(values))
    _sign_anew(run)


def other_tensors(run: Path, draw: random.Random) -> None:
    """One tensor of another name, shape or type, or none of a file, with checksums that fit."""
    path = run / draw.choice(FILES[8:])
    try:
        tensors = load(_content(path))
        name = draw.choice(sorted(tensors))
    except (OSError, SafetensorError):  # damaged already
        return
    tensor = tensors.pop(name)
    others: list[Callable[[], torch.Tensor]] = [
        tensor.flatten()[:-1].clone,
        lambda: tensor.to(torch.float64),
        lambda: tensor.to(torch.complex64),
        lambda: tensor[None],
        lambda: torch.zeros(0),
    ]
    kind = draw.randrange(8)
    if kind < 5:
        tensors[name] = others[kind]()
    elif kind == 5:
        tensors[SECRET + "x" * 10_000] = tensor
    content = save(tensors)
    if kind == 6:
        content = content.replace(b"F32", b"F99").replace(b"U8", b"U9")
    elif kind == 7:
        content = draw.randrange(2**64).to_bytes(8, "little") + content[8:]
    _clear(path).write_bytes(content)
    _sign_anew(run)


def _sign_anew(run: Path) -> None:
    """Give the manifest the sizes and checksums of the files as they are now."""
    try:
        manifest = json.loads(_content(run / FILES[6]))
        for name, entry in manifest["files"].items():
            content = _content(run / CHECKPOINT / name)
            entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        del manifest["sha256"]
        _clear(run / FILES[6]).write_bytes(to_json(sealed(manifest)))
    except (ValueError, OSError, KeyError, TypeError, AttributeError):
        pass  # damaged already


SIGNED = [another_value, other_tensors]
DAMAGES = [another_kind, another_content, a_huge_file, a_missing_file, a_flipped_bit,
           another_latest, strange_neighbours, *SIGNED * 3]  # fmt: skip


# -- what must hold -----------------------------------------------------------------------------


class Hangs(Exception):
    """Nothing ended in time."""


def _give_up(number, frame):
    raise Hangs


@pytest.mark.parametrize(
    "seed", [*range(30), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(30, 1500))]
)
def test_a_hostile_folder(finished, run, capsys, seed):
    draw = random.Random(seed)
    done = [draw.choice(DAMAGES) for _ in range(draw.choice([1, 1, 2, 3]))]
    for damage in done:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            damage(run, draw)  # unless an earlier one left nothing to damage
    outside = {path: path.read_text() for path in run.parent.glob("outside/*") if path.is_file()}
    capsys.readouterr()
    previous = signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(60)
    try:
        for tool, argv in (
            (generate, [str(run), "--max-new-tokens", "1", "--device", "cpu"]),
            (train, ["--out", str(run), "--resume", "--device", "cpu"]),
        ):
            code = tool.main(argv)
            printed = capsys.readouterr()
            assert code in (0, 2), printed
            assert "\x1b" not in printed.out
            assert "SECRET" not in printed.out
            if code == 2:
                (line,) = printed.err.splitlines()
                assert line.startswith("error: ")
                assert line.isprintable()
                assert len(line) < 2100
            elif tool is generate:  # says what ran, and how fast
                assert all(line.isprintable() for line in printed.err.splitlines())
                assert "SECRET" not in printed.err
            else:
                assert printed.err == ""
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    if code == 0 and not set(done) & set(SIGNED):
        assert_same_run(run, finished, with_metrics=False)
    assert {path: path.read_text() for path in outside} == outside
