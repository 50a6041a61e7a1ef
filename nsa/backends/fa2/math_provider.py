"""FlashAttention-2's contract in plain PyTorch.

B batch, T query tokens, S key tokens, H query heads, K key/value heads, G heads per group, D head
size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nsa.backends.fa2.calls import Call, is_readable
from nsa.core.dtypes import NEG_INF, accumulation_dtype


class Math:
    """FlashAttention-2's contract in plain PyTorch: any device, any float dtype, for tests."""

    name = "math"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """See :class:`Provider`."""
        assert all(map(is_readable, (q, k, v)))
        if call.cu_q is not None:
            out, lse = torch.full_like(q, float("nan")), q.new_full(q.shape[:2], float("nan"))
            lse = lse.to(accumulation_dtype(q))
            for rows, keys, one in _sequences(call):
                parts = self.forward(q[None, rows], k[None, keys], v[None, keys], one)
                out[rows], lse[rows] = parts[0][0], parts[1][0]
            return out, lse
        p, lse = _probabilities(q, k, call)
        out = torch.einsum("bkgts,bskd->btkgd", p, v.to(p.dtype)).flatten(2, 3)
        return out.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Provider`."""
        assert all(map(is_readable, (dout, q, k, v, out)))
        if call.cu_q is not None:
            dq, dk, dv = (torch.full_like(x, float("nan")) for x in (q, k, v))
            for rows, keys, one in _sequences(call):
                given = dout[None, rows], q[None, rows], k[None, keys], v[None, keys]
                parts = self.backward(*given, out[None, rows], lse[None, rows], one)
                for grad, part, span in zip((dq, dk, dv), parts, (rows, keys, keys), strict=True):
                    grad[span] = part[0]
            return dq, dk, dv
        p, _ = _probabilities(q, k, call, lse)
        B, T, H, D = q.shape
        K, wide = k.shape[2], p.dtype
        q_BTKGD, dout_BTKGD = (
            x.to(wide).view(B, T, K, H // K, D) for x in (q, dout.reshape(q.shape))
        )
        delta = (dout.to(wide) * out).sum(-1).view(B, T, K, H // K).permute(0, 2, 3, 1)
        dp = torch.einsum("btkgd,bskd->bkgts", dout_BTKGD, v.to(wide))
        ds = p * (dp - delta[..., None]) * call.scale
        dq = torch.einsum("bkgts,bskd->btkgd", ds, k.to(wide)).reshape(q.shape)
        dk = torch.einsum("bkgts,btkgd->bskd", ds, q_BTKGD)
        dv = torch.einsum("bkgts,btkgd->bskd", p, dout_BTKGD)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _sequences(call: Call) -> list[tuple[slice, slice, Call]]:
    """Rows, keys and the regular call of each packed sequence."""
    assert call.cu_q is not None and call.cu_q.is_contiguous()
    assert call.cu_k is not None and call.cu_k.is_contiguous()
    rows, keys = call.cu_q.tolist(), call.cu_k.tolist()
    result = []
    for i in range(len(rows) - 1):
        one = replace(
            call, cu_q=None, cu_k=None, max_q=rows[i + 1] - rows[i], max_k=keys[i + 1] - keys[i]
        )
        result.append((slice(rows[i], rows[i + 1]), slice(keys[i], keys[i + 1]), one))
    return result


def _probabilities(
    q: Tensor, k: Tensor, call: Call, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``[B, K, G, T, S]`` and lse ``[B, T, H]``; normalised by ``lse`` if it is given."""
    B, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    wide = accumulation_dtype(q)
    q_BTKGD = q.to(wide).view(B, T, K, H // K, D)
    scores = call.scale * torch.einsum("btkgd,bskd->bkgts", q_BTKGD, k.to(wide))
    t = torch.arange(T, device=q.device)[:, None] + S - T
    s = torch.arange(S, device=q.device)
    hidden = torch.zeros(T, S, dtype=torch.bool, device=q.device)
    if call.causal:
        hidden |= s > t
    if call.window is not None:
        hidden |= s <= t - call.window
    scores = scores.masked_fill(hidden, NEG_INF)
    if lse is None:
        lse_BKGT = scores.logsumexp(-1)
    else:
        lse_BKGT = lse.view(B, T, K, H // K).permute(0, 2, 3, 1)
    p = (scores - lse_BKGT.masked_fill(lse_BKGT == NEG_INF, float("inf"))[..., None]).exp()
    return p, lse_BKGT.permute(0, 3, 1, 2).reshape(B, T, H)
