"""The ``compiled`` backend: Triton kernels on a GPU, Inductor for what is between them.

- compressed: the window's kernel, over keys that stand d tokens apart;
- select: scores and a running top-n in one kernel (``select/``);
- selected: several tokens on the union of their lists (``selected/``);
- window: a band (``window/``);
- their gated sum: the last two with the sum, and one backward for all (``gated/``).

What is around them (rotary embedding, gates) is plain PyTorch for Inductor to fuse:
:mod:`nsa.core.compile` compiles it for whoever compiles nothing. On a CPU that is all it does: the
branches are ``sdpa``'s there, whose loops over chunks that fit in a cache are faster than what
Inductor makes of a band (docs/experiments.md).

The step signature is the one of :mod:`nsa.backends.protocol`.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from nsa.backends import load
from nsa.backends.compiled.gated.op import gated_attention as gated_op
from nsa.backends.compiled.ops import compressed_attention as compressed_op
from nsa.backends.compiled.ops import selected_attention as selected_op
from nsa.backends.compiled.ops import window_attention as window_op
from nsa.backends.protocol import STEPS, Problem
from nsa.backends.shared.select_op import SELECTORS, select
from nsa.compression import COPIES, Copies
from nsa.config import KV, NSAConfig
from nsa.core.packing import block_places, compressed_members, token_members
from nsa.settings import Settings, foreign_variable

MAX_HEAD = 256
INTERPRETED = foreign_variable("TRITON_INTERPRET") == "1"
"""Whether Triton kernels run on the CPU, in Triton's interpreter."""
_MIN_CAPABILITY = (8, 0)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unavailable(problem: Problem, settings: Settings) -> str | None:
    """Why this backend cannot run the problem, or None."""
    device, config = problem.device, problem.config
    if device.type == "cpu" and not INTERPRETED:
        return _no_compiler()
    if device.type not in ("cuda", "cpu"):
        return f"compiled needs a CUDA device or a CPU, got {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "compiled needs triton on a GPU: pip install triton (PyTorch's CUDA builds bring it)"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < _MIN_CAPABILITY:
            return f"compiled needs sm80 or newer, got sm{capability[0]}{capability[1]}"
    if problem.dtype not in _DTYPES:
        return f"compiled takes float16, bfloat16 and float32 on a GPU, got {problem.dtype}"
    size = max(config.head_dim, config.dv)
    if size > MAX_HEAD:
        return f"compiled takes head sizes up to {MAX_HEAD}, got {size}"
    return None


def left_to_sdpa(problem: Problem, settings: Settings) -> dict[str, str]:
    """The branches that this backend leaves to ``sdpa`` on a CPU, and why."""
    if problem.device.type != "cpu" or INTERPRETED:
        return {}
    return dict.fromkeys(STEPS, "on a CPU")


@cache
def _no_compiler() -> str | None:
    """Why Inductor cannot make code for this CPU, or None."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return (
            "compiled needs a C++ compiler on a CPU, and torch found none: install g++, or name "
            "one in the variable CXX"
        )
    return None


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None = None,
    *,
    max_seqlen: int | None = None,
    q_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Causal attention over blocks; see :class:`nsa.backends.protocol.Backend`."""
    if _plain(q):
        step = load("sdpa").compressed_attention
        return step(q, k, v, config, cu_seqlens, max_seqlen=max_seqlen, q_start=q_start)
    places: tuple[Tensor | None, ...] = (None,) * 4
    if cu_seqlens is not None:
        places = block_places(cu_seqlens, q.shape[1], k.shape[1], config)
    block, stride, scale = config.compress_block, config.compress_stride, config.softmax_scale
    return compressed_op(q, k, v, *places, block, stride, scale, q_start)


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None = None,
    *,
    max_seqlen: int | None = None,
    q_start: int = 0,
    lse: Tensor | None = None,
) -> Tensor:
    """Top-n selection; see :class:`nsa.backends.protocol.Backend`."""
    if _plain(q):
        step = load("sdpa").select_blocks
        return step(q, k_cmp, config, cu_seqlens, max_seqlen=max_seqlen, q_start=q_start, lse=lse)
    if lse is None:
        with torch.no_grad():
            q, k_cmp = q.detach(), k_cmp.detach()
            _, lse = compressed_attention(
                q, k_cmp, k_cmp, config, cu_seqlens, max_seqlen=max_seqlen, q_start=q_start
            )
    return select("compiled", q, k_cmp, lse, config, cu_seqlens, max_seqlen, q_start)


def _select(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None,
    longest: int,
    q_start: int,
) -> Tensor:
    """See :class:`nsa.backends.shared.select_op.Selector`."""
    kernels = importlib.import_module("nsa.backends.compiled.select.launch")
    start = cmp_start = None
    if cu_seqlens is not None:
        token = token_members(cu_seqlens, q.shape[1])
        start = token.starts[token.seq].to(torch.int32)
        blocks = compressed_members(cu_seqlens, 0, config).starts
        cmp_start = blocks[token.seq].to(torch.int32)
    return kernels.select_forward(
        q,
        k_cmp,
        lse,
        start=start,
        cmp_start=cmp_start,
        compress_block=config.compress_block,
        compress_stride=config.compress_stride,
        select_block=config.select_block,
        num_selected=config.num_selected,
        num_initial=config.num_initial,
        num_local=config.num_local,
        scale=config.softmax_scale,
        q_start=q_start,
    )


SELECTORS["compiled"] = _select


def _gather(x: Tensor, block: int, stride: int, N: int) -> Tensor | None:
    """See :class:`nsa.compression.Copies`."""
    B, _, K, D = x.shape
    if not _copies(x, B, N * K * block * D):
        return None
    return importlib.import_module("nsa.backends.compiled.block_tokens").gather(x, block, stride, N)


def _scatter(grad: Tensor, T: int, stride: int) -> Tensor | None:
    """See :class:`nsa.compression.Copies`."""
    if not _copies(grad, grad.shape[0], grad[:1].numel()):
        return None
    return importlib.import_module("nsa.backends.compiled.block_tokens").scatter(grad, T, stride)


def _copies(x: Tensor, rows: int, elements: int) -> bool:
    """Whether the kernel takes so many rows of so many elements."""
    if not x.is_cuda or x.dtype not in _DTYPES:
        return False
    kernels = importlib.import_module("nsa.backends.compiled.block_tokens")
    return rows <= kernels.MOST_ROWS and elements <= kernels.MOST_ELEMENTS


COPIES["compiled"] = Copies(_gather, _scatter)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None = None,
    *,
    max_seqlen: int | None = None,
    q_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention over listed blocks; see :class:`nsa.backends.protocol.Backend`."""
    if _plain(q):
        step = load("sdpa").selected_attention
        return step(q, k, v, block_idx, config, cu_seqlens, max_seqlen=max_seqlen, q_start=q_start)
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    start = _start(cu_seqlens, q.shape[1])
    block, scale = config.select_block, config.softmax_scale
    return selected_op(q, k, v, block_idx, start, sequences, block, scale, q_start)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None = None,
    *,
    max_seqlen: int | None = None,
    q_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """A band of keys; see :class:`nsa.backends.protocol.Backend`."""
    if _plain(q):
        step = load("sdpa").window_attention
        return step(q, k, v, config, cu_seqlens, max_seqlen=max_seqlen, q_start=q_start)
    start, scale = _start(cu_seqlens, q.shape[1]), config.softmax_scale
    return window_op(q, k, v, start, config.window, scale, q_start)


def gated_attention(
    q: Tensor,
    compressed: KV,
    selected: KV,
    window: KV,
    gates: Tensor,
    out_cmp: Tensor,
    lse_cmp: Tensor,
    block_idx: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None = None,
    *,
    within_one: bool = False,
) -> Tensor:
    """See :class:`nsa.backends.protocol.Gated`."""
    places: tuple[Tensor | None, ...] = (None,) * 4
    if cu_seqlens is not None:
        places = block_places(cu_seqlens, q.shape[1], compressed.k.shape[1], config)
    sum_, *_ = gated_op(
        q,
        *compressed,
        *selected,
        *window,
        gates,
        out_cmp,
        lse_cmp,
        block_idx,
        _start(cu_seqlens, q.shape[1]),
        *places,
        1 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        config.compress_block,
        config.compress_stride,
        config.select_block,
        config.window,
        config.softmax_scale,
        within_one,
    )
    return sum_


def _plain(q: Tensor) -> bool:
    """Whether no Triton kernel runs here."""
    return q.device.type == "cpu" and not INTERPRETED


def _start(cu_seqlens: Tensor | None, total: int) -> Tensor | None:
    """int32 ``[T]``, the first token of each token's sequence when packed."""
    if cu_seqlens is None:
        return None
    token = token_members(cu_seqlens, total)
    return token.starts[token.seq].to(torch.int32)
