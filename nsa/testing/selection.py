"""Holds a backend's choice of blocks to the oracle's scores, under every option of selection.

B batch, T query tokens, N compressed blocks, J selection blocks, K key/value heads, W regions, n
listed blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa import reference
from nsa.attention import select_blocks as public_select_blocks
from nsa.config import NSAConfig
from nsa.reference.attend import attend
from nsa.reference.masks import compressed_mask
from nsa.reference.packing import spans
from nsa.reference.selection import fp8_rows, most_blocks, region_scores
from nsa.testing.inputs import Inputs
from nsa.testing.same_dtype import plain_scores, plain_softmax


def selection_faults(backend: str, inputs: Inputs) -> list[str]:
    """What is wrong with the blocks that a backend selects; empty if nothing is.

    The lists must be well formed, hold the forced blocks, be as long as the options say, and list
    no block whose true score is below an unlisted candidate's by more than the error of plain
    PyTorch in that dtype explains.
    """
    chosen = public_select_blocks(
        inputs.q,
        inputs.compressed.k,
        inputs.config,
        cu_seqlens=inputs.cu_seqlens,
        max_seqlen=inputs.max_seqlen,
        backend=backend,
    )
    return list_faults(chosen, inputs)


def list_faults(chosen: Tensor, inputs: Inputs) -> list[str]:
    """The same of lists ``[B, T, K, n]``, wherever they come from."""
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
    T = q.shape[1]
    row = torch.arange(T, device=q.device)
    first = row - row % config.select_share
    if not torch.equal(chosen, chosen[:, first]):
        return [f"{config.select_share} queries that share a list have lists of their own"]
    true = reference.selection_scores(q.double(), k.double(), config)[:, first]
    slack = 2 * ((_plain_scores(q, k, config)[:, first] - true).abs().max().item() + 1e-6)
    J = true.shape[-1]
    j = torch.arange(J, device=q.device)
    own = (first // config.select_block)[:, None, None]
    candidate = (j <= own).expand(true.shape)
    forced = candidate & ((j < config.num_initial) | (j > own - config.num_local))
    may, must = _searched(q, k, forced, candidate, config)
    valid = (chosen >= 0) & (chosen <= own)
    listed = torch.zeros(*true.shape[:-1], J + 1, dtype=torch.bool, device=q.device)
    listed.scatter_(-1, chosen.long().masked_fill(~valid, J), True)
    listed = listed[..., :J]
    faults = []
    ascending = (chosen[..., 1:] == -1) | (chosen[..., 1:] > chosen[..., :-1])
    ascending &= (chosen[..., 1:] == -1) | (chosen[..., :-1] >= 0)
    if not ascending.all() or not (valid | (chosen == -1)).all():
        faults.append("a list is not strictly ascending candidates, then -1")
    if not (listed | ~forced).all():
        faults.append("a forced block is missing")
    if not (may | ~listed).all():
        faults.append("a block is listed whose region is not searched")
    worst_listed = true.masked_fill(~listed | forced, float("inf")).amin(-1)
    best_unlisted = true.masked_fill(listed | ~must, float("-inf")).amax(-1)
    if not (worst_listed >= best_unlisted - slack).all():
        faults.append(f"a listed block scores below an unlisted one by more than {slack:.2e}")
    count = listed.sum(-1)
    most = most_blocks(first, config)[:, None]
    if not (count <= most).all():
        faults.append("a list is longer than the options allow")
    ends = torch.zeros_like(count, dtype=torch.bool)  # may be shorter
    if config.select_mass is not None and config.select_mass < 1:
        enough = config.select_mass * config.group * config.compress_block / config.compress_stride
        mass, wrong = true.masked_fill(~listed, 0.0).sum(-1), slack * count
        ranked = worst_listed.isfinite()
        if not (~ranked | (mass - worst_listed < enough + wrong)).all():
            faults.append("a list goes on past its share of the score")
        ends = mass >= enough - wrong
    if not (ends | (count >= torch.minimum(most, must.sum(-1)))).all():
        faults.append("a list is shorter than its candidates and the options allow")
    return faults


class _Searched(NamedTuple):
    """bool ``[B, T, K, J]`` each."""

    may: Tensor
    """Blocks that are ranked, or would be within the error of the region's score."""
    must: Tensor


def _searched(
    q: Tensor, k: Tensor, forced: Tensor, candidate: Tensor, config: NSAConfig
) -> _Searched:
    if config.select_regions is None:
        return _Searched(candidate, candidate)
    r, count = config.select_regions
    T, J = q.shape[1], candidate.shape[-1]
    first = torch.arange(T, device=q.device)
    first -= first % config.select_share
    true = _true_region_scores(q.double(), k.double(), config)
    plain = _plain_region_scores(q, k, config)
    R = -(-J // r)
    last = (torch.arange(R, device=q.device) + 1) * r * config.select_block
    whole = (last - config.compress_stride + config.compress_block - 1) <= first[:, None, None]
    ranked = whole & ~F.pad(forced, (0, R * r - J)).unflatten(-1, (R, r)).any(-1)
    W = min(R, true.shape[-1])
    seen = ranked[..., :W]
    true = true[:, first, :, :W].masked_fill(~seen, float("-inf"))
    plain = plain[:, first, :, :W].masked_fill(~seen, float("-inf"))
    error = (plain - true).masked_fill(~seen, 0.0).abs()
    slack = 2 * ((error.max().item() if error.numel() else 0.0) + 1e-6)
    ordered = F.pad(true, (0, count + 1), value=float("-inf")).sort(-1, descending=True).values
    may = (true + slack >= ordered[..., count - 1 : count]) & seen
    must = (true - slack > ordered[..., count : count + 1]) & seen
    always = ~ranked
    may, must = (F.pad(x, (0, R - W)) | always for x in (may, must))
    return _Searched(*(x.repeat_interleave(r, -1)[..., :J] & candidate for x in (may, must)))


def _true_region_scores(q: Tensor, k: Tensor, config: NSAConfig) -> Tensor:
    mask = compressed_mask(q.shape[1], k.shape[1], config, 0, q.device)
    _, lse = attend(q, k, k, mask, config.softmax_scale)
    return region_scores(q, k, lse, config)


def _plain_region_scores(q: Tensor, k: Tensor, config: NSAConfig) -> Tensor:
    """Region scores ``[B, T, K, W]`` of plain PyTorch in q's dtype, summed in fp64."""
    assert config.select_regions is not None
    per = config.select_regions[0] * config.select_block // config.compress_stride
    T, N = q.shape[1], k.shape[1]
    if N < per:
        return q.new_zeros(q.shape[0], T, k.shape[2], 0, dtype=torch.float64)
    keys = k[:, : N // per * per].unflatten(1, (-1, per)).double().mean(2).to(k.dtype)
    mask = compressed_mask(T, N, config, 0, q.device)
    lse = plain_scores(q, k, mask, config.softmax_scale).double().logsumexp(-1, keepdim=True)
    every = mask.new_ones(1, 1, 1, keys.shape[1])
    dots = plain_scores(q, keys, every, config.softmax_scale).double()
    return (dots - lse).exp().sum(3)


def _plain_scores(q: Tensor, k: Tensor, config: NSAConfig) -> Tensor:
    """Selection scores ``[B, T, K, J]`` of plain PyTorch in q's dtype, summed in fp64."""
    T, N = q.shape[1], k.shape[1]
    J = -(-T // config.select_block)
    if N == 0:
        return q.new_zeros(q.shape[0], T, k.shape[2], J, dtype=torch.float64)
    mask = compressed_mask(T, N, config, 0, q.device)
    raw = plain_scores(q, k, mask, config.softmax_scale)
    p = plain_softmax(raw)
    if config.score_dtype == "fp8":
        lse = raw.double().logsumexp(-1, keepdim=True)
        rounded = fp8_rows(q).to(q.dtype), fp8_rows(k).to(k.dtype)
        p = (plain_scores(*rounded, mask, config.softmax_scale).double() - lse).exp()
        p = p.masked_fill(lse == float("-inf"), 0.0)
    p = p.double().sum(3)
    overlap = reference.overlap_matrix(N, J, config).to(p)
    return p @ overlap / config.compress_stride
