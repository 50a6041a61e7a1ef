"""Rows of queries and their probabilities over compressed keys, for every kernel that selects.

A row is one head of one token that leads: the first of SHARE that read one list. G heads per group,
D key size, L leading tokens; C is a :class:`~nsa.backends.compiled.select.tiles.Constants`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.columns import dot_rows, largest, load_rows
from nsa.backends.compiled.common import LOG2_E

NOWHERE = tl.constexpr(2**30)  # past every token, and SHARE more is a number, too
FP8_MAX = tl.constexpr(448.0)


@triton.jit
def leading_tokens(leader_ptr, leader, L, C: tl.constexpr):
    """The tokens that lead, by their number; at least T past the last."""
    t = leader * C.SHARE
    if C.PACKED and C.SHARE > 1:
        t = tl.load(leader_ptr + leader, mask=leader < L, other=NOWHERE)
    return t


@triton.jit
def lists_after(leader_ptr, leader, t, T, L, C: tl.constexpr):
    """How many tokens, t the first of them, read the list of the token t that leads."""
    end = tl.minimum(t + C.SHARE, T)
    if C.PACKED and C.SHARE > 1:
        end = tl.minimum(end, leading_tokens(leader_ptr, leader + 1, L + 1, C))
    return end - t


@triton.jit
def load_queries(q_ptr, lse_ptr, q_strides, b, kv_head, row_t, T, KV_HEADS, C: tl.constexpr):
    """q, a tile in parts, and lse ``[BLOCK_M]`` of tokens ``row_t``, BLOCK_GROUP rows each."""
    row_h = tl.arange(0, C.TOKENS * C.BLOCK_GROUP) % C.BLOCK_GROUP
    row_mask = (row_t < T) & (row_h < C.G)
    head = kv_head * C.G + row_h
    q_ptr += b * q_strides[0] + row_t.to(tl.int64) * q_strides[1] + head * q_strides[2]
    q = load_rows(q_ptr, None, q_strides[3], row_mask, C.D, C.BLOCK_D)
    lse_row = (b * T + row_t.to(tl.int64)) * (KV_HEADS * C.G) + head
    lse = tl.load(lse_ptr + lse_row, mask=row_mask, other=float("inf"))
    # exp(-inf): nothing for the rows that fill up a group, nor for a query that sees no block
    return q, tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _to_e4m3(x, unit, C: tl.constexpr):
    """x in units of each row, rounded to e4m3; with C.IEEE in fp32, as products of e4m3 may be
    summed in less (sm_90)."""
    wide = x.to(tl.float32)
    x = tl.div_rn(wide, tl.broadcast_to(unit[:, None], wide.shape)).to(tl.float8e4nv)
    return x.to(tl.float32) if C.IEEE else x


@triton.jit
def round_queries(q, scale, C: tl.constexpr):
    """q as e4m3 and ``scale`` times the scale of each row, as :func:`nsa.selection.fp8.quantize`
    rounds; unchanged without C.FP8."""
    if C.FP8:
        unit = tl.div_rn(largest(q), FP8_MAX)
        unit = tl.where(unit == 0.0, 1.0, unit)
        q = [_to_e4m3(x, unit, C) for x in q]
        scale = scale * unit[:, None]
    return q, scale


@triton.jit
def load_keys(k_ptr, k_scale_ptr, k_strides, row, mask, KV_HEADS, C: tl.constexpr):
    """Keys of compressed blocks ``row``, a tile in parts, and with C.FP8 their scales."""
    k_row_ptr = k_ptr + row.to(tl.int64) * k_strides[1]
    k = load_rows(k_row_ptr, None, k_strides[3], mask, C.D, C.BLOCK_D)
    k_scale = 1.0
    if C.FP8:
        if C.IEEE:
            k = [x.to(tl.float32) for x in k]
        k_scale = tl.load(k_scale_ptr + row.to(tl.int64) * KV_HEADS, mask=mask, other=0.0)
    return k, k_scale


@triton.jit
def products(q, k, k_scale, scale, C: tl.constexpr):
    """``q·k``, fp32 ``[BLOCK_M, BLOCK_N]``; times ``scale`` with C.IEEE, else without."""
    s = dot_rows(q, k, C)
    if C.FP8:
        s = s * k_scale[None, :]
    if C.IEEE:
        s = s * scale
    return s


@triton.jit
def probabilities(s, scale, lse, C: tl.constexpr):
    """exp of :func:`products`, −inf where masked, over the rows' log-sum-exp."""
    return tl.exp(s - lse[:, None]) if C.IEEE else tl.exp2(s * scale - (lse * LOG2_E)[:, None])


@triton.jit
def sum_heads(x, C: tl.constexpr):
    """``[TOKENS * BLOCK_GROUP, BLOCK_N]`` -> ``[TOKENS, BLOCK_N]``."""
    return tl.sum(tl.reshape(x, (C.TOKENS, C.BLOCK_GROUP, C.BLOCK_N)), axis=1)
