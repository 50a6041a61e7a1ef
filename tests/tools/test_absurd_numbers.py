"""Numbers that nobody means: one line and exit code 2 at once, whatever flag or file has them."""

import argparse
import math
from dataclasses import fields

import numpy as np
import pytest
import torch

from nsa import ConfigError, NSAError
from nsa.models import GenerationConfig, ModelConfig
from nsa.models.sampling import sample
from nsa.tools.bench.flags import bench_parser, make_plan
from nsa.tools.common.cli import choose_device, integer, number, run
from nsa.tools.generate import __main__ as generate
from nsa.tools.train import __main__ as train
from nsa.tools.train.flags import run_config, train_parser
from nsa.training.config import RunConfig, TrainConfig
from tests.support import benching
from tests.support.training_runs import config_of, error_of, flags, write_texts

DIGITS = ["1" + "0" * 20, "1" + "0" * 400, "1" + "0" * 5000]
NEVER = [*DIGITS, *(f"-{text}" for text in DIGITS), "nan", "inf", "1e400", "0x10", "1_0_", "½", ""]
"""No integer flag takes any of them."""
MOST = str(2**63 - 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data"))


def numeric(parser: argparse.ArgumentParser, kind: object) -> list[str]:
    return [a.option_strings[0] for a in parser._actions if a.type is kind]


def assert_one_line(error: NSAError) -> None:
    assert str(error).isprintable()
    assert len(str(error)) < 400


def test_every_integer_of_train():
    parser = train_parser()
    found = numeric(parser, integer)
    assert {"--steps", "--seed", "--dim", "--window"} <= set(found)
    for flag in found:
        for value in NEVER:
            with pytest.raises(NSAError) as error:
                parser.parse_strictly([f"{flag}={value}"])
            assert flag in str(error.value)
            assert_one_line(error.value)


def test_every_other_number_of_train():
    parser = train_parser()
    found = numeric(parser, number)
    assert len(found) >= 6
    for flag in found:
        for value in ("nan", "inf", "-inf", "1e400", *DIGITS[1:], "-1"):
            with pytest.raises(NSAError) as error:
                run_config(vars(parser.parse_strictly([f"{flag}={value}"])))
            assert flag[2:].replace("-", "_") in str(error.value).replace("-", "_")
            assert_one_line(error.value)


@pytest.mark.parametrize("field", [f.name for f in fields(GenerationConfig)])
def test_every_number_of_generate(capsys, field):
    flag = "--" + field.replace("_", "-")
    for value in (*NEVER[1:], "-1"):
        assert generate.main(["/no/such", f"{flag}={value}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert flag in line
        assert len(line) < 400


def test_every_flag_of_bench():
    found = [a for a in bench_parser()._actions if a.nargs is None and a.metavar != "FILE"]
    assert len(found) >= 8
    for action in found:
        for value in (*NEVER, f"{DIGITS[1]}/1", f"1/1:{DIGITS[0]}", f"64,{DIGITS[0]}", MOST):
            with pytest.raises(NSAError) as error:
                make_plan([f"{action.option_strings[0]}={value}"])
            assert action.option_strings[0] in str(error.value)
            assert_one_line(error.value)


@pytest.mark.parametrize(
    "name", [f"cuda:{DIGITS[0]}", f"cuda:{MOST}", "cuda:-1", "cuda:256", f"cpu:{MOST}"]
)
def test_every_device(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="--device: expected auto, cpu, cuda or cuda:N, got"):
        choose_device(name)


def numbers_of(config: type, values: dict[str, object]) -> list[str]:
    kinds = ("int", "float", "int | None")
    return [f.name for f in fields(config) if f.type in kinds and f.name in values]


@pytest.mark.parametrize(("part", "config"), [("train", TrainConfig), ("model", ModelConfig)])
def test_every_number_of_a_configuration(data, part, config):
    """Which a stranger's file may hold."""
    values = config_of(data).to_dict()
    found = numbers_of(config, values[part])
    assert len(found) >= 5
    for name in found:
        whole = isinstance(values[part][name], int)
        for value in (math.nan, math.inf, -(10**20), *((10**20, 10**400) if whole else ())):
            with pytest.raises(ConfigError) as error:
                RunConfig.from_dict({**values, part: {**values[part], name: value}})
            assert_one_line(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 30_000_000},
        {"batch_size": MOST},
        {"dim": 2**24},
        {"hidden_dim": 2**26, "num_layers": 10_000},
    ],
)
def test_memory_that_cannot_be_had(data, tmp_path, capsys, changes):
    out = tmp_path / "run"
    error = error_of(capsys, [*flags(data=data, **changes), "--out", str(out)])
    assert error.startswith("expected what fits into the ")
    assert error.endswith("GiB at least; lower --batch-size, --seq-len or the sizes of the model")
    assert not out.exists()


def test_layers_without_end(capsys):
    error = error_of(capsys, ["--num-layers", "1000000"])
    assert error == "num_layers: expected at most 10000, got 1000000"


def test_numbers_that_are_large_and_mean_something(data, tmp_path):
    names = ("warmup", "eval_every", "eval_windows", "save_every", "log_every", "keep", "seed")
    argv = flags(data=data, **{"steps": 1, **dict.fromkeys(names, MOST)})
    assert train.main([*argv, "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("changes", [{"lr": 1e308}, {"weight_decay": 1e308}])
def test_steps_into_nowhere(data, tmp_path, capsys, changes):
    argv = [*flags(data=data, warmup=0, **changes), "--out", str(tmp_path / "run")]
    assert "expected a finite number, got nan" in error_of(capsys, argv)


@pytest.mark.parametrize("temperature", [1e-320, 1e-308, 1e-30])
def test_a_temperature_of_almost_zero(temperature):
    logits = torch.tensor([[1.0, 30.0, -30.0]], dtype=torch.float64)
    uniform = torch.tensor([0.9], dtype=torch.float64)
    assert sample(logits, GenerationConfig(temperature=temperature), uniform).item() == 1


# What no estimate sees


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(10**15),
        lambda: torch.empty(2**40, 2**40),
        lambda: np.empty(10**15),
        lambda: bytearray(10**15),
    ],
)
def test_an_allocator_that_refuses(capsys, allocate):
    assert run(lambda argv: allocate(), []) == 2
    assert capsys.readouterr().err == (
        "error: out of memory; expected less to compute at once: a smaller batch, shorter "
        "sequences or a smaller model\n"
    )


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shape"):
        run(lambda argv: torch.ones(2).view(3), [])


def test_bench_goes_on_without_what_does_not_fit(capsys, tmp_path, monkeypatch):
    benching.be_quick(monkeypatch)
    benching.skip_parity(monkeypatch)
    argv = ("--branches", "window", "--backends", "sdpa")
    code, _, rows, _ = benching.run_jsonl(capsys, tmp_path, *argv, lengths=f"64,{2**31 - 1}")
    assert code == 0
    assert [row["note"] for row in rows] == [None, None, "out of memory", "out of memory"]
