"""Sampling from a trained checkpoint."""

import pytest
import torch

from nsa import ConfigError
from nsa.tools.generate import __main__ as generate
from nsa.tools.generate.__main__ import check_sampling, sample
from nsa.tools.train import __main__ as train
from tests.support.training_runs import flags, start, write_texts

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    data = write_texts(folder / "data")
    argv = [*flags(data=data, steps=30, lr=1e-2, eval_every=30), "--out", str(folder / "run")]
    assert train.main(argv) == 0
    return folder / "run"


def shares(**options: object) -> list[float]:
    """How often each token is drawn, of 4000."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sample(LOGITS, generator=generator, **options)] += 1
    return (counts / 4000).tolist()


def test_greedy():
    assert sample(LOGITS, temperature=0) == 1
    assert sample(torch.zeros(5), temperature=0) == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature(temperature):
    expected = (LOGITS / temperature).softmax(0).tolist()
    assert shares(temperature=temperature) == pytest.approx(expected, abs=0.03)


def test_top_k():
    assert shares(temperature=1.0, top_k=1) == [0, 1, 0, 0]
    expected = torch.tensor([3.0, 2.0]).softmax(0).tolist()
    drawn = shares(temperature=1.0, top_k=2)
    assert [drawn[1], drawn[2]] == pytest.approx(expected, abs=0.03)
    assert drawn[0] == drawn[3] == 0
    assert shares(temperature=1.0, top_k=99)[3] > 0


def test_top_p():
    # In order 0.657, 0.242, 0.089, 0.012.
    assert shares(temperature=1.0, top_p=1e-9) == [0, 1, 0, 0]
    assert shares(temperature=1.0, top_p=0.65) == [0, 1, 0, 0]
    drawn = shares(temperature=1.0, top_p=0.67)
    assert drawn[0] == drawn[3] == 0
    assert drawn[1] == pytest.approx(0.657 / 0.899, abs=0.03)
    assert shares(temperature=1.0, top_p=1.0)[3] > 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((-1.0, None, None), "--temperature: expected a finite number >= 0, got -1.0"),
        ((float("nan"), None, None), "--temperature: .* got nan"),
        ((1.0, 0, None), "--top-k: expected an int >= 1, got 0"),
        ((1.0, None, 0.0), r"--top-p: expected a number in \(0, 1\], got 0.0"),
        ((1.0, None, 1.1), r"--top-p: expected a number in \(0, 1\], got 1.1"),
    ],
)
def test_sampling_refuses(arguments, text):
    with pytest.raises(ConfigError, match=text):
        check_sampling(*arguments)


def test_it_goes_on_from_a_prompt(run, capsys):
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


class Scripted(torch.nn.Module):
    """Says one byte after the other, and remembers how much it was shown."""

    def __init__(self, script: bytes) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.script, self.seen = list(script), []

    def forward(self, tokens):
        self.seen.append(tokens[0].tolist())
        logits = torch.zeros(*tokens.shape, 256)
        logits[0, -1, self.script[len(self.seen) - 1]] = 50.0
        return logits


def test_it_stops_at_the_end_of_the_document():
    model = Scripted(b"ab\0c")
    assert bytes(generate.generate(model, b"\0", max_new_tokens=9, context=8)) == b"ab"


def test_the_context_is_never_longer_than_in_training():
    model = Scripted(b"efgh")
    assert bytes(generate.generate(model, b"\0abcd", max_new_tokens=4, context=3)) == b"efgh"
    assert [bytes(seen) for seen in model.seen] == [b"bcd", b"cde", b"def", b"efg"]


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
    arguments = ("--max-new-tokens", 5, "--temperature", 0, "--prompt", "é")
    process = start("-m", "nsa.tools.generate", run, *arguments)
    printed, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert printed.startswith("?")
    assert len(printed.rstrip("\n")) == 6
