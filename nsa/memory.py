"""Bytes of one :class:`nsa.NSAttention`: parameters, what it keeps for backward, and the peak.

Formulas in the shapes, for regular batches; docs/memory.md derives them, and
``tests/api/test_memory.py`` holds the measured peak to them within 10%:

    layer_memory(config, dim, batch=1, length=8192, dtype=torch.bfloat16, backend="compiled").peak

The input of the layer, the gradient of its output and its parameters' gradients of earlier steps
are not counted; the output is. A model of several layers keeps what each keeps, and has the
working memory of one at a time.

B batch, T tokens, N compressed blocks, H query heads, K key/value heads, G heads per group, D key
size, V value size, L and d a compressed block and its stride, n selected blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from nsa.backends.compiled.selected.tiles import (
    dq_dtype,
    part_bytes,
    part_slices,
    tiles_for,
)
from nsa.backends.sdpa.numerics import CPU_CHUNK_ELEMENTS
from nsa.backends.sdpa.selected import EVEN
from nsa.backends.shared.block_tiles import TILE_ROWS
from nsa.config import NSAConfig
from nsa.core.dtypes import accumulation_dtype
from nsa.core.geometry import num_select_blocks
from nsa.core.linear import MIN_ROWS_TO_JOIN, ROW_ALIGNMENT
from nsa.errors import require_known

BACKENDS = ("sdpa", "compiled")
"""Those with formulas: ``sdpa`` on a CPU and called eagerly, ``compiled`` on a GPU."""


_PROGRAMS = 1024
"""Of a launch over few keys; ``backends/compiled/window/launch.py``."""
_ROWS = 64
"""Query rows of a tile there."""
_INDEX_BYTES = 28
"""Of the inverse index and of the sort that makes it, for each list and listed block."""


class Kept(NamedTuple):
    """A tensor that a forward pass keeps for its backward pass."""

    name: str
    shape: tuple[int, ...]
    itemsize: int

    @property
    def bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMemory:
    """Bytes of one layer."""

    parameters: int
    """Of the weights; their gradients take as much again."""
    kept: tuple[Kept, ...]
    """Between forward and backward, the layer's input left out."""
    phases: Mapping[str, int]
    """In use at each moment that can be the peak."""

    @property
    def saved(self) -> int:
        """All that is kept."""
        return sum(tensor.bytes for tensor in self.kept)

    @property
    def peak(self) -> int:
        """Of forward and backward."""
        return max(self.phases.values())


def layer_memory(
    config: NSAConfig,
    dim: int,
    *,
    batch: int,
    length: int,
    dtype: torch.dtype,
    backend: str,
    recompute: bool = False,
    autocast: bool = False,
) -> LayerMemory:
    """Count one layer's bytes on a regular batch.

    Args:
        config, dim: of the layer.
        batch, length: B and T; T at least ``compress_block``.
        dtype: of queries.
        backend: of :data:`BACKENDS`.
        recompute: of the layer.
        autocast: whether the weights are fp32 all the same (``compiled`` alone).

    Raises:
        ConfigError: a backend without formulas.
    """
    require_known("backend", backend, BACKENDS)
    s = _Shapes(config, dim, batch, length, dtype, autocast)
    kept = tuple(_kept_by_sdpa(s) if backend == "sdpa" else _kept_by_compiled(s))
    full = sum(tensor.bytes for tensor in kept)
    phases = (_sdpa_phases if backend == "sdpa" else _compiled_phases)(s, full)
    if recompute:
        kept = tuple(_kept_with_recompute(s, kept))
        phases = _phases_with_recompute(s, phases, sum(tensor.bytes for tensor in kept), backend)
    weight = 4 if autocast else s.e
    return LayerMemory(parameters=num_parameters(config, dim) * weight, kept=kept, phases=phases)


def attention_peak(config: NSAConfig, *, batch: int, length: int, dtype: torch.dtype) -> int:
    """Bytes that forward and backward of :func:`nsa.nsa_attention` take over its inputs.

    On ``compiled``, for a regular batch; the gradient of the output is an input.
    """
    s = _Shapes(config, 0, batch, length, dtype, autocast=False)
    kept = sum(tensor.bytes for tensor in _kept_by_compiled_call(s))
    return max(_compiled_call_phases(s, kept).values())


def num_parameters(config: NSAConfig, dim: int) -> int:
    """Trainable numbers of one layer."""
    H, D, V, L = config.num_heads, config.head_dim, config.dv, config.compress_block
    projections = dim * (_joined_rows(config) + H * V) + 3 * H
    phi = {
        "mlp": sum(L * x + 2 * x * (L * x + 1) + x * (2 * x + 1) for x in (D, V)),
        "linear": sum(x * (L * x + 1) for x in (D, V)),
        "mean": 0,
    }
    return projections + phi[config.compression]


def _joined_rows(config: NSAConfig) -> int:
    """Rows of all weights that the layer's input is multiplied with."""
    branches = 3 if config.independent_kv else 1
    key_value = config.num_kv_heads * (config.head_dim + config.dv)
    return config.num_heads * (config.head_dim + 3) + branches * key_value


class _Shapes(NamedTuple):
    config: NSAConfig
    dim: int
    B: int
    T: int
    dtype: torch.dtype
    autocast: bool

    @property
    def e(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def wide(self) -> int:
        """Bytes of an element of statistics and sums."""
        return accumulation_dtype(self.dtype).itemsize

    @property
    def N(self) -> int:
        return self.config.num_compressed(self.T)

    @property
    def branches(self) -> int:
        """Pairs of projections of keys and values."""
        return 3 if self.config.independent_kv else 1

    @property
    def out(self) -> int:
        """Elements of one branch's output."""
        return self.B * self.T * self.config.num_heads * self.config.dv

    @property
    def q(self) -> int:
        """Elements of the queries."""
        return self.B * self.T * self.config.num_heads * self.config.head_dim

    @property
    def kv(self) -> int:
        """Elements of one branch's keys and values."""
        c = self.config
        return self.B * self.T * c.num_kv_heads * (c.head_dim + c.dv)

    @property
    def statistics(self) -> int:
        """Elements of one branch's lse."""
        return self.B * self.T * self.config.num_heads

    @property
    def result(self) -> int:
        """Bytes of the layer's output."""
        return self.B * self.T * self.dim * self.e


def _joined(s: _Shapes) -> Iterator[Kept]:
    rows = -(-_joined_rows(s.config) // ROW_ALIGNMENT) * ROW_ALIGNMENT
    yield Kept("all projections' weights, joined", (rows, s.dim), s.e)


def _rope(s: _Shapes, tables: int) -> Iterator[Kept]:
    if s.config.rope_theta is not None:
        yield Kept("cosines and sines of RoPE", (2 * tables, s.T, s.config.head_dim // 2), s.wide)


def _phi(s: _Shapes) -> Iterator[Kept]:
    """What φ keeps besides its result."""
    c = s.config
    for name, size in (("keys", c.head_dim), ("values", c.dv)):
        rows = (s.B, s.N, c.num_kv_heads)
        if c.compression != "mean":
            yield Kept(f"φ of {name}: tokens of each block", (*rows, c.compress_block, size), s.e)
        if c.compression == "mlp":
            yield Kept(f"φ of {name}: before and after GELU", (2, *rows, 2 * size), s.e)


def _projected(s: _Shapes) -> Iterator[Kept]:
    """Queries, and the keys and values of the branches that read tokens."""
    c, BT = s.config, (s.B, s.T)
    yield Kept("q", (*BT, c.num_heads, c.head_dim), s.e)
    for branch in ("selected", "window")[: s.branches]:
        yield Kept(f"k, {branch}", (*BT, c.num_kv_heads, c.head_dim), s.e)
        yield Kept(f"v, {branch}", (*BT, c.num_kv_heads, c.dv), s.e)


def _lists(s: _Shapes) -> Kept:
    c = s.config
    return Kept("block_idx", (s.B, s.T, c.num_kv_heads, c.num_selected), 4)


def _out(s: _Shapes, name: str, itemsize: int | None = None) -> Kept:
    shape = (s.B, s.T, s.config.num_heads, s.config.dv)
    return Kept(name, shape, s.e if itemsize is None else itemsize)


def _lse(s: _Shapes, name: str, columns: int = 1) -> Kept:
    return Kept(name, (s.B, s.T, s.config.num_heads, columns)[: 3 + (columns > 1)], s.wide)


_OUTSIDE = (
    "all projections' weights, joined",
    "cosines and sines of RoPE",
    "x, cast",
    "o_proj's weight, cast",
    "gates",
    "block_idx",
)
"""What φ and the branches of a call read and make, and what is outside them."""


def _kept_with_recompute(s: _Shapes, every: tuple[Kept, ...]) -> Iterator[Kept]:
    yield from (tensor for tensor in every if tensor.name in _OUTSIDE)
    yield from _projected(s)
    if s.config.independent_kv:
        yield Kept("k and v, of φ's tokens", (s.kv,), s.e)
    yield _out(s, "sum")


def _phases_with_recompute(
    s: _Shapes, phases: Mapping[str, int], saved: int, backend: str
) -> dict[str, int]:
    """The backward pass has all that is kept otherwise, too, when it comes to this layer."""
    tokens = s.kv * s.e if s.config.independent_kv else 0
    outputs = 3 * (s.out * s.e + s.statistics * s.wide)
    found = {name: size + tokens for name, size in phases.items() if name.startswith("backward")}
    if "forward, selected" in phases:
        weight = s.dim * s.config.num_heads * s.config.dv * s.e
        given = s.result + s.out * s.e + weight
        found["backward, forward again"] = phases["forward, selected"] + given
    summing = 4 * s.out * s.wide if backend == "sdpa" else 0  # one kernel on compiled
    return {"forward": saved + outputs + summing, **found}


def _kept_by_sdpa(s: _Shapes) -> Iterator[Kept]:
    c = s.config
    K, D, V = c.num_kv_heads, c.head_dim, c.dv
    if s.B * s.T >= MIN_ROWS_TO_JOIN:
        yield from _joined(s)
    yield from _rope(s, 1 + s.branches)
    yield from _phi(s)
    yield Kept("gates", (s.B, s.T, c.num_heads, 3), s.e)
    # the selected branch keeps padded copies where sizes are odd to it
    D_, V_ = (-(-x // EVEN) * EVEN for x in (D, V))
    even = {"k, selected": D_ == D, "v, selected": V_ == V}
    yield from (x for x in _projected(s) if even.get(x.name, True) or not c.independent_kv)
    # PyTorch's fused kernel on a CPU: fp32 or fp64, one head size, keys of their own for every
    # query head where they had to be copied
    M, size, wide = c.compress_stride * c.group, max(D, V), s.wide
    rows = (s.B * K, M, s.N)
    yield Kept("q, folded", (*rows, size), wide)
    yield Kept("k, compressed", (*(rows if s.e < wide or D < V else (s.B * K, s.N)), size), wide)
    yield Kept("v, compressed", (*(rows if s.e < wide or V < D else (s.B * K, s.N)), size), wide)
    yield Kept("out, compressed, folded", (*rows, size), wide)
    yield Kept("lse, compressed, folded", rows, wide)
    yield _lists(s)
    BT = (s.B, s.T)
    if D_ != D:
        yield Kept("q and k, selected, padded", (*BT, c.num_heads + K, D_), s.e)
    if V_ != V:
        yield Kept("v, selected, padded", (*BT, K, V_), s.e)
    yield Kept("out, selected", (*BT, c.num_heads, V_), s.e)
    yield _lse(s, "lse, selected")
    yield _out(s, "out, window")
    yield _lse(s, "lse, window")
    yield _lse(s, "gates, a copy for each branch", 3)
    copies = (
        ("out, compressed", True),
        ("out, selected, a copy", s.e < wide),
        ("out, window, a copy", s.e < wide or (K > 1 and c.group > 1)),
    )
    yield from (_out(s, name, wide) for name, made in copies if made)
    yield _out(s, "sum")


def _sdpa_phases(s: _Shapes, saved: int) -> dict[str, int]:
    """The moments at which an eager pass of ``sdpa`` on a CPU has most in use."""
    c, e, wide = s.config, s.e, s.wide
    K, G, D, V = c.num_kv_heads, c.group, c.head_dim, c.dv
    out, q, kv = s.out * e, s.q * e, s.kv * e
    gates = 3 * s.statistics * wide
    copies = (2 if (K > 1 and G > 1) or e < wide else 1) + (e < wide)
    # of the selected branch: the pairs of the last chunk, and the rows that tiles have for them
    tokens = max(1, 16 * CPU_CHUNK_ELEMENTS // (K * c.num_selected * G * max(D, V)))
    pairs = min(tokens, s.B * s.T) * K * c.num_selected
    last = range(max(0, s.T - tokens), s.T)
    listed = sum(min(c.num_selected, t // c.select_block + 1) for t in last) / len(last)
    m = max(1, TILE_ROWS // G)
    rows = int(pairs * listed / c.num_selected) + m * s.B * K * num_select_blocks(s.T, c) // 2
    chunk, index = (rows + pairs) * G * wide, pairs * 80
    queries = min(tokens, s.B * s.T) * K * G * wide  # of the chunk: a sum for each, and casts
    cast = queries if e < wide else 0
    blocks = s.kv * wide
    to_come = out + gates + copies * s.out * wide + s.out * e  # sum, gates, copies, window's out
    phi_tokens = kv if c.independent_kv else 0
    done = saved + s.result - out - gates  # once the sum's own backward is through
    weight = s.dim * c.num_heads * V * e  # gradient of o_proj
    window = (2 * s.q + s.out + 2 * s.kv) * wide + q + 4 * CPU_CHUNK_ELEMENTS * wide
    return {
        "forward, selected": saved
        - to_come
        + phi_tokens
        + blocks
        + out
        + (chunk + queries) * V
        + cast * D
        + index,
        "forward, sum": saved + phi_tokens + 4 * s.out * wide + (2 * out if e < wide else 0),
        "backward, window": done - copies * s.out * wide + 3 * out + weight + window,
        "backward, selected": done
        - copies * s.out * wide
        - out
        + 2 * out
        + 2 * q
        + kv
        + weight
        + 2 * blocks
        + (chunk + queries) * D
        + cast * (D + V)
        + index,
    }


def _kept_by_compiled(s: _Shapes) -> Iterator[Kept]:
    c = s.config
    K, D, V, L = c.num_kv_heads, c.head_dim, c.dv, c.compress_block
    if s.autocast:
        yield Kept("x, cast", (s.B, s.T, s.dim), s.e)
        yield Kept("o_proj's weight, cast", (s.dim, c.num_heads * V), s.e)
    yield from _joined(s)
    yield from _rope(s, 1)
    yield from _phi(s)
    if c.compression == "mlp" and D == V:
        weights = 2 * (2 * D * L * D + 2 * D * D + L * D)
        yield Kept("φ's weights, stacked", (weights,), s.e)
    yield Kept("gates", (s.B, s.T, c.num_heads, 3), s.e)
    yield from _projected(s)
    yield Kept("k and v, compressed", (s.B, s.N, K, D + V), s.e)
    yield from _kept_by_compiled_call(s)


def _kept_by_compiled_call(s: _Shapes) -> Iterator[Kept]:
    yield _lists(s)
    for branch in ("compressed", "selected", "window"):
        yield _out(s, f"out, {branch}")
        yield _lse(s, f"lse, {branch}")
    yield _out(s, "sum")


def _compiled_phases(s: _Shapes, saved: int) -> dict[str, int]:
    """The moments at which the Triton kernels have most in use."""
    weight = s.dim * s.config.num_heads * s.config.dv * s.e  # gradient of o_proj
    call = _compiled_call_phases(s, saved + s.result + weight)
    phases = {**call, "forward": saved + s.result}
    if "forward, selected" in call:
        phases["forward, selected"] -= s.result + weight
    return phases


def _compiled_call_phases(s: _Shapes, saved: int) -> dict[str, int]:
    c, e = s.config, s.e
    K, D = c.num_kv_heads, c.head_dim
    dq = s.q * dq_dtype(s.dtype, D, c.dv, c.group).itemsize
    rows = (6 * 4 + 3 * e) * s.statistics  # statistics of every row, gradients of the gates
    compressed = s.B * s.N * K * (D + c.dv)
    index = s.B * -(-s.T // c.select_share) * K * c.num_selected * _INDEX_BYTES
    backward = saved + dq + rows + compressed * e
    later = 2 * s.out * e + s.statistics * s.wide  # window and sum
    far = _far_parts(s)
    return {
        "forward": saved,
        **({"forward, selected": saved - later + far} if far else {}),
        "backward, compressed": backward + _parts(s, s.N, s.N * c.compress_stride),
        "backward, window": backward + s.kv * e + _parts(s, s.T, c.window),
        "backward, selected": backward + s.kv * (e + 4) + index,
    }


def _far_parts(s: _Shapes) -> int:
    """Of far blocks in the forward of the selected branch, with their index."""
    c, K = s.config, s.config.num_kv_heads
    n, G = c.num_selected, c.group
    far = tiles_for(
        *(c.head_dim, c.dv, G),
        width=n,
        select_block=c.select_block,
        dtype=s.dtype,
        length=s.T,
        share=c.select_share,
    ).forward.far
    if far is None or s.T <= far.since:
        return 0
    token = part_bytes(n, G, c.dv, s.e)
    tokens, heads = part_slices(s.B, s.T, K, token=token, width=n)
    rows = s.B if tokens == s.T else 1
    return heads * tokens * token + rows * tokens * K * n * _INDEX_BYTES


def _parts(s: _Shapes, keys: int, reach: int) -> int:
    """Of dk and dv of so many keys, summed over parts of the queries until they fill the device."""
    c = s.config
    programs = -(-keys // (128 if c.head_dim > 64 else 64)) * s.B * c.num_kv_heads
    rows = max(1, _ROWS // c.group)
    splits = min(_PROGRAMS // max(1, programs), min(reach, s.T) // (rows * 16))
    size = s.B * keys * c.num_kv_heads * (c.head_dim + c.dv) * 4
    return splits * size + size // 2 if splits > 1 else 0
