"""The microscope as a command: what it prints and writes, and what it refuses."""

import hashlib
import json
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nsa.inspection import KNOCK_OUTS, replay
from nsa.tools.common.models import load_trained
from nsa.tools.inspect import __main__ as inspect
from nsa.tools.inspect.page import page
from nsa.tools.inspect.png import png
from nsa.tools.inspect.study import Examiner, loss_by_position, read_sequences
from nsa.tools.train import __main__ as train
from tests.support.training_runs import flags, write_texts

CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inspect")


@pytest.fixture(scope="module")
def run(folder):
    data = write_texts(folder / "data")
    sizes = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    assert train.main([*flags(data=data, steps=4, **sizes), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def dense(folder):
    data = write_texts(folder / "data")
    argv = [*flags(data=data, steps=1, attention="dense"), "--out", str(folder / "dense")]
    assert train.main(argv) == 0
    return folder / "dense"


@pytest.fixture(scope="module")
def text(folder):
    path = folder / "text.txt"
    path.write_bytes((write_texts(folder / "data") / "0.txt").read_bytes()[:200])
    return path


@pytest.fixture(scope="module")
def written(folder, run, text):
    """Everything that one command writes."""
    out = folder / "out"
    out.mkdir()
    argv = [str(run), "--text", str(text), "--sequences", "2", *CPU]
    for flag in ("html", "json", "lists", "figures"):
        argv += [f"--{flag}", str(out / flag)]
    assert inspect.main(argv) == 0
    return out


def test_it_prints_tables_and_writes_what_was_asked_for(run, text, folder, capsys):
    target = folder / "alone.json"
    argv = [str(run), "--text", str(text), "--json", str(target), "--no-knock-outs", *CPU]
    assert inspect.main(argv) == 0
    out = capsys.readouterr().out
    for title in ("Blocks read", "Dense attention's mass", "Gates", "Loss by position"):
        assert title in out
    assert "Knock-outs" not in out
    assert out.endswith(f"wrote {target}\n")
    study = json.loads(target.read_text())
    assert study["knock_outs"] is None
    assert study["attention"]["sequences"] == [48]


def test_json_holds_every_number(written, run, text):
    study = json.loads((written / "json").read_text())
    assert study["attention"]["sequences"] == [48, 48]
    assert list(study["knock_outs"]) == list(KNOCK_OUTS)
    assert study["knock_outs"]["none"] == pytest.approx(study["loss"], rel=1e-4)
    for layer in study["attention"]["layers"]:
        assert [len(layer["gates"][b]["heads"]) for b in layer["gates"]] == [4, 4, 4]
        block_map = np.array(layer["block_map"])
        assert block_map.shape == (2, 48, 6)
        assert block_map.sum(-1).max() == 3
        assert 0 < layer["recall"]["mean"] <= 1
    assert study["loss_by_position"][-1]["end"] == 48
    trained = load_trained(run, None, torch.device("cpu"))
    (tokens, targets), _ = read_sequences(text, trained, length=None, sequences=2)
    assert targets[0].tolist() == list(text.read_bytes()[:48])
    assert tokens[0].tolist() == [0, *text.read_bytes()[:47]]


def test_written_lists_can_be_replayed(written, run, text):
    trained = load_trained(run, None, torch.device("cpu"))
    pairs = read_sequences(text, trained, length=None, sequences=2)
    tokens = torch.cat([tokens for tokens, _ in pairs])
    with np.load(written / "lists") as arrays:
        lists = {name: torch.from_numpy(arrays[name]) for name in arrays}
    assert list(lists) == ["blocks.0.attention", "blocks.1.attention"]
    with torch.no_grad(), replay(trained.model, lists):
        replayed = trained.model(tokens)
    torch.testing.assert_close(replayed, trained.model(tokens).detach())


class _Page(HTMLParser):
    """Collects tags, and checks that they are closed in order."""

    VOID = ("meta", "img", "rect", "path", "circle", "br")

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_needs_nothing_but_itself(written):
    html = (written / "html").read_text()
    parsed = _Page()
    parsed.feed(html)
    assert parsed.open == []
    assert "script" not in parsed.seen
    assert all(link.startswith("data:image/png;base64,") for link in parsed.links)
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")
    assert parsed.seen.count("img") == 2 * 2 + 3  # maps by layer and group, gates by branch
    assert not re.search(r"\b(nan|None|inf)\b", html)


def test_a_large_models_page_stays_small(run, text):
    """With noise for maps, which does not compress: 10 layers of 8 groups."""
    trained = load_trained(run, None, torch.device("cpu"))
    pairs = read_sequences(text, trained, length=None, sequences=1)
    study = Examiner(trained, pairs, text).study(lambda name: None)
    generator = np.random.default_rng(0)
    layers = [
        replace(study.attention.layers[0], block_map=generator.random((8, 128, 128)).tolist())
        for _ in range(10)
    ]
    html = page(replace(study, attention=replace(study.attention, layers=tuple(layers))))
    assert len(html.encode()) < 2_000_000
    assert "The first group of each layer" in html


def test_figures_stand_alone(written):
    names = {path.name for path in (written / "figures").iterdir()}
    assert {"overlap.svg", "mass.svg", "knock-outs.svg", "map-0-0.png", "gates-window.png"} <= names
    for path in (written / "figures").glob("*.svg"):
        root = ET.parse(path).getroot()
        assert root.tag.endswith("svg")
        assert "--blue" in path.read_text()


def test_an_image_is_what_it_was_made_from(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "x.png").write_bytes(png([[0, 0.5, 1], [1, 0, 2]]))
    alpha = np.array(image.open(tmp_path / "x.png").convert("RGBA"))[..., 3]
    assert alpha.tolist() == [[0, 128, 255], [255, 0, 255]]


def test_positions_are_binned_by_doubling():
    losses = torch.arange(11.0)
    bins = loss_by_position(losses)
    edges = [(x.start, x.end) for x in bins]
    assert edges == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 11)]
    assert [x.loss for x in bins] == [0, 1, 2.5, 5.5, 9]
    assert [(x.start, x.end) for x in loss_by_position(losses[:1])] == [(0, 1)]


def test_a_loss_is_that_of_the_model(run, text):
    trained = load_trained(run, None, torch.device("cpu"))
    (pair,) = read_sequences(text, trained, length=40, sequences=1)
    steps = []
    examiner = Examiner(trained, [pair], text)
    study = examiner.study(steps.append)
    assert len(steps) == examiner.steps
    with torch.no_grad():
        want = F.cross_entropy(trained.model(pair[0])[0], pair[1][0])
    assert study.loss == pytest.approx(float(want))


def test_a_short_text_says_that_nothing_is_selected(run, text, capsys):
    assert inspect.main([str(run), "--text", str(text), "--length", "16", *CPU]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "nothing is selected in sequences as short as these" in out
    assert out.endswith("No gate is shut.")


def refused(capsys, *argv: object) -> str:
    capsys.readouterr()
    assert inspect.main([str(x) for x in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


def test_bad_input_is_one_line(run, dense, text, folder, capsys):
    message = refused(capsys, dense, "--text", text)
    assert re.match(r".*expected a model with attention='nsa', got attention='dense'", message)
    empty, tiny = folder / "empty", folder / "tiny"
    empty.write_bytes(b"")
    tiny.write_bytes(b"seven b")
    for argv, wanted in (
        ([run, "--text", empty], "--text: expected text in .*empty, got an empty file"),
        ([run, "--text", tiny], "--text: expected at least one selection block, 8 bytes .* got 7"),
        ([run, "--text", text, "--length", "7"], "--length: expected at least one .* got 7"),
        ([run, "--text", text, "--length", "0"], "--length: expected an int >= 1, got 0"),
        ([run, "--text", folder / "no"], "--text: cannot read .*: No such file"),
        ([run, "--text", folder], "--text: cannot read .*: Is a directory"),
        ([text, "--text", text], "expected a run or a checkpoint folder, got a file"),
        ([folder / "data", "--text", text], "got a folder without one"),
        ([run], "the following arguments are required: --text"),
        ([run, "--text", text, "--htlm", "x"], "got --htlm; did you mean --html?"),
        (
            [run, "--text", text, "--html", folder / "no" / "x"],
            "--html: expected a file in an existing folder, got one in .*no, which is not there",
        ),
        ([run, "--text", text, "--json", folder], "--json: expected a file .* got a folder"),
    ):
        assert re.search(wanted.replace("html?", r"html\?"), refused(capsys, *argv)), wanted


def test_a_checkpoint_of_another_kind_is_one_line(run, text, folder, capsys):
    """Tensors of somebody else's model, in a folder, and in a checkpoint's own form."""
    other = folder / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (other / "config.json").write_text('{"model_type": "llama"}')
    assert "got a folder without one" in refused(capsys, other, "--text", text)
    copy = folder / "step-000004"
    shutil.copytree(run / "checkpoints" / "step-000004", copy)
    state = json.dumps({"config": {"model": {}}}).encode()
    (copy / "state.json").write_bytes(state)
    manifest = json.loads((copy / "manifest.json").read_text())
    digest = hashlib.sha256(state).hexdigest()
    manifest["files"]["state.json"] = {"bytes": len(state), "sha256": digest}
    manifest.pop("sha256", None)  # as those of old had none
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "unusable configuration" in refused(capsys, copy, "--text", text)
