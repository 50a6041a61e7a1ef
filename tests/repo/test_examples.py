"""examples/: each script runs as it stands, and does what it is there to show."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a script in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        path = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


def losses(printed):
    return [float(x) for x in re.findall(r"(\d+\.\d+) nats", printed)]


def test_train(run):
    printed = run("train")
    found = losses(printed)
    assert len(found) == 3
    assert found[-1] < found[0] / 2
    assert printed.endswith("sdpa (auto on cpu)\n")


def test_generate(run):
    """What was learned, the same by a loop and by a call; a batch ends at its stop."""
    printed = run("generate").splitlines()
    texts = [line.partition(":")[2].strip() for line in printed]
    learned = "reads three short lists of keys"
    assert texts[0] == texts[1]
    assert texts[0].startswith(f"{learned}, and a gate weights")
    assert texts[2:] == [f"{learned} [stop]"] * 2


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_finetune_transformers(run, tmp_path):
    pytest.importorskip("transformers", minversion="5.24")
    pytest.importorskip("accelerate")
    printed = run("finetune_transformers")
    before, after = map(float, re.search(r"texts: ([\d.]+), then ([\d.]+)", printed).groups())
    assert after < before - 1
    assert re.search(r"it writes: b'def .+'", printed)
    assert (tmp_path / "runs" / "finetuned" / "config.json").exists()


def test_inspect_model(run):
    pytest.importorskip("transformers", minversion="5.24")
    printed = run("inspect_model")
    best, chance = map(int, re.search(r"have (\d+)% \(by chance (\d+)%\)", printed).groups())
    assert best > chance
    last = re.findall(r"layers\.(\d)\S+: the last token reads blocks (\[\[0, .+\]\])", printed)
    assert [layer for layer, _ in last] == ["0", "1"]


def test_train_torchtitan(run):
    pytest.importorskip("torchtitan", reason="torchtitan is not installed: pip install torchtitan")
    printed = run("train_torchtitan")
    assert printed.startswith("layers.0.attention GQAttention.Config -> SparseAttention.Config")
    found = losses(printed)
    assert found[-1] < found[0] / 2


def test_every_example_is_tested():
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tests - {"every_example_is_tested"}
