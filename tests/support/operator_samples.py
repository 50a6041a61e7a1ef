"""Arguments for every operator of ``torch.ops.nsa``, and the rules it is held to.

One row of a table for each operator; a test fails for an operator without one. What an operator is
called with stands in one function each, next to nothing else.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

import nsa
import nsa.backends.compiled.steps
import nsa.backends.sdpa.steps
from nsa import NSAConfig
from nsa.core.packing import block_bounds, packed_tokens
from nsa.core.rope import rope_table
from nsa.core.split_heads.op import widths
from nsa.testing import Inputs, make_inputs, random_blocks

DEFINES = r"^from nsa\.core\.operators import .*\bdefine(_attention)?\b"


def _registered() -> set[str]:
    """The names of all operators, of every module that defines one."""
    package = Path(nsa.__file__).parent
    for path in sorted(package.rglob("*.py")):
        if re.search(
            r"^from nsa\.core\.operators import .*\bdefine(_attention)?\b",
            path.read_text(),
            re.MULTILINE,
        ):
            parts = path.relative_to(package.parent).with_suffix("").parts
            importlib.import_module(".".join(parts))
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("nsa::") for name in names if name.startswith("nsa::")}


REGISTERED = _registered()
CONFIG = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    value_dim=6,
    compress_block=4,
    compress_stride=2,
    select_block=6,
    num_selected=4,
    num_local=1,
    window=7,
    scale=0.3,
)
LENGTHS = (13, 0, 9, 1)
SCALE = CONFIG.softmax_scale
Q_START = 0
Arguments = tuple[Any, ...]


def problem(packed: bool, device: str = "cpu", length: int = 23) -> Inputs:
    """Two rows of tokens in fp32, or four packed sequences in bf16; and any list of blocks."""
    shape: dict[str, Any] = {"lengths": LENGTHS} if packed else {"length": length, "batch": 2}
    dtype = torch.bfloat16 if packed else torch.float32
    x = make_inputs(CONFIG, dtype=dtype, device=device, **shape)
    return replace(x, block_idx=random_blocks(x, 4))


def _starts(x: Inputs) -> Tensor | None:
    if x.cu_seqlens is None:
        return None
    token = packed_tokens(x.cu_seqlens, x.q.shape[1])
    return token.seq_start.to(torch.int32)


def _blocks(x: Inputs) -> int:
    return x.compressed.k.shape[1]


def _same_size(*tensors: Tensor, size: int) -> tuple[Tensor, ...]:
    return tuple(F.pad(x, (0, size - x.shape[-1])) for x in tensors)


# Attention: (q, k, v, *call) to (out, lse), and (dout, q, k, v, out, lse, *call) to (dq, dk, dv)


def _band(x: Inputs) -> Arguments:
    seq = None if x.cu_seqlens is None else packed_tokens(x.cu_seqlens, x.q.shape[1]).seq_id
    rows = x.q.unflatten(2, (CONFIG.num_kv_heads, -1))
    return rows, *x.window, seq, CONFIG.window, Q_START, SCALE


def _sdpa_selected(x: Inputs) -> Arguments:
    q, k, v = _same_size(x.q, *x.selected, size=16)
    return q, k, v, x.block_idx, x.cu_seqlens, CONFIG.key, Q_START


def _fa2_selected(x: Inputs) -> Arguments:
    q, k, v = _same_size(x.q, *x.selected, size=8)
    call = (x.block_idx, x.cu_seqlens, CONFIG.key, Q_START)
    return q, k, v, *call, "math", [0, 0]


def _flash_attention_2(x: Inputs) -> Arguments:
    q, k, v = _same_size(x.q, *x.window, size=8)
    longest, cu = x.q.shape[1], x.cu_seqlens
    if cu is not None:
        q, k, v, longest = q[0], k[0], v[0], max(LENGTHS)
    return q, k, v, cu, cu, longest, longest, SCALE, True, CONFIG.window, "math"


def _window_attention(x: Inputs) -> Arguments:
    return x.q, *x.window, _starts(x), CONFIG.key, Q_START


def _selected_attention(x: Inputs) -> Arguments:
    call = (x.block_idx, _starts(x), len(LENGTHS), CONFIG.key, Q_START)
    return x.q, *x.selected, *call


def _compressed_attention(x: Inputs) -> Arguments:
    where: tuple[Tensor | None, ...] = (None,) * 4
    if x.cu_seqlens is not None:
        where = block_bounds(x.cu_seqlens, x.q.shape[1], _blocks(x), CONFIG)
    return x.q, *x.compressed, *where, CONFIG.key, Q_START


ATTENTION: dict[str, Callable[[Inputs], Arguments]] = {
    "band": _band,
    "sdpa_selected": _sdpa_selected,
    "fa2_selected": _fa2_selected,
    "flash_attention_2": _flash_attention_2,
    "window_attention": _window_attention,
    "selected_attention": _selected_attention,
    "compressed_attention": _compressed_attention,
}
"""Each has a ``_backward`` too."""


# The others


def _fold(x: Inputs) -> Arguments:
    return x.q, x.cu_seqlens, _blocks(x), CONFIG.num_kv_heads, CONFIG.key, Q_START


def _unfold(x: Inputs) -> Arguments:
    rows = torch.ops.nsa.fold.default(*_fold(x))
    return rows, x.cu_seqlens, x.q.shape[1], _blocks(x), CONFIG.key, Q_START, 0.0


def _block_tokens(x: Inputs) -> Arguments:
    return x.selected.k, x.cu_seqlens, CONFIG.key


def _block_tokens_backward(x: Inputs) -> Arguments:
    tokens, cu_seqlens, *call = _block_tokens(x)
    blocks = torch.ops.nsa.block_tokens.default(tokens, cu_seqlens, *call)
    return blocks, cu_seqlens, tokens.shape[1], *call


def _block_means_backward(x: Inputs) -> Arguments:
    tokens, cu_seqlens, key = _block_tokens(x)
    means = torch.ops.nsa.block_means.default(tokens, cu_seqlens, key)
    return means, cu_seqlens, tokens.shape[1], key


def _select_blocks(x: Inputs) -> Arguments:
    lse, longest = x.q.detach().float().logsumexp(-1), x.max_seqlen or x.q.shape[1]
    call = (longest, Q_START, CONFIG.key, "sdpa")
    return x.q.detach(), x.compressed.k.detach(), lse, x.cu_seqlens, *call


def _gated_attention(x: Inputs) -> Arguments:
    compressed = _compressed_attention(x)
    out, lse = torch.ops.nsa.compressed_attention.default(*compressed)
    cmp_seq_start, seq_start, *seen = compressed[3:7]
    in_unit_interval = x.cu_seqlens is None
    tensors = (x.q, *x.compressed, *x.selected, *x.window, x.gates, out, lse, x.block_idx)
    where = (seq_start, cmp_seq_start, *seen, len(LENGTHS))
    return *tensors, *where, CONFIG.key, 1, 0, 0, in_unit_interval


def _gated_attention_backward(x: Inputs) -> Arguments:
    call = _gated_attention(x)
    out, *rest = torch.ops.nsa.gated_attention.default(*call)
    return torch.randn_like(out), *call[:10], *rest, *call[10:]


def _rope_table(x: Inputs) -> Arguments:
    return torch.arange(x.q.shape[1], device=x.q.device), CONFIG.head_dim, 100.0, torch.float32


def _split_heads(x: Inputs, config: NSAConfig = CONFIG) -> Arguments:
    B, T = x.q.shape[:2]
    columns, size = sum(widths(config)), config.head_dim
    product = torch.randn(B, T, columns, device=x.q.device, dtype=x.q.dtype, requires_grad=True)
    bias = torch.randn(3 * config.num_heads, device=x.q.device, requires_grad=True)
    positions = torch.arange(T, device=x.q.device)
    return product, bias, *rope_table(positions, size, 100.0, torch.float32), config.key


def _split_heads_backward(x: Inputs) -> Arguments:
    product, _, cos, sin, key = _split_heads(x)
    grads = [y.detach() for y in torch.ops.nsa.split_heads.default(product, None, cos, sin, key)]
    return cos, sin, product.shape[-1], key, grads


def _split_heads_shared(x: Inputs) -> Arguments:
    return _split_heads(x, replace(CONFIG, independent_kv=False))


OTHERS: dict[str, Callable[[Inputs], Arguments]] = {
    "fold": _fold,
    "fold_backward": _unfold,
    "unfold": _unfold,
    "unfold_backward": _fold,
    "block_tokens": _block_tokens,
    "block_tokens_backward": _block_tokens_backward,
    "block_means": _block_tokens,
    "block_means_backward": _block_means_backward,
    "select_blocks": _select_blocks,
    "rope_table": _rope_table,
    "split_heads": _split_heads,
    "split_heads_backward": _split_heads_backward,
    "split_heads_shared": _split_heads_shared,
    "gated_attention": _gated_attention,
    "gated_attention_backward": _gated_attention_backward,
}

_KERNELS = (
    *("window_attention", "selected_attention", "compressed_attention", "gated_attention"),
    "split_heads",
)
IN_TRITON = (*(name for op in _KERNELS for name in (op, f"{op}_backward")), "split_heads_shared")
"""Made of Triton kernels: on a CPU they run in its interpreter alone."""
IN_TORCH = tuple(
    name
    for name in (*(n for op in ATTENTION for n in (op, f"{op}_backward")), *OTHERS)
    if name not in IN_TRITON
)


def arguments(name: str, x: Inputs) -> Arguments:
    """What an operator is called with; a backward gets tensors that want no gradient."""
    if name in ATTENTION:
        made = ATTENTION[name](x)
    elif name in OTHERS:
        made = OTHERS[name](x)
    else:
        forward = name.removesuffix("_backward")
        call = ATTENTION[forward](x)
        out, lse = getattr(torch.ops.nsa, forward).default(*call)
        made = (torch.randn_like(out), *call[:3], out, lse, *call[3:])
    once = not name.endswith("_backward")
    return tuple(
        y.detach().requires_grad_(y.requires_grad and once) if isinstance(y, Tensor) else y
        for y in made
    )


def check(name: str, x: Inputs) -> None:
    """``torch.library.opcheck``: the schema is true, autograd is registered, empty results have the
    shapes, dtypes and strides of real ones, and AOTAutograd traces it with symbolic shapes.
    """
    opcheck(getattr(torch.ops.nsa, name).default, arguments(name, x))


def check_selection(x: Inputs) -> None:
    """:func:`check` of ``select_blocks`` with the Triton kernel behind it."""
    call = arguments("select_blocks", x)
    opcheck(torch.ops.nsa.select_blocks.default, (*call[:-1], "compiled"))
