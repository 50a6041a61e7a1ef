"""Selected attention (paper Eq. 11-12), the gradient of q.

B batch, T query tokens, S key tokens, H query heads, K key/value heads, G heads per group, D key
size, V value size; C is a :class:`~nsa.backends.compiled.selected.tiles.Constants`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa.backends.compiled.columns import (
    add_products,
    add_rows,
    dot_rows,
    load_rows,
    scale_rows,
    store_rows,
    sum_products,
    zeros,
)
from nsa.backends.compiled.common import LOG2_E
from nsa.backends.compiled.selected.far import add_parts
from nsa.backends.compiled.selected.query_tile import (
    block_step,
    load_keys,
    load_queries,
    locate_tile,
    phase_steps,
)
from nsa.core.kernel import kernel


@triton.jit
def _add_keys(
    acc,
    begin,
    end,
    q,
    dout,
    lse_log2,
    delta,
    weight_ptr,  # of each row
    mask,
    k_ptr,  # of the head, as is the next
    v_ptr,
    k_offsets,
    v_offsets,
    k_stride,
    v_stride,
    blocks,
    bit,
    last_row,
    S,
    scale_log2,
    MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    C: tl.constexpr,
):
    """What steps ``begin … end - 1`` add to dq, but for the scale."""
    # Keeping what is the same in every step would spill it where C.D is large.
    for step in tl.range(begin, end, disable_licm=True):
        first_row, exists, visible = block_step(step, blocks, bit, last_row, S, MASKED, C)
        k = load_keys(k_ptr, k_offsets, k_stride, first_row, exists, C.D, C.BLOCK_D)
        v = load_keys(v_ptr, v_offsets, v_stride, first_row, exists, C.V, C.BLOCK_DV)
        s = dot_rows(q, k, C)
        dp = dot_rows(dout, v, C)
        # No probability is above 1; where scores are so large that rounding the lse says
        # otherwise, this keeps the gradient finite, as it does where an unseen score overflowed:
        # the minimum of no number and 0 is 0.
        p = tl.exp2(tl.minimum(s * scale_log2 - lse_log2[:, None], 0.0))
        if WEIGHTED:
            p *= tl.load(weight_ptr, mask=mask, other=0.0)[:, None]
        # The mask comes before the product: selecting 16-bit results takes twice the instructions.
        ds = p * tl.where(visible, dp - delta[:, None], 0.0)
        acc = add_products(acc, ds, k, C)
    return acc


@kernel(do_not_specialize=["T", "num_tiles", "S", "q_start", "first_head"])
def nsa_selected_bwd_dq(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    out_ptr,  # [B, T, H, V], contiguous; not read with ACCUMULATE
    lse_ptr,  # [B, T, H], contiguous
    delta_ptr,  # [B, T, H], contiguous; written, with ACCUMULATE read
    weight_ptr,  # [B, T, H], contiguous: of each row's probabilities, with WEIGHTED
    dq_ptr,  # [B, T, H, D], contiguous; written, with ACCUMULATE added to
    union_ptrs,  # of :func:`.query_tile.locate_tile`
    part_ptrs,  # of :class:`.far.Parts`, with SINCE
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    T,
    num_tiles,
    S,
    q_start,
    first_head,  # of this launch: b*K + kv_head
    KV_HEADS,
    scale_log2,
    scale,
    ACCUMULATE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SINCE: tl.constexpr,
    C: tl.constexpr,
):
    pid = tl.program_id(0) + first_head * num_tiles
    b, kv_head, token, head, bit, mask, blocks = locate_tile(
        pid, T, num_tiles, KV_HEADS, union_ptrs, C
    )
    n = tl.arange(0, C.BLOCK_N)
    last_row = tl.minimum(q_start + token, S - 1)
    row = (b * T + token) * (KV_HEADS * C.G) + head
    q = load_queries(q_ptr, q_strides, b, token, head, mask, C.D, C.BLOCK_D)
    dout = load_queries(dout_ptr, dout_strides, b, token, head, mask, C.V, C.BLOCK_DV)
    if ACCUMULATE:
        delta = tl.load(delta_ptr + row, mask=mask, other=0.0)
    else:
        out = load_rows(out_ptr + row * C.V, None, 1, mask, C.V, C.BLOCK_DV)
        delta = sum_products(dout, out)
        tl.store(delta_ptr + row, delta, mask=mask)
    lse_log2 = tl.load(lse_ptr + row, mask=mask, other=0.0) * LOG2_E
    k_ptr += b * k_strides[0] + kv_head.to(tl.int64) * k_strides[2]
    v_ptr += b * v_strides[0] + kv_head.to(tl.int64) * v_strides[2]
    k_offsets = n * k_strides[1]
    v_offsets = n * v_strides[1]

    acc = zeros(C.BLOCK_M, C.BLOCK_D)
    for phase in tl.static_range(0 if C.SHARED else 1, 2):
        begin, end = phase_steps(phase, blocks[2], C)
        acc = _add_keys(
            *(acc, begin, end, q, dout, lse_log2, delta, weight_ptr + row, mask),
            *(k_ptr, v_ptr, k_offsets, v_offsets, k_strides[1], v_strides[1]),
            *(blocks, bit, last_row, S, scale_log2, phase == 1, WEIGHTED, C),
        )

    acc = scale_rows(acc, scale)
    if SINCE is not None:
        acc = add_parts(
            *(acc, part_ptrs, first_head, b, kv_head, token, head, mask),
            *(T, S, q_start, KV_HEADS, SINCE, C),
        )
    dq_ptr += row * C.D
    if ACCUMULATE:
        acc = add_rows(acc, load_rows(dq_ptr, None, 1, mask, C.D, C.BLOCK_D))
    store_rows(dq_ptr, None, acc, mask, C.D, C.BLOCK_D)
