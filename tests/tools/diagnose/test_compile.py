"""`diagnose --compile`: graphs, breaks and recompiles; compilers, caches, branches, variables.

Counts are asked of the cheapest compiler and of few lengths; what goes wrong is made to, in a tiny
function in place of the model.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from nsa.backends import Resolution
from nsa.backends.protocol import STEPS
from nsa.config import NSAConfig
from nsa.errors import BackendUnavailable
from nsa.settings import Settings, use_settings
from nsa.tools.common import problems as trials
from nsa.tools.common.machine import COMPILE_SWITCHES, collect_machine
from nsa.tools.diagnose import __main__ as diagnose
from nsa.tools.diagnose.advice import advice
from nsa.tools.diagnose.choices import choose
from nsa.tools.diagnose.compile import branches as compile_kernels
from nsa.tools.diagnose.compile import report as compile_report
from nsa.tools.diagnose.compile import trials as compile_trials
from nsa.tools.diagnose.compile.branches import branch_kernels, classify
from nsa.tools.diagnose.compile.toolchain import UNKNOWN, collect_toolchain, read_variables
from nsa.tools.diagnose.compile.trials import (
    CompileTrial,
    Recompile,
    compile_trial,
    lengths,
    plan_trials,
)
from tests.support.diagnosing import run, run_json

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
REGULAR, PACKED = trials.small_trials(CPU)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No variables of the user's, and no graphs of other tests."""
    for name in (*COMPILE_SWITCHES, "CC", "TORCH_LOGS", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def untried(monkeypatch):
    """Compiles nothing; the results of trials, by backend and kind, and what was asked of them."""
    results, asked = {}, []

    def trial(backend, trial, compiler, say):
        asked.append((backend, trial.kind, compiler))
        say("17 tokens")
        result = results.get((backend, trial.kind), {})
        if isinstance(result, BaseException):
            raise result
        good = {"graphs": 4, "breaks": (), "recompiles": (), "failure": None, "seconds": 1.5}
        return CompileTrial(backend=backend, kind=trial.kind, **(good | result))

    monkeypatch.setattr(compile_report, "compile_trial", trial)
    monkeypatch.setattr(compile_report, "branch_kernels", lambda device, settings: ((), None))
    results["asked"] = asked
    return results


def try_function(monkeypatch, function, compiler="eager", dynamic=False, at=((40,), (41, 42))):
    """A trial of a function of one tensor in place of the model's loss."""

    def step(backend, trial, compiler, *, fullgraph=True):
        options = {"fullgraph": fullgraph, "dynamic": dynamic, "backend": compiler}
        compiled = torch.compile(function, **options)
        return lambda length: compiled(torch.ones(length))

    monkeypatch.setattr(compile_trials, "_step", step)
    monkeypatch.setattr(compile_trials, "lengths", lambda config: at)
    trial = compile_trial("sdpa", REGULAR, compiler, lambda detail: None)
    return trial, list(compile_trials.faults(trial))


# What a backend compiles to


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_backend_is_one_graph(monkeypatch):
    monkeypatch.setattr(compile_trials, "lengths", lambda config: ((64,), (100,)))
    said = []
    found = compile_trial("sdpa", PACKED, "eager", said.append)
    assert (found.failure, found.breaks, found.recompiles, found.graphs) == (None, (), (), 1)
    assert found.ok
    assert found.seconds > 0
    assert said == [f"sdpa, packed float32: T = {length}, eager" for length in (64, 100)]


def test_a_graph_that_serves_no_other_length(monkeypatch):
    trial, faults = try_function(monkeypatch, lambda x: x * 2)
    assert (trial.graphs, trial.failure, trial.breaks) == (3, None, ())
    assert [recompile.length for recompile in trial.recompiles] == [41, 42]
    assert "size mismatch at index 0. expected 40, actual 41" in trial.recompiles[0].reason
    # of the newest graph, which is the most general one
    assert "size mismatch at index 0. expected 41, actual 42" in trial.recompiles[1].reason
    assert faults[0].startswith("compile, sdpa, regular float32: recompiled at 41 tokens: 0/0: ")
    assert len(faults) == 2
    assert not trial.ok


def test_a_recompile_for_one_length_serves_the_next(monkeypatch):
    """Counted is what torch would do, not every length that differs from the warm-up."""
    trial, _ = try_function(monkeypatch, lambda x: x * 2, dynamic=None)
    assert [recompile.length for recompile in trial.recompiles] == [41]
    assert trial.graphs == 2


def test_a_graph_break(monkeypatch):
    def broken(x):
        x = x * 2
        torch._dynamo.graph_break()
        x = x.sin()
        torch._dynamo.graph_break()
        return x + 1

    for _ in range(2):  # breaks of before are not counted
        trial, faults = try_function(monkeypatch, broken)
        assert len(trial.breaks) == 2
        assert trial.graphs == 0
        [fault] = faults
        assert fault.startswith("compile, sdpa, regular float32: graph break: Call to `torch._dyna")
        assert "User-inserted graph break" in fault
        assert "Hint" not in fault


def _refusing(graph, inputs):
    raise ValueError("no code for this\nsecond line")


def test_a_compiler_that_fails(monkeypatch):
    trial, faults = try_function(monkeypatch, lambda x: x * 2, compiler=_refusing)
    assert (trial.graphs, trial.breaks) == (0, ())
    assert faults == [f"compile, sdpa, regular float32: {trial.failure}"]
    assert trial.failure == "backend='_refusing' raised: ValueError: no code for this"


def _complaining(graph, inputs):
    raise RuntimeError(
        "C++ compile error\nCommand:\ng++\nOutput:\na.cpp:1:2: fatal error: no Python.h"
    )


def test_what_a_compiler_of_cpp_says(monkeypatch):
    trial, _ = try_function(monkeypatch, lambda x: x * 2, compiler=_complaining)
    assert trial.failure.endswith("C++ compile error: a.cpp:1:2: fatal error: no Python.h")


@pytest.mark.parametrize("length", [40, 41])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("misaligned")])
def test_a_graph_that_does_not_run(monkeypatch, error, length):
    """In the warm-up and after it; once is enough."""
    left = [error]

    def fails(graph, inputs):
        def run(*args):
            if left and any(isinstance(x, torch.Tensor) and len(x) == length for x in args):
                raise left.pop()
            return graph.forward(*args)

        return run

    trial, [fault] = try_function(monkeypatch, lambda x: x * 2, compiler=fails, dynamic=True)
    assert fault == f"compile, sdpa, regular float32: {trial.failure}"
    assert str(error.args[-1]) in fault
    assert (trial.graphs, trial.recompiles) == (1, ())


def test_an_error_of_this_library_is_told_without_the_compilers_words(monkeypatch):
    @torch.compiler.assume_constant_result  # as the choice of a backend is in a trace
    def refuse():
        raise BackendUnavailable("backend='sdpa' cannot run this")

    def choose(x):
        refuse()
        return x * 2

    trial, _ = try_function(monkeypatch, choose)
    assert trial.failure == "backend='sdpa' cannot run this"


def test_nothing_compiled_is_no_success(monkeypatch):
    with torch.compiler.set_stance("force_eager"):
        trial, [fault] = try_function(monkeypatch, lambda x: x * 2, at=((40,), ()))
    assert fault.endswith("nothing was compiled")
    assert not trial.ok


def test_the_lengths():
    """T = 1, no block, one, and T >= 2·l', past which one graph serves all (README)."""
    assert lengths(NSAConfig()) == ((1, 31, 32, 128), (33, 100, 1000))


# What is compiled


def test_what_can_run_is_compiled(capsys, no_parity, untried):
    code, found = run_json(capsys, "--compile", "eager")
    assert code == 0
    available = [row["name"] for row in found["backends"] if row["available"]]
    tried = [name for name in available if name != "reference"]
    assert "sdpa" in tried
    kinds = ("regular float32", "packed float32")
    assert untried["asked"] == [(name, kind, "eager") for name in tried for kind in kinds]
    for row in found["compile"]["trials"]:
        assert (row["graphs"], row["recompiles"], row["failure"]) == (4, [], None)
    assert found["compile"]["toolchain"]["torch"] == torch.__version__
    left_out = found["compile"]["left_out"]
    assert "the oracle" in left_out["reference"]
    assert set(left_out) == {row["name"] for row in found["backends"]} - set(tried)


def test_a_backend_that_takes_one_kind_of_input():
    with use_settings(fa2_provider="math"):
        planned, left_out = plan_trials(CPU, "fa2-dense")
    assert [(name, trial.kind) for name, trial in planned] == [("fa2-dense", "regular float32")]
    assert left_out == {}


@pytest.mark.parametrize(
    ("argv", "compiler"), [(["--compile"], "aot_eager"), (["--compile", "inductor"], "inductor")]
)
def test_the_compiler(capsys, no_parity, untried, monkeypatch, argv, compiler):
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++")
    assert run(capsys, *argv, "--backend", "sdpa")[0] == 0
    assert {asked[2] for asked in untried["asked"]} == {compiler}
    assert {asked[0] for asked in untried["asked"]} == {"sdpa"}


def test_a_wrong_compiler_is_one_line(capsys):
    assert diagnose.main(["--compile", "induktor"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: --compile: expected one of the known names, got 'induktor'; did")
    assert "did you mean 'inductor'?" in err
    assert err.count("\n") == 1


# What it prints


def test_without_the_flag_there_is_a_hint(capsys, no_parity, untried):
    out = run(capsys)[1]
    assert "torch.compile: --compile shows graphs, recompiles" in out
    assert "TORCH_LOGS" not in out
    assert untried["asked"] == []
    assert run_json(capsys)[1]["compile"] is None


def test_tables_for_people(capsys, no_parity, untried, monkeypatch):
    monkeypatch.setattr(compile_report, "branch_kernels", branch_kernels)
    monkeypatch.setenv("TORCH_LOGS", "output_code")
    code, out, err = run(capsys, "--compile", "eager", "--backend", "sdpa")
    assert code == 0
    for text in (
        "TORCH_LOGS=graph_breaks,recompiles",  # whole: it is there to be copied
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1",
        "output_code",
        "Inductor's cache",
        "--compile-cache FILE",
        "left to sdpa on a CPU: plain PyTorch",
        "warm-up: 1, 15, 16 and 64 tokens",
        "torch.compile: 2 of 2 without graph breaks or recompiles, through eager",
    ):
        assert text in out
    assert "--compile shows" not in out
    assert err.splitlines()[:2] == [
        "compiling 1 of 2: sdpa, regular float32, eager",
        "compiling 2 of 2: sdpa, packed float32, eager",
    ]


def test_what_is_wrong_is_exit_code_1(capsys, no_parity, untried):
    """One that fails keeps no other from being tried."""
    untried["sdpa", "regular float32"] = {"failure": "no graph", "graphs": 0}
    untried["sdpa", "packed float32"] = {
        "graphs": 5,
        "recompiles": (Recompile(length=1000, reason="0/0: L['x'] == 4"),),
    }
    code, found = run_json(capsys, "--compile", "--backend", "sdpa")
    assert code == 1
    assert found["problems"] == [
        "compile, sdpa, regular float32: no graph",
        "compile, sdpa, packed float32: recompiled at 1,000 tokens: 0/0: L['x'] == 4",
    ]
    code, out, _ = run(capsys, "--compile", "--backend", "sdpa")
    assert code == 1
    assert "failed" in out
    assert "torch.compile: 0 of 2 without" in out
    assert "- compile, sdpa, regular float32: no graph" in out


def test_ctrl_c(capsys, no_parity, untried):
    untried["sdpa", "packed float32"] = KeyboardInterrupt()
    code, out, err = run(capsys, "--compile", "--backend", "sdpa")
    assert (code, out) == (130, "")
    assert err.endswith("interrupted\n")


# Compilers, caches, variables


@pytest.mark.parametrize("switch", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_switched_off(capsys, no_parity, untried, monkeypatch, switch):
    monkeypatch.setenv(switch, "1")
    code, found = run_json(capsys, "--compile", "--backend", "sdpa")
    assert code == 1
    assert untried["asked"] == []
    [problem] = found["problems"]
    assert problem.startswith(f"compile: {switch}=1 turns torch.compile off")
    assert found["compile"]["toolchain"]["off"] == f"{switch}=1"
    out = run(capsys, "--compile", "--backend", "sdpa")[1]
    assert "torch.compile: nothing was compiled" in out


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("TORCHDYNAMO_DISABLE", "=1: torch.compile compiles nothing"),
        ("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "=1: everything is compiled anew"),
        ("TRITON_INTERPRET", "=1: Triton kernels run in Python"),
    ],
)
def test_a_switch_is_advised_against_with_and_without_the_flag(monkeypatch, name, text):
    def advised():
        return [line for line in advice(collect_machine(), (), Settings(), None) if name in line]

    assert advised() == []
    monkeypatch.setenv(name, "0")
    assert advised() == []
    monkeypatch.setenv(name, "1")
    [line] = advised()
    assert line.startswith(f"{name}{text}")


def toolchain(device=CPU, triton="3.6.0"):
    return collect_toolchain(device, read_variables(), triton)


def test_no_compiler_of_cpp(capsys, no_parity, untried, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert toolchain().refusal.startswith("torch found no C++ compiler: install g++")
    code, found = run_json(capsys, "--compile", "inductor", "--backend", "sdpa")
    assert code == 1
    assert found["problems"] == [f"compile: {toolchain().refusal}"]
    assert untried["asked"] == []
    # the others need none
    assert run(capsys, "--compile", "eager", "--backend", "sdpa")[0] == 0
    assert len(untried["asked"]) == 2


def test_a_gpu_needs_triton_and_a_compiler_of_c(monkeypatch):
    found = toolchain(CUDA, None)
    assert "triton is not installed" in found.refusal
    assert found.triton_cache is None
    monkeypatch.setattr(shutil, "which", lambda name: name if name == sys.executable else None)
    assert "found no C compiler" in toolchain(CUDA).refusal
    monkeypatch.setenv("CC", sys.executable)
    found = toolchain(CUDA)
    assert found.refusal is None
    assert found.compiler.startswith("triton 3.6.0 and Python 3.")


def test_a_torch_that_keeps_it_elsewhere(monkeypatch):
    for name in ("cpp_builder", "runtime.cache_dir_utils"):
        monkeypatch.setitem(sys.modules, f"torch._inductor.{name}", None)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    found = toolchain()
    assert (found.compiler, found.refusal) == (UNKNOWN, None)
    assert (found.inductor_cache.path, found.inductor_cache.note) == (None, UNKNOWN)


def test_caches_on_disk(monkeypatch, tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("one", "deep/two"):
        (tmp_path / name).write_bytes(bytes(1000))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "one").chmod(0o755)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "one" / "none"))
    found = toolchain()
    inductor, triton = found.inductor_cache, found.triton_cache
    assert (inductor.path, inductor.files, inductor.bytes) == (str(tmp_path), 2, 2000)
    assert inductor.complete
    assert "TORCHINDUCTOR_CACHE_DIR names one that lasts" in inductor.note  # it is under /tmp
    assert (triton.files, triton.note) == (
        0,
        "cannot be written to: name another in TRITON_CACHE_DIR",
    )
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert toolchain().inductor_cache.note.startswith("cannot be written to")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", "/somewhere")
    assert toolchain().triton_cache.path == str(Path("/somewhere/.triton/cache"))


def test_looking_at_the_caches_makes_none(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    toolchain()
    assert list(tmp_path.iterdir()) == []


def test_a_large_cache_is_not_counted_to_the_end(monkeypatch, tmp_path):
    monkeypatch.setattr("nsa.tools.diagnose.compile.toolchain._SECONDS", -1.0)
    for name in ("a/b", "c/d"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert not toolchain().inductor_cache.complete


def test_caches_that_are_off(monkeypatch):
    from torch._inductor import config

    assert toolchain().caches == "on"
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    with config.patch(force_disable_caches=True):
        assert toolchain().caches == "off: TORCHINDUCTOR_FORCE_DISABLE_CACHES is set"


def test_variables_with_their_values(capsys, no_parity, untried, monkeypatch):
    monkeypatch.setenv("TORCH_LOGS", "recompiles")
    _, found = run_json(capsys, "--compile", "--backend", "sdpa")
    values = {row["assignment"]: row["value"] for row in found["compile"]["variables"]}
    assert values["TORCH_LOGS=graph_breaks,recompiles"] == "recompiles"
    assert values["TORCHDYNAMO_DISABLE=1"] is None


# What each branch of `compiled` becomes


@pytest.mark.parametrize(
    ("backend", "operators", "kernel", "detail"),
    [
        ("sdpa", {"aten::_scaled_dot_product_flash_attention_for_cpu"}, "dense", "for CPUs"),
        ("compiled", {"nsa::window_attention", "aten::mm"}, "triton", "nsa::window_attention"),
        ("compiled", {"aten::mm", "aten::softmax"}, "plain", "plain PyTorch"),
        ("sdpa", {"nsa::select_blocks", "aten::mm"}, "plain", "plain PyTorch"),
    ],
)
def test_what_a_branch_is(backend, operators, kernel, detail):
    found = classify(backend, operators)
    assert found[0] == kernel
    assert detail in found[1]


def test_branches_on_a_cpu():
    rows, refusal = branch_kernels(CPU, Settings())
    if refusal is not None:
        pytest.skip(refusal)
    found = {(row.kind, row.branch): row for row in rows}
    assert len(found) == len(rows) == 2 * len(STEPS)
    for kind in ("regular float32", "packed float32"):
        for branch in ("window", "selected"):
            row = found[kind, branch]
            assert (row.backend, row.kernel, row.why) == ("sdpa", "plain", "on a CPU")
    compressed = found["regular float32", "compressed"]
    assert (compressed.backend, compressed.kernel) == ("sdpa", "dense")


def test_operators_inside_operators_are_seen():
    """A kernel that is chosen inside one of this library's operators is found all the same."""
    choice = choose(REGULAR, "sdpa", Settings())
    [select] = [branch for branch in choice.branches if branch.branch == "select"]
    seen = compile_kernels._operators(choice, select, REGULAR.inputs())
    assert "nsa::select_blocks" in seen
    assert len(seen) > 10


def test_a_branch_that_fails(capsys, no_parity, untried, monkeypatch):
    def fail(choice, branch, inputs):
        raise RuntimeError("no kernel\nimage")

    resolution = Resolution("compiled", "", ("compiled",) * len(STEPS), ())
    monkeypatch.setattr(trials, "resolve", lambda backend, **problem: resolution)
    monkeypatch.setattr(compile_kernels, "_operators", fail)
    monkeypatch.setattr(compile_report, "branch_kernels", branch_kernels)
    code, found = run_json(capsys, "--compile", "--backend", "sdpa")
    assert code == 1
    assert found["problems"][0] == (
        "compile, regular float32: compressed of compiled failed: RuntimeError: no kernel image"
    )
    assert found["compile"]["branches"][0]["kernel"] == "failed"


def test_no_branches_where_compiled_cannot_run(capsys, no_parity, untried, monkeypatch):
    def refuse(backend, **problem):
        if backend == "compiled":
            raise BackendUnavailable("compiled needs a C++ compiler")
        return real(backend=backend, **problem)

    real = trials.resolve
    monkeypatch.setattr(trials, "resolve", refuse)
    monkeypatch.setattr(compile_report, "branch_kernels", branch_kernels)
    code, out, _ = run(capsys, "--compile", "--backend", "sdpa")
    assert code == 0  # nobody asked for it
    assert "No branches of compiled:" in out
    assert "compiled needs a C++ compiler" in out


@pytest.mark.gpu
def test_on_a_gpu(capsys):
    """The quickest compiler; Triton kernels, none of it left to plain PyTorch."""
    code = diagnose.main(
        ["--compile", "eager", "--backend", "compiled", "--device", "cuda", "--json"]
    )
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert code == 0
    assert {row["graphs"] for row in found["compile"]["trials"]} <= {1, 2, 3, 4}
    rows = found["compile"]["branches"]
    assert {row["kernel"] for row in rows} == {"triton"}
