"""Holds a backend to the oracle: outputs, gradients, log-sum-exps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsa.attention import nsa_attention
from nsa.backends.dispatch import Resolution, plan
from nsa.backends.protocol import Problem
from nsa.core.inputs import BRANCHES
from nsa.settings import current_settings
from nsa.testing.inputs import Inputs
from nsa.testing.tolerances import LSE_NAMES, expected


@dataclass(frozen=True, slots=True)
class ParityRow:
    """One tensor of a backend against the oracle."""

    name: str
    """"out", "d" and the name of an input, or "lse." and the name of a branch."""
    error: float
    """``‖x − x*‖``"""
    bound: float
    """The largest error the accuracy rule allows."""

    @property
    def ok(self) -> bool:
        """Whether the error is within its bound."""
        return self.error <= self.bound


def attention_parity(backend: str, inputs: Inputs) -> list[ParityRow]:
    """Runs forward and backward on one backend; ``inputs.block_idx`` must be given."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs.leaves())
    mine = inputs.with_leaves(leaves)
    out = mine.attend(nsa_attention, backend=backend)
    found = {"out": out}
    grads = torch.autograd.grad(out, leaves, mine.dout)
    found.update({f"d{name}": x for name, x in zip(Inputs.NAMES, grads, strict=True)})
    chosen = planned(backend, mine)
    for branch, name in zip(BRANCHES, LSE_NAMES, strict=True):
        step = getattr(chosen.step(branch), f"{branch}_attention")
        found[name] = step(*mine.branch(branch), max_seqlen=mine.max_seqlen)[1]
    return [
        ParityRow(name, want.error(found[name]), want.bound)
        for name, want in expected(inputs).items()
    ]


def planned(backend: str, inputs: Inputs) -> Resolution:
    """What runs each step of a problem under a backend."""
    q, packed = inputs.q, inputs.cu_seqlens is not None
    problem = Problem(inputs.config, q.device, q.dtype, inputs.record.length, packed, True)
    return plan(problem, backend, current_settings())
