"""The training tool: what it writes and prints, what a step computes, what it refuses."""

import json
import math
import time

import pytest
import torch

from nsa.tools.train import __main__ as train
from nsa.tools.train.display import Display
from nsa.tools.train.flags import run_config
from nsa.training.checkpoint import load_checkpoint
from nsa.training.config import RunConfig, TrainConfig
from nsa.training.data import load_corpus, training_batch
from nsa.training.trainer import Trainer
from tests.support.training_runs import config_of, error_of, flags, metrics, start, write_texts


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A run of 12 steps, never interrupted; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*flags(data=data), "--out", str(out)]) == 0
    return out


def test_a_run_leaves_its_configuration_metrics_and_checkpoints(finished):
    names = sorted(path.relative_to(finished).as_posix() for path in finished.rglob("*"))
    assert [name for name in names if name.count("/") < 2] == [
        "checkpoints",
        "checkpoints/latest",
        "checkpoints/step-000008",
        "checkpoints/step-000012",
        "config.json",
        "metrics.jsonl",
    ]
    lines = metrics(finished)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["step"] for line in lines if "validation_loss" in line] == [6, 12]
    assert steps[-1]["tokens"] == 12 * 2 * 48
    assert steps[0]["loss"] == pytest.approx(math.log(256), abs=0.3)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    config = RunConfig.from_dict(json.loads((finished / "config.json").read_text()))
    assert (config.train.steps, config.model.dim, config.model.nsa.window) == (12, 32, 16)


def test_nothing_is_pickled(finished):
    suffixes = {path.suffix for path in finished.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".jsonl", ""}


def test_what_it_prints(data, tmp_path, capsys):
    assert train.main([*flags(data=data, steps=2), "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    for expected in (
        "window 16",
        "seq_len 48",
        "dim 32",
        "device       cpu",
        "backend      sdpa (auto on cpu)",
        "step 2/2  loss",
        "step 2: validation loss",
        "unigram",
        "bigram",
        "nats per byte",
        "NOT below the bigram",
    ):
        assert expected in out
    assert "\x1b" not in out  # not a terminal: plain lines


def test_the_dense_model(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*flags(data=data, steps=2, attention="dense"), "--out", str(out)]) == 0
    assert "backend      dense: torch.nn.functional.scaled_dot_product" in capsys.readouterr().out


def test_the_backend_asked_for_runs(data, tmp_path, capsys):
    argv = [*flags(data=data, steps=1, backend="reference"), "--out", str(tmp_path / "run")]
    assert train.main(argv) == 0
    assert "backend      reference (" in capsys.readouterr().out


def test_a_bar_on_a_terminal(capsys):
    display = Display(step=0, steps=3, drawn=True)
    with display.bar:
        display.line("[not markup]")
        display.advance(2)
        display.report(2, loss=1.25, tokens_per_second=1e4)
        assert display.bar.time_left is None  # one step may have compiled: no measure of others
        display.advance(3)
    out = capsys.readouterr().out
    for expected in ("[not markup]", "3/3", "loss 1.2500", "10,000 tokens/s", "00:00"):
        assert expected in out


def test_the_time_left_without_a_bar(capsys):
    display = Display(step=0, steps=100_000, drawn=False)
    with display.bar:
        for step in (1, 2):
            display.advance(step)
            display.report(step, loss=1.25, tokens_per_second=1e4)
            time.sleep(0.2)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 1/100000  loss 1.2500  10,000 tokens/s  -:-- left"
    hours, minutes, seconds = second.split()[-2].split(":")
    assert 5 <= int(hours) < 50  # 0.2 s a step and whatever the machine adds


def test_gradient_accumulation_is_the_mean_over_the_batches(data):
    corpus = load_corpus(str(data))
    trainer = Trainer(config_of(data, accumulate=3, grad_clip=1e9), corpus)
    gradients = {name: torch.zeros_like(p) for name, p in trainer.model.named_parameters()}
    losses = []
    for index in range(3):
        trainer.model.zero_grad()
        batch = training_batch(corpus, seed=0, index=index, batch_size=2, seq_len=48)
        loss = trainer.model.loss(*batch)
        loss.backward()
        losses.append(loss.detach())
        for name, parameter in trainer.model.named_parameters():
            gradients[name] += parameter.grad / 3
    trainer.model.zero_grad()
    result = trainer.train_step()
    torch.testing.assert_close(result.loss, torch.stack(losses).mean())
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7)
    batches = [
        training_batch(corpus, seed=0, index=index, batch_size=2, seq_len=48) for index in (3, 4, 5)
    ]
    with torch.no_grad():
        losses = [trainer.model.loss(*batch) for batch in batches]
    torch.testing.assert_close(trainer.train_step().loss, torch.stack(losses).mean())


def test_gradients_are_clipped(data):
    trainer = Trainer(config_of(data, grad_clip=0.01), load_corpus(str(data)))
    assert trainer.train_step().grad_norm > 0.1
    squares = sum(float(p.grad.square().sum()) for p in trainer.model.parameters())
    assert math.sqrt(squares) == pytest.approx(0.01, rel=1e-3)


def test_validation_changes_nothing(data):
    losses = []
    for validations in (0, 3):
        trainer = Trainer(config_of(data), load_corpus(str(data)))
        trainer.train_step()
        for _ in range(validations):
            trainer.validate()
        losses.append(trainer.train_step().loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    "changes", [{"activation_checkpointing": True}, {"recompute": True}, {"precision": "bf16"}]
)
def test_options_of_a_step(data, changes):
    trainer = Trainer(config_of(data), load_corpus(str(data)))
    values = {**config_of(data).to_dict()["train"], **changes}
    config = RunConfig(model=trainer.config.model, train=TrainConfig(**values))
    other = Trainer(config, load_corpus(str(data)))
    torch.testing.assert_close(
        trainer.train_step().loss, other.train_step().loss, rtol=1e-3, atol=0.0
    )
    assert other.model.activation_checkpointing is values["activation_checkpointing"]
    assert other.model.blocks[0].attention.recompute is values["recompute"]


def test_what_was_split_is_printed(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for name, size in (("big.txt", 16_000), ("small.txt", 80)):
        (data / name).write_text("some text" * (size // 9))
    assert train.main([*flags(data=data, steps=1), "--out", str(tmp_path / "run")]) == 0
    assert (
        f"data         {data}: 14,460 bytes to train on (1 files), 1,608 to validate (2; of "
        "'big.txt' only the end), 0 files skipped\n"
    ) in capsys.readouterr().out


def test_runs_keep_their_split(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*flags(data=data, steps=1, split="files"), "--out", str(out)]) == 0
    assert train.main(["--out", str(out), "--resume"]) == 0
    assert "split files" in capsys.readouterr().out
    error = error_of(capsys, ["--out", str(out), "--resume", "--split", "bytes"])
    assert "split files -> bytes" in error

    values = config_of(data).to_dict()
    assert values["train"].pop("split") == "bytes"
    old = RunConfig.from_dict(values)  # of a run from before the flag
    assert old.train.split == "files"
    assert run_config({"data": str(data), "preset": "tiny"}, old).train.split == "files"


def test_an_existing_run_is_not_overwritten(finished, data, capsys):
    before = (finished / "config.json").stat().st_mtime_ns
    error = error_of(capsys, [*flags(data=data), "--out", str(finished)])
    assert error == (
        f"{finished} already holds a run: expected --resume to continue it, or another --out"
    )
    assert (finished / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--step", "3"], "expected a known flag, got --step; did you mean --steps?"),
        (["--widnow=3"], "expected a known flag, got --widnow; did you mean --window?"),
        (["--xyzzy"], "expected a known flag, got --xyzzy; see --help"),
        (["books"], "expected a flag, got 'books'; see --help"),
        (["--steps", "many"], "argument --steps: expected an integer, got 'many'"),
        (["--lr", "fast"], "argument --lr: expected a number, got 'fast'"),
        (["--steps"], "argument --steps: expected one argument"),
        (["--steps", "0"], "--steps: expected an int >= 1, got 0"),
        (["--warmup", "-1"], "--warmup: expected an int >= 0, got -1"),
        (["--lr", "nan"], "--lr: expected a number > 0, got nan"),
        (["--min-lr", "2"], "--min-lr: expected a number in [0, 1], got 2.0"),
        (["--beta2", "1"], "--beta2: expected a number in [0, 1), got 1.0"),
        (["--num-heads", "3"], "num_heads: expected a multiple of num_kv_heads=2, got 3"),
        (["--dim", "0"], "dim: expected an int >= 1, got 0"),
        (["--data", "/no/such"], "expected a file or folder of text, got '/no/such'"),
        (["--device", "gpu"], "--device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--device", "meta"], "--device: expected auto, cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "cuda:77"], "expected a device of this machine, got 'cuda:77'"),
        (["--attention", "dense", "--backend", "sdpa"], "--backend: expected none with"),
        (
            ["--preset", "tiny", "--select-regions", "16,2"],
            "--select-regions: expected regions of at most --seq-len=256 tokens, got 512",
        ),
        (["--seq-len", "1000000000"], "at least 1000000001 bytes in the training split"),
        (["--out", "/dev/null"], "/dev/null"),
    ],
)
def test_bad_command_lines(tmp_path, capsys, argv, text):
    out = [] if "--out" in argv else ["--out", str(tmp_path / "run")]
    assert text in error_of(capsys, [*argv, *out])
    assert not (tmp_path / "run").exists()


def test_a_backend_that_cannot_run_leaves_no_run(data, tmp_path, capsys):
    argv = [*flags(data=data, steps=1), "--out", str(tmp_path / "run")]
    error = error_of(capsys, [*argv, "--backend", "fa2-dense", "--device", "cpu"])
    assert "fa2-dense" in error
    assert "backends that can" in error
    assert train.main(argv) == 0  # nothing in the way


@pytest.mark.parametrize("log_every", [1, 1000])
def test_divergence_is_not_saved(data, tmp_path, capsys, log_every):
    changes = {"lr": 1e30, "save_every": 1, "warmup": 0, "log_every": log_every}
    argv = [*flags(data=data, **changes), "--out", str(tmp_path / "run")]
    error = error_of(capsys, argv)
    assert "expected a finite number, got nan" in error
    assert "lower --lr" in error
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        assert all(
            t.isfinite().all() for t in load_checkpoint(path, ("model",)).tensors["model"].values()
        )


def test_a_reader_that_leaves(data, tmp_path):
    out = tmp_path / "run"
    endless = flags(data=data, steps=1_000_000, save_every=1_000_000)
    process = start("-m", "nsa.tools.train", *endless, "--out", out)
    while not process.stdout.readline().startswith("step 1/"):
        assert process.poll() is None  # one that leaves earlier ends it before there is a run
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141
    assert errors == (
        f"error: stdout: Broken pipe; stopped and saved at step {load_checkpoint(out, ()).step}; "
        f"resume with: python -m nsa.tools.train --out {out} --resume\n"
    )


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    assert "--resume" in capsys.readouterr().out
