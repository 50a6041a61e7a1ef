"""Sampling from a trained checkpoint: the command."""

import re

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


def printed(capsys, *argv):
    """What a command printed: its text, and the lines on stderr."""
    assert generate.main([*map(str, argv), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    return out, err.splitlines()


def test_the_cache_changes_no_text(run, capsys):
    argv = (run, "--max-new-tokens", 40, "--prompt", "a", "--temperature", 0)
    text, lines = printed(capsys, *argv)
    uncached, other = printed(capsys, *argv, "--no-cache")
    assert text == uncached
    assert printed(capsys, *argv, "--chunk", 1)[0] == text
    assert len(printed(capsys, *argv, "--selected-dtype", "e4m3")[1]) == 3
    assert generate.main([*map(str, argv), "--selected-dtype", "e4m3", "--no-cache"]) == 2
    assert capsys.readouterr().err.endswith("expected no --no-cache beside it, got 'e4m3'\n")
    assert [line.split()[0] for line in lines] == ["backend", "prefill", "K/V"]
    assert [line.split()[0] for line in other] == ["backend", "prefill"]
    assert re.fullmatch(r"prefill 2 tokens at [\d,]+/s; decode 39 tokens at [\d,]+/s", lines[1])
    # of 3 … 41 tokens: at most 3 blocks of 8, 16 in the window, and the compressed ones
    assert lines[2].startswith("K/V tokens read for a token: ")
    assert lines[2].endswith("; dense attention: 22.0")
    assert all(len(line) <= 80 for line in lines)


def test_a_batch_is_each_prompt_alone(run, capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("few keys\n\nthem\n")
    argv = (run, "--max-new-tokens", 20, "--stop", "e")
    text, _ = printed(capsys, *argv, "--prompt", "sparse ", "--prompts", file)
    expected = ""
    for row, prompt in enumerate(["sparse ", "few keys", "", "them"]):
        alone, _ = printed(capsys, *argv, "--prompt", prompt, "--seed", row)
        assert alone.startswith(prompt)
        assert "e" not in alone.removeprefix(prompt)
        expected += f"=== {row + 1} of 4 ===\n{alone}\n"
    assert text == expected


def test_stops_are_several(run, capsys):
    argv = (run, "--max-new-tokens", 30, "--prompt", "a", "--temperature", 0)
    text, _ = printed(capsys, *argv)
    early, late = text[7:9], text[12:14]
    found = min(text.index(early, 1), text.index(late, 1))
    stopped, _ = printed(capsys, *argv, "--stop", late, "--stop", early)
    assert stopped == text[:found] + "\n"


def test_longer_than_trained_only_if_asked(run, capsys):
    argv = (run, "--max-new-tokens", 60, "--prompt", "a", "--temperature", 0)
    text, lines = printed(capsys, *argv)
    assert len(text) == 47 + 1  # of 48, with the separator
    assert lines[-1] == "ended at the longest text that is allowed; --max-length allows more"
    text, lines = printed(capsys, *argv, "--max-length", 55)
    assert len(text) == 54 + 1
    assert (
        lines[0] == "warning: max_length=55: the model was trained on 48 tokens; more is untested"
    )
    text, lines = printed(capsys, *argv, "--no-cache")  # as before there was one
    assert len(text) == 61 + 1
    assert generate.main([str(run), "--prompt", "a" * 48]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "prompt: expected fewer than max_length=48 tokens, which the model was trained on" in line
    )


def test_a_dense_model_has_a_cache_too(tmp_path, capsys):
    data = write_texts(tmp_path / "data")
    argv = [*flags(data=data, steps=2, attention="dense"), "--out", str(tmp_path / "run")]
    assert train.main(argv) == 0
    capsys.readouterr()
    argv = (tmp_path / "run", "--max-new-tokens", 20, "--prompt", "a")
    text, lines = printed(capsys, *argv)
    assert lines[0] == "backend dense attention"
    assert lines[2] == "K/V tokens read for a token: 12.0; dense attention: 12.0"
    assert printed(capsys, *argv, "--no-cache")[0] == text


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
        (["/no/such", "--min-p", "2"], "--min-p: expected a number in (0, 1], got 2"),
        (["/no/such", "--max-length", "0"], "--max-length: expected an int >= 1, got 0"),
        (["/no/such", "--chunk", "-5"], "--chunk: expected an int >= 1, got -5"),
        (["/no/such", "--stop", ""], "--stop: expected a text, got an empty one"),
        (["/no/such", "--prompts", "/none"], "/none: No such file or directory"),
        (["/no/such", "--prompts", "/dev/null"], "--prompts: expected a prompt a line, got none"),
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
    assert process.returncode == 0
    assert errors.startswith("backend sdpa")
    assert printed.startswith("?")
    assert len(printed.rstrip("\n")) == 6
