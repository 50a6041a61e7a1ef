"""What runs each branch of the ``compiled`` backend: the operators that run in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nsa.backends import load
from nsa.backends.dispatch import delegated
from nsa.errors import BackendUnavailable
from nsa.settings import Settings
from nsa.testing.inputs import Inputs
from nsa.tools.common.failures import failures, one_line
from nsa.tools.common.problems import Trial, typical_trials
from nsa.tools.diagnose.choices import resolved

BACKEND = "compiled"
_ON_A_CPU = (500, 0, 12)
"""Tokens of the sequences there; what runs does not depend on the length."""
_DENSE = (
    ("_scaled_dot_product_flash_attention_for_cpu", "PyTorch's flash attention for CPUs"),
    ("_scaled_dot_product_flash_attention", "PyTorch's FlashAttention-2"),
    ("_scaled_dot_product_efficient_attention", "PyTorch's memory-efficient attention"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchKernel:
    """What one branch becomes for one kind of input."""

    kind: str
    length: int
    """Tokens of the longest sequence."""
    branch: str
    backend: str
    """Which runs it: ``compiled``, or the one that ``compiled`` leaves it to."""
    kernel: str
    """"dense", "triton" or "plain"; "failed" if it did not run."""
    detail: str
    """The same in words."""
    why: str
    """Why it is left to another backend, or an empty string."""


def branch_kernels(
    device: torch.device, settings: Settings
) -> tuple[tuple[BranchKernel, ...], str | None]:
    """Runs every branch forward once; or says why ``compiled`` cannot run here."""
    found: list[BranchKernel] = []
    refusal = None
    for trial in _trials(device):
        try:
            per_branch = resolved(trial, BACKEND).per_branch
        except BackendUnavailable as error:
            refusal = str(error)
            continue
        left = delegated(BACKEND, trial.problem, settings)
        inputs = trial.inputs()
        for branch, backend in per_branch.items():
            try:
                kernel, detail = classify(backend, _operators(per_branch, branch, inputs))
            except failures() as failure:
                kernel, detail = "failed", one_line(failure)
            found.append(
                BranchKernel(
                    kind=trial.kind,
                    length=trial.problem.length,
                    branch=branch,
                    backend=backend,
                    kernel=kernel,
                    detail=detail,
                    why=left.get(branch, ""),
                )
            )
    return tuple(found), None if found else refusal


def _trials(device: torch.device) -> list[Trial]:
    trials = typical_trials(device)
    if device.type == "cpu":
        return [replace(trial, lengths=_ON_A_CPU) for trial in trials]
    return trials


def classify(backend: str, operators: Iterable[str]) -> tuple[str, str]:
    """What a branch is from the operators that ran in it, in a word and in words."""
    operators = sorted(operators)
    for name, words in _DENSE:
        if any(operator.startswith(f"aten::{name}") for operator in operators):
            return "dense", f"dense kernel: {words}"
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
def _operators(per_branch: Mapping[str, str], branch: str, inputs: Inputs) -> set[str]:
    """What a branch calls in a forward."""
    q, config = inputs.q, inputs.config
    packing: Any = {"cu_seqlens": inputs.cu_seqlens, "max_seqlen": inputs.max_seqlen}
    steps = load(per_branch[branch])
    if branch == "select":
        k, v = inputs.compressed
        _, lse = load(per_branch["compressed"]).compressed_attention(q, k, v, config, **packing)
        with _Seen() as seen:
            steps.select_blocks(q, k, config, **packing, lse=lse)
        return seen.names
    kv = getattr(inputs, branch)
    given = (q, *kv, inputs.block_idx) if branch == "selected" else (q, *kv)
    with _Seen() as seen:
        getattr(steps, f"{branch}_attention")(*given, config, **packing)
    return seen.names
