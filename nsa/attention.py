"""The public functions: they validate, resolve a backend, run its steps, and mix the branches.

B batch, T tokens, N compressed blocks, H query heads, K key/value heads, D key size, V value size,
n listed blocks.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from nsa.backends.dispatch import Plan, plan, settings_in_force
from nsa.config import KV, NSAConfig
from nsa.core import validate
from nsa.core.compile import fused
from nsa.settings import Settings


def nsa_attention(
    q: Tensor,
    compressed: KV,
    selected: KV,
    window: KV,
    gates: Tensor,
    config: NSAConfig,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    block_idx: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Native sparse attention: the gated sum of its three branches (arXiv 2502.11089, Eq. 5).

    Args:
        q: ``[B, T, H, D]``; fp16, bf16, fp32 or fp64.
        compressed: φ's output, k ``[B, N, K, D]`` and v ``[B, N, K, V]`` with
            ``N = (T - l)//d + 1``; packed, any number of rows that is enough
            (``total // d`` always is).
        selected: k ``[B, T, K, D]`` and v ``[B, T, K, V]``.
        window: the same shapes.
        gates: ``[B, T, H, 3]``, already activated, in the order compressed, selected, window;
            q's dtype or fp32.
        config: geometry and scale.
        cu_seqlens: int32 ``[n_seq + 1]`` where sequences are packed, ``B = 1``; empty ones are
            legal.
        max_seqlen: an upper bound of the packed lengths, in tokens; None means the total, so that
            nothing is read back from the device.
        block_idx: int32 ``[B, T, K, width]``, blocks of ``l'`` tokens of the query's own sequence,
            strictly ascending, then −1; given, nothing is selected.
        backend: a name of the backend table; None obeys the settings.

    Returns:
        ``[B, T, H, V]`` in q's dtype. Gradients flow to q, every k and v, and the gates.

    Raises:
        ShapeError: inputs that do not fit together.
        DataError: values that are not finite (``NSA_CHECK=1`` only).
        BackendUnavailable: the backend asked for cannot run this.
    """
    settings = settings_in_force()
    compressed, selected, window = KV(*compressed), KV(*selected), KV(*window)
    check_inputs(
        q,
        compressed,
        selected,
        window,
        gates,
        config,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        block_idx=block_idx,
        settings=settings,
    )
    chosen = plan(
        config,
        device=q.device,
        dtype=q.dtype,
        length=_longest(q, cu_seqlens, max_seqlen),
        packed=cu_seqlens is not None,
        needs_grad=needs_grad(q, *compressed, *selected, *window, gates),
        backend=backend,
        settings=settings,
    )
    runner = run_fused if chosen.backend == "compiled" else run
    return runner(
        chosen,
        q,
        compressed,
        selected,
        window,
        gates,
        config,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        block_idx=block_idx,
        settings=settings,
    )


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    config: NSAConfig,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The blocks each query reads in the selected branch (arXiv 2502.11089, Eq. 8–12).

    Args:
        q: ``[B, T, H, D]``.
        k_cmp: φ's keys ``[B, N, K, D]``.
        config, cu_seqlens, max_seqlen, backend: as in :func:`nsa_attention`.

    Returns:
        int32 ``[B, T, K, num_selected]``: strictly ascending, then −1; numbers count from the
        start of the query's own sequence. It carries no gradient.

    Raises:
        ShapeError, DataError, BackendUnavailable: as in :func:`nsa_attention`.
    """
    settings = settings_in_force()
    packed = cu_seqlens is not None
    validate.check_query(q, config)
    validate.check_packing(q, cu_seqlens, max_seqlen, check=settings.check)
    validate.check_compressed("k_cmp", k_cmp, q, config, cu_seqlens, check=settings.check)
    if settings.check:
        blocks = validate.without_surplus(k_cmp, config, cu_seqlens)
        validate.check_finite({"q": q, "k_cmp": blocks})
    chosen = plan(
        config,
        device=q.device,
        dtype=q.dtype,
        length=_longest(q, cu_seqlens, max_seqlen),
        packed=packed,
        needs_grad=False,
        backend=backend,
        settings=settings,
    )
    step = chosen.step("select").select_blocks
    with torch.autocast(q.device.type, enabled=False):
        return step(q, k_cmp, config, cu_seqlens, max_seqlen=max_seqlen)


def check_inputs(
    q: Tensor,
    compressed: KV,
    selected: KV,
    window: KV,
    gates: Tensor,
    config: NSAConfig,
    *,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    block_idx: Tensor | None,
    settings: Settings,
) -> None:
    """Everything that is checked before a backend sees the inputs."""
    validate.check_query(q, config)
    validate.check_packing(q, cu_seqlens, max_seqlen, check=settings.check)
    for part, x in zip("kv", compressed, strict=True):
        validate.check_compressed(
            f"compressed.{part}", x, q, config, cu_seqlens, check=settings.check
        )
    if compressed.k.shape[1] != compressed.v.shape[1]:
        validate.check_like_query(
            "compressed.v", compressed.v, q, (1, compressed.k.shape[1], None, None)
        )
    validate.check_kv("selected", selected, q, config)
    validate.check_kv("window", window, q, config)
    validate.check_gates(gates, q)
    if block_idx is not None:
        validate.check_block_idx(block_idx, q, config, cu_seqlens, check=settings.check)
    if settings.check:
        check_values(q, compressed, selected, window, gates, config, cu_seqlens)


def check_values(
    q: Tensor,
    compressed: KV,
    selected: KV,
    window: KV,
    gates: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None,
) -> None:
    """Every input is finite (``NSA_CHECK=1`` only)."""
    validate.check_finite(
        {
            "q": q,
            "compressed.k": validate.without_surplus(compressed.k, config, cu_seqlens),
            "compressed.v": validate.without_surplus(compressed.v, config, cu_seqlens),
            "selected.k": selected.k,
            "selected.v": selected.v,
            "window.k": window.k,
            "window.v": window.v,
            "gates": gates,
        }
    )


def run(
    chosen: Plan,
    q: Tensor,
    compressed: KV,
    selected: KV,
    window: KV,
    gates: Tensor,
    config: NSAConfig,
    *,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    block_idx: Tensor | None,
    settings: Settings,
    within_one: bool = False,
) -> Tensor:
    """Runs the steps of a plan on inputs that have been checked; ``within_one``: all gates are."""
    gated = chosen.gated()
    with torch.autocast(q.device.type, enabled=False):
        with _range("compressed", q, settings), _graph_unless(gated is not None):
            out_cmp, lse = chosen.step("compressed").compressed_attention(
                q, *compressed, config, cu_seqlens, max_seqlen=max_seqlen
            )
        if block_idx is None:
            with _range("select", q, settings):
                block_idx = chosen.step("select").select_blocks(
                    q,
                    compressed.k,
                    config,
                    cu_seqlens,
                    max_seqlen=max_seqlen,
                    lse=lse,
                )
        if gated is not None:
            with _range("selected+window", q, settings):
                return gated.gated_attention(
                    q,
                    compressed,
                    selected,
                    window,
                    gates,
                    out_cmp,
                    lse,
                    block_idx,
                    config,
                    cu_seqlens,
                    within_one=within_one,
                )
        with _range("selected", q, settings):
            out_slc, _ = chosen.step("selected").selected_attention(
                q, *selected, block_idx, config, cu_seqlens, max_seqlen=max_seqlen
            )
        with _range("window", q, settings):
            out_win, _ = chosen.step("window").window_attention(
                q, *window, config, cu_seqlens, max_seqlen=max_seqlen
            )
        return combine(gates, out_cmp, out_slc, out_win)


run_fused = fused(run)
"""The same for the ``compiled`` backend, as one graph."""


def combine(gates: Tensor, *outputs: Tensor) -> Tensor:
    """``Σ_c gate_c * o_c`` in fp32 (fp64 for fp64), rounded once to the branches' dtype.

    gates ``[B, T, H, 3]``, outputs ``[B, T, H, V]`` each.
    """
    dtype = outputs[0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    terms = [
        gate[..., None].to(wide) * out.to(wide)
        for gate, out in zip(gates.unbind(-1), outputs, strict=True)
    ]
    return (terms[0] + terms[1] + terms[2]).to(dtype)


def needs_grad(*tensors: Tensor) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _longest(q: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> int:
    return q.shape[1] if cu_seqlens is None or max_seqlen is None else max_seqlen


def _graph_unless(off: bool) -> contextlib.AbstractContextManager[object]:
    """No autograd graph where something else computes the gradients."""
    return torch.no_grad() if off else contextlib.nullcontext()


def _range(name: str, q: Tensor, settings: Settings) -> contextlib.AbstractContextManager[object]:
    """An NVTX range under ``NSA_NVTX=1``, for a profiler; none in a compiled graph."""
    if not (settings.nvtx and q.is_cuda) or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch.cuda.nvtx.range(f"nsa.{name}")
