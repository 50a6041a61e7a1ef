"""Output that is lost: closed, full or without a reader, for every tool alike."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nsa.tools.bench import __main__ as bench
from nsa.tools.common.cli import run
from nsa.tools.common.streams import Output, OutputLost
from nsa.tools.diagnose import __main__ as diagnose
from nsa.tools.generate import __main__ as generate
from nsa.tools.train import __main__ as train
from nsa.tools.train.display import Display

TOOLS = (bench, diagnose, generate, train)
LONG = "x" * 100_000
"""More than any buffer."""


@pytest.fixture
def stdout(monkeypatch):
    """Makes another stdout, of a kind."""

    def make(kind):
        if kind == "closed":
            return monkeypatch.setattr(sys, "stdout", None)
        if kind == "full":
            descriptor = os.open("/dev/full", os.O_WRONLY)
        else:
            reader, descriptor = os.pipe()
            os.close(reader)
        stream = open(descriptor, "w")  # noqa: SIM115 - closed below
        opened.append(stream)
        return monkeypatch.setattr(sys, "stdout", stream)

    opened = []
    yield make
    monkeypatch.undo()
    for stream in opened:
        stream.close()


ENDS = {
    "full": (2, "error: stdout: No space left on device\n"),
    "no reader": (141, ""),
    "closed": (
        2,
        "error: stdout: expected an open stream, got a closed one; send what nobody should see to "
        "/dev/null\n",
    ),
}


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__.split(".")[2])
@pytest.mark.parametrize("kind", ENDS)
def test_every_tool(capsys, stdout, kind, tool):
    stdout(kind)
    assert (tool.main(["--help"]), capsys.readouterr().err) == ENDS[kind]


def print_flushed(argv):
    print("x", flush=True)
    return 0


def print_on_the_way_out(argv):
    try:
        print(LONG)
    finally:
        print(LONG, flush=True)
    return 0


def print_elsewhere(argv):
    thread = threading.Thread(target=print, args=(LONG,))
    thread.start()
    thread.join()
    return 0


@pytest.mark.parametrize("kind", ["full", "no reader"])
@pytest.mark.parametrize(
    "body", [print_flushed, print_on_the_way_out, print_elsewhere, lambda argv: print("x") or 0]
)
def test_whatever_prints(capsys, stdout, kind, body):
    stdout(kind)
    assert (run(body, []), capsys.readouterr().err) == ENDS[kind]


def test_an_error_stays_the_error(capsys, stdout):
    stdout("full")

    def fail(argv):
        print("x")  # flushed by nobody
        raise OSError(2, "No such file or directory", "data.txt")

    assert run(fail, []) == 2
    assert capsys.readouterr().err == "error: data.txt: No such file or directory\n"
    sys.stdout.close()  # as at Python's exit: what is left raises nothing


def test_an_error_that_nobody_hears(capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert train.main(["--steps", "0"]) == 2
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_it_is_said_once():
    with open("/dev/full", "w") as full:
        output = Output(full, "here")
        with pytest.raises(OutputLost, match="^here: No space left on device$"):
            output.write(LONG)
        for _ in range(2):
            output.write(LONG)
            output.flush()
        assert str(output.lost) == "here: No space left on device"


def test_closed_streams_lend_their_numbers_to_nobody(tmp_path):
    """What others write to it would stand in the next file opened."""
    code = (
        "import os, sys\n"
        "from nsa.tools.common.cli import run\n"
        "def body(argv):\n"
        "    with open(argv[0], 'w') as file:\n"
        "        os.write(2, b'junk')\n"
        "        print('out')\n"
        "        file.write('mine')\n"
        "    raise OSError(2, 'nobody hears this')\n"
        "sys.exit(run(body, sys.argv[1:]))\n"
    )
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" "$@" <&- 2>&-', sys.executable, "-c", code, str(tmp_path / "file")],
        stdout=subprocess.PIPE, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "out\n")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_display_of_a_run_notes_it(stdout):
    stdout("no reader")
    sys.stdout = Output(sys.stdout, "stdout")
    display = Display(step=0, steps=2)
    with display.bar:
        display.line("x")
        assert display.lost.reader_left
        display.report(1, loss=1.0, tokens_per_second=1.0)


def test_the_rows_of_bench_name_their_file(capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure_ceilings", lambda *args: None)
    monkeypatch.setattr(bench, "header", lambda *args: {"kind": "header"})
    assert bench.main(["--jsonl", "/dev/full", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "error: /dev/full: No space left on device\n"
