"""The ``compiled`` backend: Triton kernels on a GPU, Inductor for what is between them.

- compressed: the sliding window's kernel, over keys that stand d tokens apart;
- select: scores and a running top-n in one kernel (``select/``);
- selected: several tokens on the union of their block lists (``selected/``);
- window: a sliding window (``window/``);
- their gated sum: the last two with the sum, and one backward for all (``gated/``);
- a step of decode: three kernels of its own (``decode/``).

What is around them (rotary embedding, gates) is plain PyTorch, which Inductor compiles inside a
user's ``torch.compile``. Called eagerly on a GPU Inductor compiles nothing: the projections are
split and rotated by one kernel (:mod:`nsa.core.split_heads`), and a first call builds all kernels
side by side (:mod:`nsa.core.build`). On a CPU :mod:`nsa.core.compile` compiles the whole, and that
is all: the branches are ``sdpa``'s there, whose loops over chunks that fit in a cache are faster
than what Inductor makes of a sliding window (docs/experiments.md).

The step signature is the one of :mod:`nsa.backends.protocol`.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from nsa.backends.compiled.gated.op import gated_attention as gated_op
from nsa.backends.compiled.ops import compressed_attention as compressed_op
from nsa.backends.compiled.ops import selected_attention as selected_op
from nsa.backends.compiled.ops import window_attention as window_op
from nsa.backends.compiled.selected.tiles import shared_tokens
from nsa.backends.protocol import STEPS, Problem
from nsa.backends.shared.select_op import select
from nsa.config import NSAConfig
from nsa.core.inputs import AttentionInputs, DecodeInputs
from nsa.core.packing import block_bounds, sequence_starts
from nsa.core.toolchain import INTERPRETED, cpu_refusal, gpu_refusal
from nsa.settings import Settings

MAX_HEAD = 256
_MIN_CAPABILITY = (8, 0)
_FP8_CAPABILITY = (8, 9)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unavailable(problem: Problem, settings: Settings) -> str | None:
    """Why this backend cannot run the problem, or None."""
    device, config = problem.device, problem.config
    if device.type == "cpu" and not INTERPRETED:
        return cpu_refusal()
    if device.type not in ("cuda", "cpu"):
        return f"compiled needs a CUDA device or a CPU, got {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "compiled needs triton on a GPU: pip install triton (PyTorch's CUDA builds bring it)"
    if device.type == "cuda":
        refusal = gpu_refusal()
        if refusal is not None:
            return refusal
        capability = torch.cuda.get_device_capability(device)
        if capability < _MIN_CAPABILITY:
            return f"compiled needs sm80 or newer, got sm{capability[0]}{capability[1]}"
        if config.score_dtype == "fp8" and capability < _FP8_CAPABILITY:
            return (
                "compiled needs sm89 or newer for score_dtype='fp8', got "
                f"sm{capability[0]}{capability[1]}: use score_dtype='input'"
            )
    if problem.dtype not in _DTYPES:
        return f"compiled takes float16, bfloat16 and float32 on a GPU, got {problem.dtype}"
    size = max(config.head_dim, config.dv)
    if size > MAX_HEAD:
        return f"compiled takes head sizes up to {MAX_HEAD}, got {size}"
    return None


def delegated(problem: Problem, settings: Settings) -> dict[str, str]:
    """All steps on a CPU, which ``sdpa`` runs."""
    if problem.device.type != "cpu" or INTERPRETED:
        return {}
    return dict.fromkeys(STEPS, "on a CPU")


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
    bounds = _bounds(cu_seqlens, q.shape[1], k.shape[1], config)
    return compressed_op(q, k, v, *bounds, config.key, q_start)


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
    if lse is None:
        with torch.no_grad():
            q, k_cmp = q.detach(), k_cmp.detach()
            _, lse = compressed_attention(
                q, k_cmp, k_cmp, config, cu_seqlens, max_seqlen=max_seqlen, q_start=q_start
            )
    return select("compiled", q, k_cmp, lse, config, cu_seqlens, max_seqlen, q_start)


def select_impl(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None,
    longest: int,
    q_start: int,
) -> Tensor:
    """See :func:`nsa.backends.shared.select_op.select`."""
    from nsa.backends.compiled.select.launch import select_forward

    return select_forward(q, k_cmp, lse, config, cu_seqlens, q_start=q_start, longest=longest)


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
    start = _seq_start(cu_seqlens, q.shape[1])
    return selected_op(q, k, v, block_idx, start, _sequences(cu_seqlens), config.key, q_start)


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
    """Sliding window; see :class:`nsa.backends.protocol.Backend`."""
    return window_op(q, k, v, _seq_start(cu_seqlens, q.shape[1]), config.key, q_start)


def gated_attention(
    inputs: AttentionInputs,
    out_cmp: Tensor,
    lse_cmp: Tensor,
    block_idx: Tensor,
    config: NSAConfig,
    *,
    gates_in_unit_interval: bool = False,
) -> Tensor:
    """See :class:`nsa.backends.protocol.Gated`."""
    cu_seqlens = inputs.cu_seqlens
    share = 1  # a caller's lists may be any
    if inputs.block_idx is None:
        share = shared_tokens(inputs.q, inputs.selected.v, config.select_share)
    cmp_start, start, *seen = _bounds(
        cu_seqlens, inputs.q.shape[1], inputs.compressed.k.shape[1], config
    )
    sum_, *_ = gated_op(
        *inputs.differentiable,
        out_cmp,
        lse_cmp,
        block_idx,
        start,
        cmp_start,
        *seen,
        _sequences(cu_seqlens),
        config.key,
        share,
        inputs.q_start,
        inputs.keys_before_window,
        gates_in_unit_interval,
    )
    return sum_


def decode_unavailable(problem: Problem, *, e4m3: bool) -> str | None:
    """Why ``sdpa`` runs a step of decode, or None."""
    if problem.device.type != "cuda":
        return "compiled has kernels for a GPU alone"
    from nsa.backends.compiled.decode.launch import without_kernel

    return without_kernel(problem.config, e4m3=e4m3)


def decode_attention(inputs: DecodeInputs, config: NSAConfig) -> tuple[Tensor, Tensor]:
    """One step of decode: ``(out, block_idx)``; see :mod:`nsa.backends.compiled.decode.launch`."""
    from nsa.backends.compiled.decode.launch import decode_attention

    return decode_attention(inputs, config)


def _bounds(
    cu_seqlens: Tensor | None, total: int, rows: int, config: NSAConfig
) -> tuple[Tensor | None, ...]:
    """:func:`nsa.core.packing.block_bounds`, or four times None for a regular batch."""
    if cu_seqlens is None:
        return (None,) * 4
    return block_bounds(cu_seqlens, total, rows, config)


def _seq_start(cu_seqlens: Tensor | None, total: int) -> Tensor | None:
    """int32 ``[T]``, the first token of each token's sequence when packed."""
    if cu_seqlens is None:
        return None
    return sequence_starts(cu_seqlens, total)


def _sequences(cu_seqlens: Tensor | None) -> int:
    """At most so many packed sequences."""
    return 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
