"""One step of decode of the ``sdpa`` backend: a few queries of every sequence, all at once.

B sequences, S new tokens of each, N compressed blocks, R rows of the window's ring, H query heads,
K key/value heads, G heads per group, D key size, V value size, J selection blocks, n listed blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.backends.sdpa.select import region_scores, scores_regular
from nsa.config import KV, NSAConfig
from nsa.core.dtypes import NEG_INF, accumulation_dtype
from nsa.core.geometry import num_select_blocks
from nsa.core.inputs import DecodeInputs
from nsa.selection.fp8 import dequantize, round_rows
from nsa.selection.regions import searched_blocks
from nsa.selection.rules import choose, width


def decode_attention(inputs: DecodeInputs, config: NSAConfig) -> tuple[Tensor, Tensor]:
    """The gated sum of the branches, and the lists; see :class:`nsa.backends.protocol.Decoder`.

    On a CPU sequences go one by one: the bits of a product depend on how many are made at once.
    """
    B = inputs.q.shape[0]
    if inputs.q.device.type != "cpu" or B == 1:
        return _decode(inputs, config)
    outs, lists = zip(*(_decode(_sequence(inputs, b), config) for b in range(B)), strict=True)
    return torch.cat(outs), torch.cat(lists)


def _sequence(inputs: DecodeInputs, b: int) -> DecodeInputs:
    def row(x: Tensor) -> Tensor:
        return x[b : b + 1]

    def given(x: Tensor | None) -> Tensor | None:
        return None if x is None else row(x)

    return inputs._replace(
        q=row(inputs.q),
        position=row(inputs.position),
        gates=row(inputs.gates),
        compressed=KV(*map(row, inputs.compressed)),
        page_table=row(inputs.page_table),
        window=KV(*map(row, inputs.window)),
        block_idx=given(inputs.block_idx),
        list_before=given(inputs.list_before),
    )


def _decode(inputs: DecodeInputs, config: NSAConfig) -> tuple[Tensor, Tensor]:
    q = inputs.q
    B, S, H, D = q.shape
    K, wide = config.num_kv_heads, accumulation_dtype(q)
    t_BS = inputs.position.long()[:, None] + torch.arange(S, device=q.device)
    q_BKSGD = q.to(wide).view(B, S, K, H // K, D).transpose(1, 2)
    compressed, log_p, lse = _compressed(q_BKSGD, inputs, t_BS, config)
    block_idx = inputs.block_idx
    if block_idx is None:
        block_idx = _lists(q_BKSGD, log_p, lse, inputs, t_BS, config)
    outputs = (
        compressed,
        _selected(q_BKSGD, inputs, block_idx, t_BS, config),
        _window(q_BKSGD, inputs, t_BS, config),
    )
    total = sum(
        gate.view(B, S, K, H // K, 1).transpose(1, 2) * out
        for gate, out in zip(inputs.gates.unbind(-1), outputs, strict=True)
    )
    assert isinstance(total, Tensor)
    return total.transpose(1, 2).reshape(B, S, H, -1).to(q.dtype), block_idx


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """Attention of ``[…, M, D]`` over ``[…, X, D]``; zero for a query that sees nothing."""
    scores = (q @ k.mT).mul_(scale).masked_fill_(hidden, NEG_INF)
    return scores.softmax(-1).masked_fill(hidden, 0.0) @ v


def _compressed(
    q_BKSGD: Tensor, inputs: DecodeInputs, t_BS: Tensor, config: NSAConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, K, S, G, V]``, the logarithms of the probabilities ``[B, K, S, G, N]``, and what was
    taken from the scores to have them, ``[B, K, S, G, 1]``."""
    wide = q_BKSGD.dtype
    k, v = (x.to(wide).transpose(1, 2) for x in inputs.compressed)
    N = k.shape[2]
    hidden = _hidden_blocks(N, t_BS, config)
    scores = (q_BKSGD.flatten(2, 3) @ k.mT).mul_(config.softmax_scale)
    scores = scores.view(*q_BKSGD.shape[:-1], N).masked_fill_(hidden, NEG_INF)
    lse = scores.logsumexp(-1, keepdim=True)
    lse = lse.masked_fill_(lse == NEG_INF, 0.0)
    log_p = scores.sub_(lse)
    out = log_p.exp().flatten(2, 3) @ v
    return out.view(*q_BKSGD.shape[:-1], -1), log_p, lse


def _hidden_blocks(N: int, t_BS: Tensor, config: NSAConfig) -> Tensor:
    """bool ``[B, 1, S, 1, N]``"""
    last = torch.arange(N, device=t_BS.device) * config.compress_stride + config.compress_block - 1
    return (last > t_BS[..., None])[:, None, :, None]


def _lists(
    q_BKSGD: Tensor,
    log_p: Tensor,
    lse: Tensor,
    inputs: DecodeInputs,
    t_BS: Tensor,
    config: NSAConfig,
) -> Tensor:
    """int32 ``[B, S, K, n]``"""
    B, K, S, G, N = log_p.shape
    tokens = inputs.page_table.shape[1] * inputs.selected.k.shape[1]
    J = num_select_blocks(tokens, config)
    position = t_BS[:, None].expand(B, K, S).reshape(B * K, S, 1)
    searched = None
    if config.select_regions is not None:
        regions = region_scores(log_p.reshape(B * K, S, 1, G, N), None, J, config)
        searched = searched_blocks(regions, position, J, config)
    if config.score_dtype == "fp8":
        k = round_rows(inputs.compressed.k.transpose(1, 2))
        rounded = (round_rows(q_BKSGD).flatten(2, 3) @ k.mT).mul_(config.softmax_scale)
        log_p = rounded.view_as(log_p).sub_(lse)
        log_p = log_p.masked_fill_(_hidden_blocks(N, t_BS, config), NEG_INF)
    scores = scores_regular(log_p.exp().sum(3).view(B * K, S, 1, N), J, config)
    lists = choose(scores, position, width(tokens, config), config, searched)
    lists = lists.view(B, K, S, -1).transpose(1, 2)
    return lists if config.select_share == 1 else _shared(lists, inputs, t_BS, config)


def _shared(lists: Tensor, inputs: DecodeInputs, t_BS: Tensor, config: NSAConfig) -> Tensor:
    """The list of the first query of every ``select_share``: of this step, or from before."""
    B, S, K, n = lists.shape
    first = torch.arange(S, device=t_BS.device) - t_BS % config.select_share
    index = first.clamp_min(0)[..., None, None].expand(B, S, K, n)
    before = inputs.list_before
    assert before is not None
    kept = before[:, None, :, :n].expand(B, S, K, n)
    return lists.gather(1, index).where((first >= 0)[..., None, None], kept)


def _selected(
    q_BKSGD: Tensor, inputs: DecodeInputs, block_idx: Tensor, t_BS: Tensor, config: NSAConfig
) -> Tensor:
    """``[B, K, S, G, V]``"""
    block, wide = config.select_block, q_BKSGD.dtype
    B, S, K, n = block_idx.shape
    per_page = inputs.selected.k.shape[1] // block
    index = block_idx.long().transpose(1, 2)  # [B, K, S, n]
    there = index.clamp_min(0)
    place = (there // per_page).clamp_max(inputs.page_table.shape[1] - 1).flatten(1)
    page = inputs.page_table.long().gather(1, place).view_as(there)
    row = page * per_page + there % per_page
    within = torch.arange(block, device=row.device)
    head = torch.arange(K, device=row.device)[:, None, None, None]
    pool_row = ((row[..., None] * block + within) * K + head).flatten()

    def listed(x: Tensor) -> Tensor:
        """``[P, L, K, …]`` -> ``[B, K, S, n * l', …]``; whole rows, on a CPU a third of the time of
        indexing pages and heads."""
        found = x.flatten(0, 2).index_select(0, pool_row)
        return found.view(B, K, S, n * block, *x.shape[3:])

    if inputs.selected_scale is None:
        k, v = (listed(x).to(wide) for x in inputs.selected)
    else:
        k, v = (
            dequantize(listed(x.view(torch.uint8)), listed(scale), wide)
            for x, scale in zip(inputs.selected, inputs.selected_scale, strict=True)
        )
    token = there[..., None] * block + within
    hidden = (token > t_BS[:, None, :, None, None]) | (index < 0)[..., None]
    hidden = hidden.flatten(3)[..., None, :]
    return _attend(q_BKSGD, k, v, hidden, config.softmax_scale)


def _window(q_BKSGD: Tensor, inputs: DecodeInputs, t_BS: Tensor, config: NSAConfig) -> Tensor:
    """``[B, K, S, G, V]``, over all of the ring: a row's token is the latest that stands there."""
    B, K, S, G, D = q_BKSGD.shape
    k, v = (x.to(q_BKSGD.dtype).transpose(1, 2) for x in inputs.window)
    R, last_B1 = k.shape[2], t_BS[:, -1:]
    token_BR = last_B1 - (last_B1 - torch.arange(R, device=t_BS.device)) % R
    token_BSR, t_BS1 = token_BR[:, None], t_BS[..., None]
    hidden = (token_BSR < 0) | (token_BSR > t_BS1) | (token_BSR <= t_BS1 - config.window)
    hidden = hidden[:, None, :, None].expand(B, 1, S, G, R).flatten(2, 3)
    out = _attend(q_BKSGD.flatten(2, 3), k, v, hidden, config.softmax_scale)
    return out.view(B, K, S, G, -1)
