"""The public functions: they validate, choose a backend, run its steps, and sum the branches.

B batch, T tokens, N compressed blocks, H query heads, K key/value heads, D key size, V value size,
n listed blocks.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from nsa.backends.dispatch import Resolution, plan, settings_in_force
from nsa.backends.protocol import Problem
from nsa.config import KV, NSAConfig
from nsa.core import validate
from nsa.core.build import backward, build_once, kind, launches_soon, on_meta
from nsa.core.compile import compile_glue
from nsa.core.dtypes import accumulation_dtype, autocast_dtype
from nsa.core.inputs import AttentionInputs, Probe
from nsa.core.packing import packing_kept
from nsa.core.sharding import active
from nsa.core.toolchain import INTERPRETED
from nsa.errors import ShapeError
from nsa.registry import TABLE


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
            strictly ascending, then −1; given, nothing is selected. Only ``NSA_CHECK=1`` looks at
            the values. Without it any order does, and negative entries and blocks past the query
            are not read; but a block listed twice is summed once or twice, as the backend has it.
        backend: a name of the backend table; None obeys the settings.

    Returns:
        ``[B, T, H, V]`` in q's dtype. Gradients flow to q, every k and v, and the gates.

    Raises:
        ShapeError: inputs that do not fit together, or are no dense tensors.
        ConfigError: a config that is none.
        DataError: values that are not finite (``NSA_CHECK=1`` only).
        BackendUnavailable: the backend requested cannot run this.
    """
    settings = settings_in_force()
    inputs = AttentionInputs(
        q,
        validate.as_kv("compressed", compressed),
        validate.as_kv("selected", selected),
        validate.as_kv("window", window),
        gates,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        block_idx=block_idx,
    )
    inputs = validate.check_inputs(inputs, config, check=settings.check)
    _refuse_shards("nsa_attention")
    problem = Problem(
        config,
        q.device,
        q.dtype,
        inputs.length,
        cu_seqlens is not None,
        needs_grad(*inputs.differentiable),
    )
    chosen = plan(problem, backend, settings)
    build_kernels(chosen, inputs, config)
    runner = run_compiled if compiles_itself(chosen, q.device) else run
    with packing_kept(cu_seqlens):
        return runner(chosen, inputs, config, nvtx=settings.nvtx)


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
    _refuse_shards("select_blocks")
    check = settings.check and not q.is_meta
    max_seqlen = validate.check_packing(q, cu_seqlens, max_seqlen, check=check)
    validate.check_compressed("k_cmp", k_cmp, q, config, cu_seqlens, check=check)
    if check:
        blocks = validate.without_surplus(k_cmp, config, cu_seqlens)
        validate.check_finite({"q": q, "k_cmp": blocks})
    length = max_seqlen if packed and max_seqlen is not None else q.shape[1]
    problem = Problem(config, q.device, q.dtype, length, packed, needs_grad=False)
    step = plan(problem, backend, settings).step("select").select_blocks
    with no_autocast(q.device):
        block_idx = step(q, k_cmp, config, cu_seqlens, max_seqlen=max_seqlen)
    # a step need not list what cannot be
    return F.pad(block_idx, (0, config.num_selected - block_idx.shape[-1]), value=-1)


def run(
    chosen: Resolution,
    inputs: AttentionInputs,
    config: NSAConfig,
    *,
    gates_in_unit_interval: bool = False,
    nvtx: bool = False,
    probes: tuple[Probe, ...] | None = None,
) -> Tensor:
    """Run the steps of a plan on inputs that have been checked.

    ``gates_in_unit_interval``: every gate is in 0…1, as the layer knows of its own. ``probes`` are
    called in order; what one returns is the next one's input.
    """
    for probe in probes or ():
        inputs = probe.given(inputs)
    found = search(chosen, inputs, config, nvtx=nvtx)
    for probe in probes or ():
        probe.listed(inputs._replace(block_idx=found.block_idx))
    options = {"gates_in_unit_interval": gates_in_unit_interval, "nvtx": nvtx}
    return read(chosen, inputs, found, config, **options)


class Search(NamedTuple):
    """What the compressed branch finds: the first half of :func:`run`."""

    out: Tensor
    """``[B, T, H, V]``"""
    lse: Tensor
    """``[B, T, H]``"""
    block_idx: Tensor
    """int32 ``[B, T, K, n]``: what the selected branch is to read."""


def search(
    chosen: Resolution, inputs: AttentionInputs, config: NSAConfig, *, nvtx: bool = False
) -> Search:
    """The compressed branch and the lists; ``inputs.selected`` and ``window`` are not looked at."""
    q, cu_seqlens, block_idx = inputs.q, inputs.cu_seqlens, inputs.block_idx
    where: dict[str, Any] = {"max_seqlen": inputs.max_seqlen, "q_start": inputs.q_start}
    # no autograd graph where something else computes the gradients
    no_graph = contextlib.nullcontext() if chosen.gated() is None else torch.no_grad()
    with no_autocast(q.device):
        with _range("compressed", q, nvtx), no_graph:
            out, lse = chosen.step("compressed").compressed_attention(
                q, *inputs.compressed, config, cu_seqlens, **where
            )
        if block_idx is None:
            with _range("select", q, nvtx):
                block_idx = chosen.step("select").select_blocks(
                    q, inputs.compressed.k, config, cu_seqlens, **where, lse=lse
                )
    return Search(out, lse, block_idx)


def read(
    chosen: Resolution,
    inputs: AttentionInputs,
    found: Search,
    config: NSAConfig,
    *,
    gates_in_unit_interval: bool = False,
    nvtx: bool = False,
) -> Tensor:
    """The other branches and the gated sum: the second half of :func:`run`."""
    q, cu_seqlens = inputs.q, inputs.cu_seqlens
    out_cmp, lse, block_idx = found
    gated = chosen.gated()
    where: dict[str, Any] = {"max_seqlen": inputs.max_seqlen, "q_start": inputs.q_start}
    with no_autocast(q.device):
        if gated is not None:
            with _range("selected+window", q, nvtx):
                return gated.gated_attention(
                    inputs,
                    out_cmp,
                    lse,
                    block_idx,
                    config,
                    gates_in_unit_interval=gates_in_unit_interval,
                )
        with _range("selected", q, nvtx):
            out_slc, _ = chosen.step("selected").selected_attention(
                q, *inputs.selected, block_idx, config, cu_seqlens, **where
            )
        where["q_start"] = inputs.keys_before_window
        with _range("window", q, nvtx):
            out_win, _ = chosen.step("window").window_attention(
                q, *inputs.window, config, cu_seqlens, **where
            )
        return combine(inputs.gates, out_cmp, out_slc, out_win)


run_compiled = compile_glue(run, lambda chosen, inputs, config, **options: (chosen, config))
"""The same as one graph, where :func:`compiles_itself`."""


def compiles_itself(chosen: Resolution, device: torch.device) -> bool:
    """Whether what stands between a backend's steps goes through Inductor, unless a trace does.

    On a GPU a first call would wait half a minute for it: there kernels of this library stand in
    its place (:func:`launches_itself`).
    """
    return _has_glue(chosen) and device.type == "cpu" and not torch.compiler.is_compiling()


def launches_itself(chosen: Resolution, x: Tensor) -> bool:
    """Whether a layer's glue is kernels of this library: on a GPU and outside ``torch.func``.

    In a trace, too: they are as fast as what Inductor makes, which takes it long.
    """
    if not (_has_glue(chosen) and (x.is_cuda or INTERPRETED)):
        return False
    if torch.compiler.is_compiling():
        return True
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def _has_glue(chosen: Resolution) -> bool:
    return TABLE[chosen.backend].compiles_glue


def build_kernels(chosen: Resolution, inputs: AttentionInputs, config: NSAConfig) -> None:
    """Build what :func:`run` launches on these inputs, and what its backward does."""
    if not (_has_glue(chosen) and launches_soon(inputs.q)):
        return
    grad = needs_grad(*inputs.differentiable)
    cu_seqlens, block_idx = inputs.cu_seqlens, inputs.block_idx
    kinds = tuple(kind(x) for x in (*inputs.differentiable, cu_seqlens, block_idx))

    def rehearsal() -> None:
        def pair(x: KV) -> KV:
            return KV(*(on_meta(y, grad=grad) for y in x))

        given = inputs._replace(
            q=on_meta(inputs.q, grad=grad),
            compressed=pair(inputs.compressed),
            selected=pair(inputs.selected),
            window=pair(inputs.window),
            gates=on_meta(inputs.gates, grad=grad),
            cu_seqlens=on_meta(cu_seqlens),
            block_idx=on_meta(block_idx),
        )
        rehearse(chosen, given, config)

    build_once((chosen, config, grad, kinds), inputs.q.device, rehearsal)


def rehearse(
    chosen: Resolution, inputs: AttentionInputs, config: NSAConfig, **options: Any
) -> None:
    """Call :func:`run` on meta tensors, and its backward if gradients are wanted."""
    out = run(chosen, inputs, config, **options)
    if out.requires_grad:
        backward(out)


def combine(gates: Tensor, *outputs: Tensor) -> Tensor:
    """``Σ_c gate_c * o_c`` in fp32 (fp64 for fp64), rounded once to the branches' dtype.

    gates ``[B, T, H, 3]``, outputs ``[B, T, H, V]`` each.
    """
    wide = accumulation_dtype(outputs[0])
    # Copies: AOTAutograd would save slices beside the gates that their activation saves, and take
    # each for a buffer of its own. Inductor's backward may then overwrite one while the other is
    # still needed (torch 2.11 and 2.13): wrong gradients, in silence.
    terms = [
        gate.to(wide, copy=True)[..., None] * out.to(wide)
        for gate, out in zip(gates.unbind(-1), outputs, strict=True)
    ]
    return (terms[0] + terms[1] + terms[2]).to(outputs[0].dtype)


def needs_grad(*tensors: Tensor) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast off; nothing where it is off: a graph that sets it is not cached on the disk."""
    if autocast_dtype(device) is not None:
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _refuse_shards(function: str) -> None:
    if active() is not None:
        raise ShapeError(
            f"{function}: expected no context_parallel, of whose ranks it would see one alone; "
            "NSAttention attends across them"
        )


def _range(name: str, q: Tensor, nvtx: bool) -> contextlib.AbstractContextManager[object]:
    """An NVTX range, for a profiler; none in a compiled graph."""
    on = nvtx and q.is_cuda and not torch.compiler.is_compiling()
    return torch.cuda.nvtx.range(f"nsa.{name}") if on else contextlib.nullcontext()
