"""``train --compile``: the same step, what is said, what is refused, and the file of compiled code.

Structure is asked of the cheapest compiler that shows it: "eager" runs the traced graph as it is,
"aot_eager" splits it into forward and backward as Inductor would get them.
"""

import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.codecache import InductorCacheArtifact
from torch._inductor.utils import fresh_cache
from torch.compiler._cache import _serialize_single_cache
from torch.utils._appending_byte_serializer import AppendingByteSerializer

from nsa import ConfigError
from nsa.tools.generate import __main__ as generate
from nsa.tools.train import __main__ as train
from nsa.training import compile as training_compile
from nsa.training import compile_cache
from nsa.training.checkpoint import load_checkpoint
from nsa.training.compile_cache import CacheUse, CompileCache
from nsa.training.config import RunConfig, TrainConfig
from nsa.training.data import load_corpus
from nsa.training.files import temporary_of
from nsa.training.trainer import Trainer
from tests.support.training_runs import config_of, error_of, flags, metrics, write_texts

pytestmark = [
    # Torch hides this one from everybody but those to whom warnings are errors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    # Inductor brings this one in when it is imported.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data"))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiler(monkeypatch):
    return lambda name: monkeypatch.setattr(training_compile, "COMPILER", name)


def trainer_of(data: Path, **changes: object) -> Trainer:
    config = config_of(data, seq_len=32, eval_windows=2)
    values = {**config.to_dict()["train"], **changes}
    model = config.model.replace(attention=values.pop("attention", "nsa"))
    return Trainer(RunConfig(model=model, train=TrainConfig(**values)), load_corpus(str(data)))


# The step


@pytest.mark.parametrize(
    ("mode", "attention", "checkpointing"),
    [("blocks", "nsa", True), ("model", "dense", True)],
)
def test_a_compiled_run_is_the_same_run(data, compiler, mode, attention, checkpointing):
    compiler("aot_eager")
    changes = {"attention": attention, "activation_checkpointing": checkpointing}
    plain = trainer_of(data, attention=attention)
    compiled = trainer_of(data, compile=mode, **changes)
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())
    for _ in range(2):
        expected, got = plain.train_step(), compiled.train_step()
        torch.testing.assert_close(got.loss, expected.loss)
        torch.testing.assert_close(got.grad_norm, expected.grad_norm)
    for (name, p), q in zip(
        plain.model.named_parameters(), compiled.model.parameters(), strict=True
    ):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-7, msg=name)
    before = counters["stats"]["unique_graphs"]
    assert compiled.validate() == pytest.approx(plain.validate(), rel=1e-6)
    assert counters["stats"]["unique_graphs"] == before + 1  # of its own: no gradients
    compiled.train_step()
    assert counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU")
def test_inductor_trains(data, tmp_path, capsys):
    """The real thing, twice: the second run starts from the first one's code."""
    cache = tmp_path / "cache" / "code"
    argv = [*flags(data=data, steps=2, eval_every=2), "--compile", "blocks"]
    outputs = []
    for name in ("one", "two"):
        torch._dynamo.reset()
        with torch._inductor.utils.fresh_cache():
            out = tmp_path / name
            assert train.main([*argv, "--compile-cache", str(cache), "--out", str(out)]) == 0
        outputs.append(capsys.readouterr().out)
    assert "cache: miss" in outputs[0]
    assert "cache: hit" in outputs[1]
    assert train.main([*flags(data=data, steps=2), "--out", str(tmp_path / "plain")]) == 0
    for mine, plain in zip(metrics(tmp_path / "two"), metrics(tmp_path / "plain"), strict=True):
        assert mine == pytest.approx(plain, rel=1e-3)


# The command


def test_what_it_prints_and_keeps(data, tmp_path, capsys, compiler):
    compiler("eager")
    out = tmp_path / "run"
    argv = [*flags(data=data, steps=3, save_every=1, attention="dense"), "--out", str(out)]
    assert train.main([*argv, "--compile", "blocks"]) == 0
    printed = capsys.readouterr().out
    assert "compile blocks" in printed
    compiling, first = (printed.index(text) for text in ("compiling (--comp", "first step after "))
    assert compiling < first < printed.index("step 1/3  loss")
    assert " s, compiled: blocks, cache: not used\n" in printed
    stored = json.loads((out / "config.json").read_text())
    assert stored["train"]["compile"] == "blocks"
    names = load_checkpoint(out, ("model",)).tensors["model"]
    assert not any("_orig_mod" in name for name in names)
    assert generate.main([str(out), "--max-new-tokens", "2"]) == 0

    capsys.readouterr()
    assert train.main(["--out", str(out), "--resume"]) == 0  # finished: validates
    printed = capsys.readouterr().out
    assert "first validation after" in printed
    assert "note:" not in printed

    (out / "checkpoints" / "latest").write_text("step-000002\n")
    assert train.main(["--out", str(out), "--resume", "--compile", "none"]) == 0
    printed = capsys.readouterr().out
    assert (
        "note: resuming with compile blocks -> none: results may differ in the last bits" in printed
    )
    assert "compiling" not in printed
    assert json.loads((out / "config.json").read_text())["train"]["compile"] == "none"


def test_runs_from_before_the_flag(data):
    values = config_of(data).to_dict()
    del values["train"]["compile"]
    assert RunConfig.from_dict(values) == config_of(data)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--compile", "block"], "argument --compile: invalid choice: 'block'"),
        (
            ["--compile-cache", "code"],
            "--compile-cache: expected --compile blocks or --compile model with it, got neither",
        ),
        (
            ["--compile", "model", "--compile-cache", "/dev/null"],
            "--compile-cache: expected a file, got /dev/null, which is none",
        ),
        (
            ["--compile", "model", "--compile-cache", "/dev/null/code"],
            "--compile-cache: cannot use /dev/null/code: ",
        ),
        (["--compile", "model", "--compile-cache", "a\0b"], "expected arguments without NUL, got"),
    ],
)
def test_refused_before_anything_runs(data, tmp_path, capsys, argv, text):
    out = tmp_path / "run"
    assert text in error_of(capsys, [*flags(data=data), *argv, "--out", str(out)])
    assert not out.exists()


def test_the_configuration_checks_the_mode(data):
    values = config_of(data).to_dict()["train"]
    with pytest.raises(ConfigError, match="--compile: .* got 'modle'; did you mean 'model'?"):
        TrainConfig(**{**values, "compile": "modle"})


@pytest.mark.parametrize("mode", ["blocks", "model"])
def test_what_cannot_run_is_named_without_the_compilers_words(data, tmp_path, capsys, mode):
    argv = [*flags(data=data, steps=1), "--compile", mode, "--out", str(tmp_path / "run")]
    error = error_of(capsys, [*argv, "--backend", "fa2-dense"])
    assert error.startswith("backend='fa2-dense' asks for fa2-dense, which cannot run this: ")
    assert "user code" not in error
    assert not (tmp_path / "run" / "config.json").exists()


def _refusing(graph, inputs):
    raise RuntimeError("no code for this\nsecond line")


def test_a_compiler_that_fails_is_one_line(data, tmp_path, capsys, compiler):
    compiler(_refusing)
    argv = [*flags(data=data, steps=1, attention="dense"), "--out", str(tmp_path / "run")]
    error = error_of(capsys, [*argv, "--compile", "model"])
    assert error.startswith("--compile model: torch.compile failed: ")
    assert "no code for this" in error
    assert error.endswith("; train without it: --compile none")
    assert "second line" not in error


def test_a_full_device_stays_one():
    failure = torch._dynamo.exc.InternalTorchDynamoError("x")
    failure.__context__ = torch.OutOfMemoryError("y")
    assert training_compile.own_error(failure) is failure.__context__


# The file


@pytest.fixture
def artifacts(monkeypatch):
    """Stands in for torch's caches: what there is to save, and what was loaded."""
    state = {"new": [], "loaded": [], "readable": True}

    def save():
        return (state["new"].pop(0), None) if state["new"] else None

    def load(part):
        state["loaded"].append(part)
        return object() if state["readable"] else None

    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", save)
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", load)
    return state


def notes_of(path: Path) -> list[str]:
    notes = []
    CompileCache(path, CPU).load(notes.append)
    return notes


@pytest.fixture
def stored(tmp_path, artifacts):
    """A file of two parts, as a step and a validation leave it."""
    path = tmp_path / "folder" / "code"
    artifacts["new"] = [b"step\n", b"step and validation"]
    cache = CompileCache(path, CPU)
    for _ in range(3):
        cache.save(pytest.fail)
    return path


def test_every_part_comes_back(stored, artifacts):
    cache = CompileCache(stored, CPU)
    cache.load(pytest.fail)
    assert cache.loaded
    assert artifacts["loaded"] == [b"step\n", b"step and validation"]
    assert [path.name for path in stored.parent.iterdir()] == ["code"]


def test_a_path_that_is_none():
    with pytest.raises(ConfigError, match="--compile-cache: expected a path without NUL, got 'a"):
        CompileCache(Path("a\0b"), CPU)


def test_a_file_that_is_not_there_yet(tmp_path, artifacts):
    assert notes_of(tmp_path / "code") == []
    assert not list(tmp_path.iterdir())
    (tmp_path / "code").touch()
    assert notes_of(tmp_path / "code") == []


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data[:-1] + b"!"])
def test_a_damaged_file_is_named(stored, artifacts, change):
    stored.write_bytes(change(stored.read_bytes()))
    assert notes_of(stored) == [
        f"note: {stored}: damaged: its SHA-256 is not the one in its first line; compiling anew"
    ]
    assert artifacts["loaded"] == []


def _with_header(stored: Path, **changes: object) -> None:
    line, _, rest = stored.read_bytes().partition(b"\n")
    stored.write_bytes(json.dumps({**json.loads(line), **changes}).encode() + b"\n" + rest)


@pytest.mark.parametrize(
    "parts",
    [
        None,
        7,
        "ab",
        {},
        [7],
        [[1, 2]],
        [{"bytes": 1}],
        [{"bytes": "1", "sha256": ""}],
        [{"bytes": 1.5, "sha256": ""}],
        [{"bytes": True, "sha256": ""}],
        [{"bytes": -1, "sha256": ""}],
        [{"bytes": None, "sha256": None}],
    ],
)
def test_a_first_line_of_wrong_types(stored, artifacts, parts):
    _with_header(stored, parts=parts)
    (note,) = notes_of(stored)
    assert note.startswith(f"note: {stored}: damaged: ")
    assert note.endswith("; compiling anew")
    assert artifacts["loaded"] == []


@pytest.mark.parametrize(
    "end", [b"", b"[" * 100_000, b"1" * 5000, b" " * 2**21, b"\xff", b"\n" + b"x" * 100]
)
def test_a_damaged_first_line(stored, end):
    stored.write_bytes(stored.read_bytes()[:40] + end)
    (note,) = notes_of(stored)
    assert note == f"note: {stored}: damaged: its first line does not parse; compiling anew"


def test_a_file_that_goes_on(stored, artifacts):
    stored.write_bytes(stored.read_bytes() + b"!")
    assert notes_of(stored) == [
        f"note: {stored}: damaged: it goes on where its first line says that it ends; "
        "compiling anew"
    ]


@pytest.mark.parametrize("value", ["x" * 10**6, "\x1b[2J", {"a": ["b"] * 10**5}, None, 10**300])
def test_what_a_strangers_file_says_is_shown_short(stored, value):
    _with_header(stored, device=value)
    (note,) = notes_of(stored)
    assert len(note) < 600
    assert note.isprintable()


@pytest.mark.parametrize("name", ["torch", "python", "device"])
def test_a_foreign_file_is_named(stored, artifacts, monkeypatch, name):
    maker = compile_cache._maker(CPU)
    monkeypatch.setattr(compile_cache, "_maker", lambda device: {**maker, name: "another"})
    assert notes_of(stored) == [
        f"note: {stored}: written for {name} {maker[name]}, here is {name} another; compiling anew"
    ]
    assert artifacts["loaded"] == []


def test_a_file_that_torch_cannot_read(stored, artifacts):
    artifacts["readable"] = False
    assert notes_of(stored) == [f"note: {stored}: torch cannot read it; compiling anew"]


@pytest.mark.parametrize(
    "error",
    [
        EOFError("Ran out of input"),
        pickle.UnpicklingError("pickle data was truncated"),
        AttributeError("'int' object has no attribute"),
        ModuleNotFoundError("No module named 'torch.gone'"),
        RuntimeError("first line\nsecond line"),
        FileExistsError(17, "File exists", "/x"),
        KeyError("x" * 10**5),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_file_that_torch_cannot_use(stored, monkeypatch, error):
    def refuse(part):
        raise error

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", refuse)
    (note,) = notes_of(stored)
    assert note.startswith(f"note: {stored}: torch cannot use it (")
    assert type(error).__name__ in note
    assert note.endswith("); compiling anew")
    assert note.isprintable()
    assert len(note) < 600


@pytest.mark.parametrize("content", [None, b"", b"junk", pickle.dumps(7)])
def test_torchs_own_words_are_not_printed(tmp_path, capfd, content):
    """The real thing: a body that is none, and one whose one graph is none."""
    body = b"junk"
    if content is not None:
        graph = InductorCacheArtifact("key", content)
        serializer = AppendingByteSerializer(serialize_fn=_serialize_single_cache)
        serializer.extend([("inductor", [graph])])
        body = serializer.to_bytes()
    path = tmp_path / "code"
    path.write_bytes(compile_cache._join([body], compile_cache._maker(CPU)))
    with fresh_cache():
        notes = notes_of(path)
    if content is None or torch.__version__.startswith(("2.12.", "2.13.")):
        assert len(notes) == 1  # others look at a graph when they need it
    assert all(note.startswith(f"note: {path}: torch cannot ") for note in notes)
    assert capfd.readouterr() == ("", "")


def test_others_may_read_as_before(stored, artifacts):
    """What is new is private; what is there keeps its mode."""
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600
    for mode in (0o600, 0o640, 0o444):
        stored.chmod(mode)
        artifacts["new"] = [b"code"]
        cache = CompileCache(stored, CPU)
        cache.save(pytest.fail)
        assert stat.S_IMODE(stored.stat().st_mode) == mode


def test_a_wide_umask_makes_no_file_that_is_refused(tmp_path, artifacts):
    before = os.umask(0)
    try:
        artifacts["new"] = [b"code"]
        CompileCache(tmp_path / "code", CPU).save(pytest.fail)
    finally:
        os.umask(before)
    assert notes_of(tmp_path / "code") == []
    assert artifacts["loaded"] == [b"code"]


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_to_is_refused(stored, artifacts, mode):
    stored.chmod(mode)
    with pytest.raises(ConfigError, match=r"--compile-cache: expected a file that only you can wr"):
        CompileCache(stored, CPU)
    assert artifacts["loaded"] == []


def test_a_file_of_another_user_is_refused(stored, monkeypatch):
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    if mine == 0:  # root may change anything anyway
        CompileCache(stored, CPU)
        os.chown(stored, 12345, -1)
    with pytest.raises(ConfigError, match="; chmod go-w it if you trust it, or name another"):
        CompileCache(stored, CPU)


def test_a_link_stays_one(stored, tmp_path, artifacts):
    link = tmp_path / "link"
    link.symlink_to(stored)
    artifacts["new"] = [b"code"]
    cache = CompileCache(link, CPU)
    cache.load(pytest.fail)
    cache.save(pytest.fail)
    assert link.is_symlink()
    assert b"code" in stored.read_bytes()
    stored.chmod(0o666)
    with pytest.raises(ConfigError, match="expected a file that only you can write to"):
        CompileCache(link, CPU)


def test_what_killed_processes_left_is_removed(stored):
    folder = stored.parent
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine = [folder / f".code.{gone.pid}.tmp", folder / temporary_of(stored).name]
    others = [folder / name for name in (f".codes.{gone.pid}.tmp", ".code.tmp", "code.tmp")]
    for path in (*mine, *others):
        path.touch()
    CompileCache(stored, CPU)
    assert sorted(folder.iterdir()) == sorted([stored, *others])


def test_somebody_elses_file_is_left_alone(tmp_path, artifacts):
    path = tmp_path / "thesis.txt"
    path.write_text("all I have")
    cache, notes = CompileCache(path, CPU), []
    cache.load(notes.append)
    artifacts["new"] = [b"code"]
    cache.save(notes.append)
    assert notes == [f"note: {path} is no compile cache; compiling anew, and leaving it as it is"]
    assert path.read_text() == "all I have"


def test_a_disk_that_refuses_does_not_end_the_run(stored, artifacts, monkeypatch):
    before = stored.read_bytes()
    artifacts["new"] = [b"code"]
    cache, notes = CompileCache(stored, CPU), []

    def refuse(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compile_cache, "replace_atomically", refuse)
    cache.save(notes.append)
    assert notes == [f"note: could not write {stored}: No space left on device; continuing without"]
    assert stored.read_bytes() == before


@pytest.mark.parametrize(
    ("hits", "misses", "text"),
    [(0, 0, "not used"), (2, 0, "hit"), (0, 2, "miss"), (1, 2, "1 of 3 graphs hit")],
)
def test_what_the_caches_did(monkeypatch, hits, misses, text):
    counts = [(5, 7), (5 + hits, 7 + misses)]
    monkeypatch.setattr(compile_cache, "_counts", lambda: counts[0])
    use = CacheUse()
    counts.pop(0)
    assert str(use) == text
    assert use.since_last_call() == (hits, misses)
    assert use.since_last_call() == (0, 0)


@pytest.mark.parametrize(
    ("since", "loaded", "saves"),
    [((0, 0), False, 0), ((2, 0), False, 1), ((2, 0), True, 0), ((2, 1), True, 1)],
)
def test_the_file_is_written_when_it_lacks_something(tmp_path, monkeypatch, since, loaded, saves):
    compilation = training_compile.Compilation("model", CPU, str(tmp_path / "code"))
    calls = []
    monkeypatch.setattr(CompileCache, "save", lambda self, say: calls.append(say))
    monkeypatch.setattr(CacheUse, "since_last_call", lambda self: since)
    with compilation.session(lambda line: None):
        compilation._cache.loaded = loaded
        compilation.keep(print)
    assert calls == [print] * saves


def test_when_the_file_is_written(data, tmp_path, compiler, monkeypatch):
    """After the first step, and after each validation, the first of which compiles once more."""
    compiler("eager")
    saved, trainers = [], []
    original = Trainer.__init__

    def remember(self, *args):
        original(self, *args)
        trainers.append(self)

    monkeypatch.setattr(Trainer, "__init__", remember)
    monkeypatch.setattr(CompileCache, "save", lambda self, say: saved.append(trainers[0].step))
    monkeypatch.setattr(CacheUse, "since_last_call", lambda self: (0, 1))
    argv = [*flags(data=data, steps=4, eval_every=2, attention="dense"), "--compile", "blocks"]
    code, out = tmp_path / "code", tmp_path / "run"
    assert train.main([*argv, "--compile-cache", str(code), "--out", str(out)]) == 0
    assert saved == [1, 2, 4]


def _product(x):
    return x @ x


def test_torchs_own_artifacts_come_back(tmp_path):
    """Through Inductor, of a graph that needs no C++ compiler; twice, since torch reads back only
    the last of what one process saved in two goes."""
    from torch._inductor.utils import fresh_cache
    from torch.compiler._cache import CacheArtifactManager

    path = tmp_path / "code"
    for expected in ("miss", "hit"):
        torch._dynamo.reset()
        CacheArtifactManager.clear()
        with fresh_cache():
            cache = CompileCache(path, CPU)
            cache.load(pytest.fail)
            for size in (4, 5):
                use = CacheUse()
                torch.compile(_product, fullgraph=True, dynamic=False)(torch.ones(size, size))
                assert str(use) == expected
                if expected == "miss":
                    cache.save(pytest.fail)
    CacheArtifactManager.clear()
