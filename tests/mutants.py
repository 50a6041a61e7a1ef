"""Does a test turn red for every small change of the code? Mutation testing with mutmut.

    python -m tests.mutants                  # everything
    python -m tests.mutants 'nsa.module.*'   # the mutants that a pattern names
    mutmut show NAME                         # afterwards: one mutant's diff

``[tool.mutmut]`` in pyproject.toml says which files are changed and which tests judge; mypy judges
first. A mutant that survives is an error unless ``tests/mutants.txt`` says why it may.
"""

from __future__ import annotations

import fnmatch
import importlib
import os
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import libcst as cst
import mutmut.__main__ as mutmut
from hypothesis import Phase, settings
from hypothesis.internal.conjecture import providers
from libcst.matchers import Arg, Attribute, Call, Name, matches
from mutmut.configuration import config
from mutmut.mutation import file_mutation
from mutmut.mutation.data import MutantLineSpans, SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.file_mutation import (
    FailedTypeCheckMutant,
    MutatedMethodLocation,
    MutationVisitor,
    group_by_path,
)
from mutmut.runners.harness import PytestRunner
from mutmut.state import state
from mutmut.stats import status_by_exit_code
from mutmut.type_checking import run_type_checker
from mutmut.utils.file_utils import change_cwd, walk_mutatable_files
from mutmut.utils.format_utils import get_mutant_name
from mutmut.workers.isolation import ForkServerRunner, MutantResult

EXPLAINED = Path(__file__).with_suffix(".txt")
JUDGES = {
    "nsa.reference.unavailable": ("tests/backends/dispatch/",),
    "nsa.reference": ("tests/reference/", "tests/api/test_defaults.py"),
    "nsa.backends": ("tests/backends/", "tests/core/", "tests/api/", "tests/cache/"),
    "nsa.training": ("tests/training/", "tests/tools/"),
    "nsa": ("tests/api/", "tests/backends/", "tests/core/", "tests/cache/"),
}
"""Whose tests must notice a change there, the first that fits: not whoever happens to run it."""
STRICT = Arg(keyword=Name("strict"))
SIGNAL = Call(func=Attribute(Name("os"), Name("kill")))
SKIPPED = 34
ERROR = 255
"""Of pytest or mutmut itself, which takes it for a timeout."""
CAUGHT = ("killed", "caught by type check", "timeout", "segfault", "suspicious")
"""The last: its tests died in another way."""


def explained() -> dict[str, str]:
    """Mutants that may survive, and why: indented lines under the sentence that explains them."""
    found, why = {}, ""
    for line in EXPLAINED.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            found[line.strip()] = why
        elif line and not line.startswith("#"):
            why = line
    return found


def names_of(description: str) -> set[str]:
    """What the list may call a mutant: itself, or with "…" every change of those lines."""
    return {description, f"{description.partition(' -> ')[0]} -> …"}


def results(patterns: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Name, status and description of every mutant that was asked for."""
    for path in walk_mutatable_files():
        data = SourceFileMutationData(path=path)
        data.load()
        for name, code in data.exit_code_by_key.items():
            if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                status = "error" if code == ERROR else status_by_exit_code[code]
                yield name, status, describe(name, path)


def describe(name: str, path: Path) -> str:
    """The function and its changed lines, which outlive a change elsewhere in the file."""
    function = name.partition("__mutmut")[0].replace("xǁ", "").replace("ǁ", ".").replace(".x_", ".")
    lines = get_diff_for_mutant(name, path=path).splitlines()[2:]
    old, new = (
        " ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+"
    )
    return f"{function}: {old} -> {new}"


def main(patterns: list[str]) -> int:
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # mypy
    del sys.modules["tests"]  # those of the copy are to be imported: they start processes there
    mutmut.cli(["run", *patterns], standalone_mode=False)
    reasons, counts, unexplained = explained(), dict[str, int](), list[str]()
    known = set()
    for name, status, description in results(patterns):
        known |= names_of(description)
        missed = status not in CAUGHT
        may = names_of(description) & reasons.keys()
        verdict = "explained" if missed and may else status
        counts[verdict] = counts.get(verdict, 0) + 1
        if verdict == status and missed:
            unexplained.append(f"{status:10s} {name}\n  {description}")
    gone = [] if patterns else [line for line in reasons if line not in known]
    print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    for line in unexplained:
        print(line)
    for line in gone:
        print(f"{EXPLAINED.name} explains a mutant that is no more: {line}")
    return 1 if unexplained or gone else 0


# What mutmut 3.8 lacks


def _caught_by_types() -> dict[str, FailedTypeCheckMutant]:
    """What mypy's errors lie in, by the table of lines; mutmut's own way takes minutes."""
    with change_cwd("mutants"):
        errors = group_by_path(run_type_checker(config().type_check_command))
    found = {}
    for path in walk_mutatable_files():
        spans = MutantLineSpans.load(path)
        assert spans is not None
        starts = sorted((span.start, name) for name, span in spans.span_by_function_name.items())
        for error in errors.get(Path.cwd() / "mutants" / path, ()):
            start, name = starts[bisect_right(starts, (error.line_number, "~")) - 1]
            end = spans.span_by_function_name[name].end
            if start <= error.line_number <= end and not name.endswith("_orig"):
                key = get_mutant_name(path, name)
                place = MutatedMethodLocation(path, name, start, end)
                found[key] = FailedTypeCheckMutant(place, key, error)
    return found


def _submit(
    self: ForkServerRunner, mutant_name: str, tests: list[str], limit: float, estimate: float
) -> None:
    """Its judges alone run, those of its own file and folder before the fastest of the others.

    None for one that is explained: all of its tests would run, and take half the time of the whole.
    """
    path = mutant_name.rpartition(".")[0].replace(".", "/")
    path = f"{path}.py" if Path(f"{path}.py").exists() else f"{path}/__init__.py"
    if names_of(describe(mutant_name, Path(path))) & explained().keys():
        self._no_tests_results.append(MutantResult(mutant_name, SKIPPED, 0.0))
        return
    module = mutant_name.replace(".x_", ".")
    judges = next(names for part, names in JUDGES.items() if module.startswith(part))
    durations, seconds = state().duration_by_test, Counter[str]()
    tests = [test for test in tests if test.startswith(judges)]
    for test in tests:
        seconds[_file(test)] += durations[test]
    nearness = {
        file: (-_shared(file, module), next(i for i, j in enumerate(judges) if file.startswith(j)))
        for file in seconds
    }
    # file by file, for the sake of what the tests of one share
    tests.sort(
        key=lambda test: (
            nearness[_file(test)],
            seconds[_file(test)],
            _file(test),
            durations[test],
        )
    )
    estimate = seconds.total()
    limit = (estimate + config().timeout_constant) * config().timeout_multiplier * 2
    _submit_as_told(self, mutant_name, tests, round(limit), estimate)


def _file(test: str) -> str:
    return test.partition("::")[0]


def _shared(file: str, module: str) -> int:
    """How many folders and names a file of tests has in common with a module, from the top."""
    ours = Path(file.replace("test_", "")).with_suffix("").parts[1:]
    pairs = zip(ours, module.split(".")[1:], strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _warm_up(self: PytestRunner) -> None:
    """What a training step imports late is there before the forks."""
    _collect(self)
    importlib.import_module("torch._dynamo")
    importlib.import_module("nsa.tools.train.flags").train_parser()


def _execute(self: PytestRunner, params: list[str], **options: Any) -> int:
    """A parser reads the source of its classes, here a long one, once in a process."""
    cli = importlib.import_module("nsa.tools.common.cli")
    assert Path("nsa").resolve() in Path(cli.__file__ or "").parents, cli
    if not hasattr(cli._docs_of_fields, "cache_info"):
        cli._docs_of_fields = cache(cli._docs_of_fields)
    if "plugins" in options:
        options["plugins"].append(_WithSetup())
    return _execute_pytest(self, params, **options)


class _WithSetup:
    """Counts what a test sets up to its time, too."""

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        if call.when == "setup" and item.nodeid in state().duration_by_test:
            state().duration_by_test[item.nodeid] += call.duration


def _skips(self: MutationVisitor, node: cst.CSTNode) -> bool:
    """Decorated functions are changed too. Not so ``strict=True``, a check of our own sums; text of
    several words, which a test could only repeat; and signals, which would end other processes."""
    if isinstance(node, cst.FunctionDef) and node.decorators:
        return False
    if isinstance(node, cst.SimpleString) and " " in node.value:
        return True
    return matches(node, STRICT) or matches(node, SIGNAL) or _skip(self, node)


def _removes(self: MutationVisitor, node: cst.CSTNode, mutated: cst.CSTNode) -> bool:
    arguments = node.args if isinstance(node, cst.Call) else ()
    kept = mutated.args if isinstance(mutated, cst.Call) else arguments
    lost = any(matches(argument, STRICT) and argument not in kept for argument in arguments)
    return lost or _remove(self, node, mutated)


def _decorated_once(function: cst.FunctionDef, *args: Any, **kwargs: Any) -> Any:
    """The decorator of a function stays on its trampoline; copies are called as they are."""
    declared, (trampoline, *copies), assigned, names = _arrange(function, *args, **kwargs)
    if not any(matches(d.decorator, Name("classmethod")) for d in function.decorators):
        copies = [copy.with_changes(decorators=()) for copy in copies]
    return declared, [trampoline, *copies], assigned, names


# Hypothesis draws what numbers it reads in the code, too: every mutant would get other examples.
providers.is_local_module_file = lambda path: False
# One that fails is enough; to look for the smallest takes a minute.
settings.register_profile(
    "mutants",
    derandomize=True,
    max_examples=25,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
)
_submit_as_told = ForkServerRunner.submit
_collect = PytestRunner.warm_up
_execute_pytest = PytestRunner.execute_pytest
_skip = MutationVisitor._skip_node_and_children
_remove = MutationVisitor._removes_ignored_code
_arrange = file_mutation.function_trampoline_arrangement
mutmut.filter_mutants_with_type_checker = _caught_by_types
ForkServerRunner.submit = _submit  # type: ignore[method-assign]
PytestRunner.warm_up = _warm_up  # type: ignore[method-assign]
PytestRunner.execute_pytest = _execute  # type: ignore[method-assign]
MutationVisitor._skip_node_and_children = _skips  # type: ignore[method-assign]
MutationVisitor._removes_ignored_code = _removes  # type: ignore[method-assign]
file_mutation.function_trampoline_arrangement = _decorated_once

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
