"""The accuracy rule: how far from the truth a backend may be.

For each output and each gradient, ``‖x − x*‖ <= c·‖x_plain − x*‖ + f·M`` in Frobenius norms, x*
the oracle in fp64, x_plain plain PyTorch in the backend's dtype, and M the Frobenius norm of the
root-sum-square of each element's terms, i.e. the root of the sum of all squared terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa import reference
from nsa.core.inputs import BRANCHES
from nsa.reference.attend import probabilities
from nsa.testing.inputs import Inputs
from nsa.testing.same_dtype import branches, plain_attention

OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
FLOOR = {
    torch.float16: torch.finfo(torch.float16).eps / 4,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps / 4,
    torch.float32: 2e-6,
    torch.float64: 1e-12,
}
LSE_NAMES = tuple(f"lse.{branch}" for branch in BRANCHES)


@dataclass(frozen=True, slots=True)
class Expected:
    """The truth for one tensor, and how far from it a backend may be."""

    truth: Tensor
    bound: float

    def error(self, x: Tensor) -> float:
        """``‖x − x*‖``; infinite where x and x* are not infinite in the same places."""
        x = x.detach().to(self.truth.dtype)
        if x.shape != self.truth.shape:
            return float("inf")
        finite = torch.isfinite(self.truth)
        if not torch.equal(x.masked_fill(finite, 0.0), self.truth.masked_fill(finite, 0.0)):
            return float("inf")
        difference = (x - self.truth).masked_fill(~finite, 0.0).norm().item()
        return difference if difference == difference else float("inf")


def expected(inputs: Inputs) -> dict[str, Expected]:
    """Truth and bound of the output ("out"), every gradient ("d…") and every lse.

    ``inputs.block_idx`` must be given: selection is compared apart.
    """
    floor = FLOOR[inputs.q.dtype]
    # Surplus compressed rows are never read: zeros replace what stands there.
    clean = inputs.with_leaves(tuple(x.detach().nan_to_num(nan=0.0) for x in inputs.leaves()))
    exact, plain = clean.cast(torch.float64), clean.cast(inputs.q.dtype)
    truth_out = exact.attend(reference.nsa_attention)
    truth_grads = torch.autograd.grad(truth_out, exact.leaves(), exact.dout)
    plain_out, plain_lses = plain_attention(plain)
    plain_grads = torch.autograd.grad(plain_out, plain.leaves(), plain.dout)
    sizes = _sizes(exact)
    result = {"out": _bound(truth_out, plain_out, OUTPUT_FACTOR, floor * sizes["out"])}
    for name, truth, x in zip(Inputs.NAMES, truth_grads, plain_grads, strict=True):
        result[f"d{name}"] = _bound(truth, x, GRADIENT_FACTOR, floor * sizes[f"d{name}"])
    for branch, name, x in zip(BRANCHES, LSE_NAMES, plain_lses, strict=True):
        truth = getattr(reference, f"{branch}_attention")(*exact.branch(branch))[1]
        result[name] = _bound(truth, x, OUTPUT_FACTOR, floor * sizes[name])
    return result


def _bound(truth: Tensor, plain: Tensor, factor: float, floor: float) -> Expected:
    truth = truth.detach()
    away = (plain.detach().double() - truth).masked_fill(~torch.isfinite(truth), 0.0)
    return Expected(truth, factor * away.norm().item() + floor)


@torch.no_grad()
def _sizes(inputs: Inputs) -> dict[str, float]:
    """M of every output and gradient."""
    scale = inputs.config.softmax_scale
    squares = dict.fromkeys(("out", *(f"d{name}" for name in Inputs.NAMES), *LSE_NAMES), 0.0)
    for part in branches(inputs):
        kind = BRANCHES[part.branch]
        p, lse = probabilities(part.q, part.k, part.mask, scale)
        B, T, K, G, _ = p.shape
        q = part.q.unflatten(2, (K, G))
        gate = inputs.gates[:, part.tokens, :, part.branch].unflatten(2, (K, G))
        whole = inputs.dout[:, part.tokens].unflatten(2, (K, G))
        dout = gate[..., None] * whole
        out = torch.einsum("btkgs,bskv->btkgv", p, part.v)
        dp = torch.einsum("btkgv,bskv->btkgs", dout, part.v).abs()
        ds = scale * p * (dp + (dout * out).abs().sum(-1, keepdim=True))
        p2, ds2 = p.square(), ds.square()
        k2, v2 = part.k.square().sum(-1), part.v.square().sum(-1)
        q2, dout2 = q.square().sum(-1), dout.square().sum(-1)
        weighted2 = gate.square()[..., None] * p2
        squares["out"] += torch.einsum("btkgs,bsk->", weighted2, v2).item()
        squares["dq"] += torch.einsum("btkgs,bsk->", ds2, k2).item()
        squares[f"d{kind}.k"] += torch.einsum("btkgs,btkg->", ds2, q2).item()
        squares[f"d{kind}.v"] += torch.einsum("btkgs,btkg->", p2, dout2).item()
        squares["dgates"] += (whole * out).square().sum().item()
        products2 = torch.einsum("btkgd,bskd->btkgs", q.square(), part.k.square())
        spread = scale**2 * (p2 * products2).sum().item()
        finite_lse = lse.masked_fill(torch.isinf(lse), 0.0)
        squares[f"lse.{kind}"] += spread + finite_lse.square().sum().item()
    return {name: value**0.5 for name, value in squares.items()}
