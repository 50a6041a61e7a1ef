"""Holds a backend to the oracle: outputs, gradients, log-sum-exps, and the choice of blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa import reference
from nsa.attention import nsa_attention
from nsa.attention import select_blocks as public_select_blocks
from nsa.backends.dispatch import Resolution, plan
from nsa.backends.protocol import Problem
from nsa.config import NSAConfig
from nsa.core.inputs import BRANCHES
from nsa.reference.masks import compressed_mask
from nsa.reference.packing import spans
from nsa.settings import current_settings
from nsa.testing.inputs import Inputs
from nsa.testing.same_dtype import plain_scores, plain_softmax
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


def selection_faults(backend: str, inputs: Inputs) -> list[str]:
    """What is wrong with the blocks that a backend selects; empty if nothing is.

    The lists must be well formed, hold the forced blocks, and list no block whose true score is
    below an unlisted candidate's by more than the error of plain PyTorch in that dtype explains.
    """
    chosen = public_select_blocks(
        inputs.q,
        inputs.compressed.k,
        inputs.config,
        cu_seqlens=inputs.cu_seqlens,
        max_seqlen=inputs.max_seqlen,
        backend=backend,
    )
    q, k = inputs.q.detach(), inputs.compressed.k.detach()
    B, T = q.shape[:2]
    expected_shape = (B, T, inputs.config.num_kv_heads, inputs.config.num_selected)
    if chosen.dtype != torch.int32 or tuple(chosen.shape) != expected_shape:
        return [f"expected int32 {expected_shape}, got {chosen.dtype} {tuple(chosen.shape)}"]
    if inputs.cu_seqlens is None:
        return _sequence_faults(q, k, chosen, inputs.config)
    faults = []
    for seq in spans(inputs.cu_seqlens, inputs.config):
        parts = q[:, seq.tokens], k[:, seq.blocks], chosen[:, seq.tokens]
        if parts[0].shape[1]:
            faults += _sequence_faults(*parts, inputs.config)
    return faults


def _sequence_faults(q: Tensor, k: Tensor, chosen: Tensor, config: NSAConfig) -> list[str]:
    T, n = q.shape[1], config.num_selected
    true = reference.selection_scores(q.double(), k.double(), config)
    slack = 2 * ((_plain_scores(q, k, config) - true).abs().max().item() + 1e-6)
    J = true.shape[-1]
    j = torch.arange(J, device=q.device)
    own = (torch.arange(T, device=q.device) // config.select_block)[:, None, None]
    candidate = (j <= own).expand(true.shape)
    forced = candidate & ((j < config.num_initial) | (j > own - config.num_local))
    valid = (chosen >= 0) & (chosen <= own)
    listed = torch.zeros(*true.shape[:-1], J + 1, dtype=torch.bool, device=q.device)
    listed.scatter_(-1, chosen.long().masked_fill(~valid, J), True)
    listed = listed[..., :J]
    count = (own + 1).clamp_max(n)
    faults = []
    ascending = (chosen[..., 1:] == -1) | (chosen[..., 1:] > chosen[..., :-1])
    ascending &= (chosen[..., 1:] == -1) | (chosen[..., :-1] >= 0)
    if not ascending.all() or not (valid | (chosen == -1)).all():
        faults.append("a list is not strictly ascending candidates, then -1")
    if not (listed.sum(-1, keepdim=True) == count).all():
        faults.append("a list is not as long as min(n, candidates)")
    if not (listed | ~forced).all():
        faults.append("a forced block is missing")
    worst_listed = true.masked_fill(~listed | forced, float("inf")).amin(-1)
    best_unlisted = true.masked_fill(listed | ~candidate, float("-inf")).amax(-1)
    if not (worst_listed >= best_unlisted - slack).all():
        faults.append(f"a listed block scores below an unlisted one by more than {slack:.2e}")
    return faults


def _plain_scores(q: Tensor, k: Tensor, config: NSAConfig) -> Tensor:
    """Selection scores ``[B, T, K, J]`` of plain PyTorch in q's dtype, summed in fp64."""
    T, N = q.shape[1], k.shape[1]
    J = -(-T // config.select_block)
    if N == 0:
        return q.new_zeros(q.shape[0], T, k.shape[2], J, dtype=torch.float64)
    mask = compressed_mask(T, N, config, 0, q.device)
    p = plain_softmax(plain_scores(q, k, mask, config.softmax_scale)).double().sum(3)
    overlap = reference.overlap_matrix(N, J, config).to(p)
    return p @ overlap / config.compress_stride
