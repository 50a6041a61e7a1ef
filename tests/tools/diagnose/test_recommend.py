"""`python -m nsa.tools.diagnose --recommend`: lines for a shell, and what is known of each."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nsa import NSAConfig, Settings
from nsa.config import PRESETS
from nsa.tools.bench.flags import make_plan
from nsa.tools.common.machine import Gpu, collect_machine
from nsa.tools.diagnose import measured, recommend
from nsa.tools.train.flags import run_config, train_parser
from tests.support.diagnosing import run

LENGTHS = (2048, 8192, 65536)


@pytest.fixture
def lines_on(monkeypatch):
    """The lines for a length on an H100, or on this CPU."""

    def lines(device: str, length: int, **variables: str) -> list[recommend.Line]:
        machine = collect_machine()
        if device == "cuda":
            gpu = Gpu(name="H100", capability="9.0", memory_gib=79.0, has_kernels=True)
            machine = replace(machine, gpus=(gpu,), variables=variables)
            monkeypatch.setattr(recommend, "choose_device", lambda name: torch.device("cuda"))
            monkeypatch.setattr(recommend, "unavailable", lambda name, problem: None)
        return recommend.recommend(machine, device, length)

    return lines


def commands(lines: list[recommend.Line]) -> list[list[str]]:
    """As a shell reads them."""
    text = "\n".join(map(str, lines)).splitlines()
    return [parts for line in text if (parts := shlex.split(line, comments=True))]


def test_what_is_printed_can_be_pasted(capsys):
    code, out, _ = run(capsys, "--recommend", "--length", "4096")
    assert code == 0
    words = [shlex.split(line, comments=True) for line in out.splitlines()]
    assert ["export", "NSA_BACKEND=sdpa"] in words
    assert {parts[0] for parts in words if parts} == {"export", "python"}
    assert 'NSAConfig.preset("cpu")' in out
    assert "1.5× the speed" in " ".join(out.replace("\n# ", " ").split())
    assert all(len(line) <= 80 for line in out.splitlines() if line.startswith("#"))
    assert "export GOMP_SPINCOUNT=1000  # not measured" in out


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_line_is_accepted(lines_on, device, length):
    preset = recommend.preset_for(torch.device(device), length)
    config = NSAConfig.preset(preset) if preset else NSAConfig()
    environment = {}
    for words in commands(lines_on(device, length)):
        if words[0] == "export":
            name, value = words[1].split("=", 1)
            environment[name] = value
        elif words[2] == "nsa.tools.bench":
            (trial,) = make_plan([*words[3:], "--device", "cpu"]).trials
            if preset is not None:
                assert replace(trial.config, rope_theta=config.rope_theta) == config
        else:
            given = train_parser().parse_strictly([*words[3:], "--device", "cpu"])
            assert run_config(vars(given)).model.nsa == config
    settings = Settings.from_environ(environment)
    assert settings.backend == ("compiled" if device == "cuda" else "sdpa")


def test_a_gpu_by_length(lines_on):
    for length, preset in zip(LENGTHS, ("short", None, "long"), strict=True):
        lines = lines_on("cuda", length)
        gains = {line.command: line.comment for line in lines}
        gain = measured.gain_of("NSA_BACKEND=compiled", length)
        assert gains["export NSA_BACKEND=compiled"] == gain
        assert "4%" in gains["export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"]
        text = "\n".join(line.comment for line in lines)
        assert (f'NSAConfig.preset("{preset}")' if preset else "NSAConfig(), the default") in text
        assert "kept for backward" in text
        # sharing: an option in between, part of the preset for long sequences
        shared = measured.gain_of("select_share=4", length)
        assert (shared in text) == (preset is None)
    assert "gain: 1.7× / 1.5× the default's speed" in text


@pytest.mark.parametrize("length", LENGTHS)
def test_comments_fit_a_terminal(lines_on, length):
    """Commands may wrap, and are pasted whole."""
    for line in lines_on("cuda", length):
        *comments, last = str(line).splitlines()
        assert all(text.startswith("# ") and len(text) <= 80 for text in comments)
        assert last == line.command or len(last) <= 80


def test_what_is_set_otherwise_is_told(lines_on):
    lines = lines_on("cuda", 2048, PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:512")
    assert any("now max_split_size_mb:512" in line.comment for line in lines)


def test_a_gpu_that_compiled_cannot_run_on(lines_on, monkeypatch):
    lines_on("cuda", 2048)
    monkeypatch.setattr(recommend, "unavailable", lambda *_: "compiled needs sm80 or newer")
    machine = collect_machine()
    gpu = Gpu(name="T4", capability="7.5", memory_gib=15.0, has_kernels=True)
    lines = recommend.recommend(replace(machine, gpus=(gpu,)), "cuda", 2048)
    assert ["export", "NSA_BACKEND=sdpa"] in commands(lines)
    assert any("compiled needs sm80 or newer: sdpa runs" in line.comment for line in lines)


def test_json(capsys):
    _, out, _ = run(capsys, "--recommend", "--json")
    assert {"command", "comment"} == set(json.loads(out)[0])


def test_gains():
    assert measured.gain_of("NSA_BACKEND=compiled", 8192).startswith("1.02× ")
    nearest = measured.gain_of("NSA_BACKEND=compiled", 5000)
    assert nearest.startswith("not measured at 5000; at 8192: 1.02× ")
    assert measured.gain_of("preset s2048", 2048) == "not measured"


def test_every_gain_is_of_a_day_in_the_docs():
    docs = Path(__file__).resolve().parents[3] / "docs" / "measurements.md"
    text = docs.read_text(encoding="utf-8")
    assert all(row.date in text for row in measured.GAINS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--length", "9"], "--length: expected --recommend with it, got none"),
        (["--recommend", "--length", "0"], "--length: expected an int >= 1, got 0"),
        (["--recommend", "--profile"], "--recommend: expected no --profile, which it does not"),
    ],
)
def test_flags_that_do_not_fit(capsys, argv, message):
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert message in err


def test_environments_of_the_presets_are_valid():
    for preset in PRESETS.values():
        Settings.from_environ(preset.environment)
