"""Sampling from a trained checkpoint: the command."""

import pytest

from nsa.tools.generate import __main__ as generate
from nsa.tools.train import __main__ as train
from tests.support.training_runs import flags, start, write_texts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    data = write_texts(folder / "data")
    argv = [*flags(data=data, steps=30, lr=1e-2, eval_every=30), "--out", str(folder / "run")]
    assert train.main(argv) == 0
    return folder / "run"


def test_it_continues_a_prompt(run, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        argv = [str(run), "--prompt", "attention ", "--max-new-tokens", "40", "--seed", seed]
        assert generate.main(argv) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("attention ")
    assert len(texts[0].rstrip("\n")) <= 50


def test_greedy_needs_no_seed(run, capsys):
    texts = []
    for seed in ("1", "2"):
        argv = [str(run), "--temperature", "0", "--max-new-tokens", "20", "--seed", seed]
        assert generate.main(argv) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(texts[0]) == 21


def test_a_checkpoint_inside_the_run(run, capsys):
    path = run / "checkpoints" / "step-000030"
    assert generate.main([str(path), "--max-new-tokens", "1", "--temperature", "0"]) == 0
    one = capsys.readouterr().out
    assert generate.main([str(run), "--max-new-tokens", "1", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == one


def test_bytes_that_are_no_text_are_replaced(capsys):
    generate._print_stream("é".encode(), iter(b"a\xffb\xc3\xa9\xc3"))
    assert capsys.readouterr().out == "éa\ufffdbé\ufffd\n"


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "the following arguments are required: PATH"),
        (["/no/such"], "/no/such: expected a run or a checkpoint folder, got nothing there"),
        (["/no/such", "--tempreature", "1"], "got --tempreature; did you mean --temperature?"),
        (["/no/such", "--top-k", "0"], "--top-k: expected an int >= 1, got 0"),
        (["/no/such", "--max-new-tokens", "-1"], "--max-new-tokens: expected an int >= 0, got -1"),
        (["/no/such", "--seed", "-1"], "--seed: expected an int in [0, 2**63), got -1"),
        (["/no/such", "--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:N, got"),
    ],
)
def test_bad_command_lines(capsys, argv, text):
    assert generate.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert text in line


def test_a_damaged_checkpoint(run, tmp_path, capsys):
    path = tmp_path / "step-000030"
    path.mkdir()
    for file in (run / "checkpoints" / "step-000030").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "model.safetensors").write_bytes(b"short")
    assert generate.main([str(path)]) == 2
    assert "model.safetensors is damaged: expected" in capsys.readouterr().err


def test_in_a_process_of_its_own_that_writes_ascii(run, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    arguments = ("--max-new-tokens", 5, "--temperature", 0, "--prompt", "é", "--device", "cpu")
    process = start("-m", "nsa.tools.generate", run, *arguments)
    printed, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert printed.startswith("?")
    assert len(printed.rstrip("\n")) == 6
