"""The kernels of each branch of the ``compiled`` backend, told by the operators that run in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nsa.backends import load
from nsa.settings import Settings
from nsa.testing.inputs import Inputs
from nsa.tools.common.failures import failures, one_line
from nsa.tools.common.problems import run_branch, typical_trials
from nsa.tools.diagnose.choices import BranchChoice, Choice, choose

BACKEND = "compiled"
_ON_A_CPU = (500, 0, 12)
"""Tokens of the sequences there; what runs does not depend on the length."""
CPU_FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
"""The only dense kernel of PyTorch's that a branch can become: ``compiled`` delegates on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchKernel:
    """The kernel of one branch for one kind of input."""

    kind: str
    length: int
    """Tokens of the longest sequence."""
    branch: str
    backend: str
    """The one that runs it: ``compiled``, or the one that ``compiled`` delegates it to."""
    kernel: str
    """"dense", "triton" or "plain"; "failed" if it did not run."""
    detail: str
    """The same in words."""
    why: str
    """Why it is delegated to another backend, or an empty string."""


def branch_kernels(
    device: torch.device, settings: Settings
) -> tuple[tuple[BranchKernel, ...], str | None]:
    """Run every branch forward once; or say why ``compiled`` cannot run here."""
    found: list[BranchKernel] = []
    refusal = None
    trials = typical_trials(device)
    if device.type == "cpu":
        trials = [replace(t, lengths=_ON_A_CPU if t.packed else (sum(_ON_A_CPU),)) for t in trials]
    for trial in trials:
        choice = choose(trial, BACKEND, settings)
        if choice.backend is None:
            refusal = choice.reason
            continue
        inputs = trial.inputs()
        for branch in choice.branches:
            try:
                kernel, detail = classify(branch.backend, _operators(choice, branch, inputs))
            except failures() as failure:
                kernel, detail = "failed", one_line(failure)
            found.append(
                BranchKernel(
                    kind=choice.kind,
                    length=choice.length,
                    branch=branch.branch,
                    backend=branch.backend,
                    kernel=kernel,
                    detail=detail,
                    why=branch.why,
                )
            )
    return tuple(found), None if found else refusal


def classify(backend: str, operators: Iterable[str]) -> tuple[str, str]:
    """Tell a branch's kernel from the operators that ran in it, in a word and in words."""
    operators = sorted(operators)
    if CPU_FLASH in operators:
        return "dense", "dense kernel: PyTorch's flash attention for CPUs"
    own = [operator for operator in operators if operator.startswith("nsa::")]
    if backend != BACKEND or not own:
        return "plain", "plain PyTorch"
    return "triton", f"Triton kernel: {', '.join(own)}"


class _Seen(TorchDispatchMode):
    """Notes the name of every operator that runs, inside this library's own operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.add(func.name())
        if func.namespace != "nsa":
            return func(*args, **(kwargs or {}))
        # called as usual, its inside would run without this mode
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        key = getattr(torch._C.DispatchKey, device.upper())
        with self:
            return func.redispatch(torch._C.DispatchKeySet(key), *args, **(kwargs or {}))


@torch.no_grad()
def _operators(choice: Choice, branch: BranchChoice, inputs: Inputs) -> set[str]:
    """The operators that a branch calls in a forward."""
    options = {}
    if branch.branch == "select":
        [compressed] = [other for other in choice.branches if other.branch == "compressed"]
        _, options["lse"] = run_branch(load(compressed.backend), "compressed", inputs)
    with _Seen() as seen:
        run_branch(load(branch.backend), branch.branch, inputs, **options)
    return seen.names
