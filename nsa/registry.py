"""The table of backends: one row says all that the library asks of one.

Data alone, at the bottom of the import order, so that settings, dispatch and tools read the same
rows. A new backend is one module with the steps of :mod:`nsa.backends.protocol` and one row here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One backend."""

    module: str
    """Where its steps are; imported at the first use."""
    summary: str
    """One line for people."""
    rank: int | None = None
    """Place in the order in which ``auto`` tries backends, lowest first; None: never tried."""
    auto_devices: tuple[str, ...] = ()
    """Device types on which ``auto`` may choose it; empty: any."""
    packed: bool = True
    """Whether it takes packed sequences (``cu_seqlens``)."""
    shards: bool = True
    """Whether it takes some rows of a sequence with gradients, as context parallelism has them."""
    selects: bool = True
    """Whether it has a ``select_blocks`` of its own; else the best ranked row with one selects."""
    decodes: bool = False
    """Whether it has a ``decode_attention``, for a step of a few tokens on a cache."""
    compiles_glue: bool = False
    """Whether what stands between its steps is made into few kernels outside a trace, too: by
    Inductor on a CPU, by this library on a GPU (:mod:`nsa.attention`)."""
    fa2: bool = False
    """Whether it runs on FlashAttention-2, so that ``NSA_USE_FA2`` speaks of it."""
    settings: tuple[str, ...] = ()
    """Fields of :class:`nsa.Settings` that its steps are bound to."""


TABLE: dict[str, Row] = {
    "reference": Row(
        module="nsa.reference",
        summary="the oracle: dense masks, explicit softmax, quadratic",
        shards=False,
    ),
    "sdpa": Row(
        module="nsa.backends.sdpa.steps",
        summary="pure PyTorch, vectorised and chunked, memory linear in T",
        rank=3,
        decodes=True,
    ),
    "fa2-dense": Row(
        module="nsa.backends.fa2.dense",
        summary="FlashAttention-2 on regular batches",
        rank=1,
        auto_devices=("cuda",),
        packed=False,
        selects=False,
        fa2=True,
        settings=("fa2_provider",),
    ),
    "fa2-varlen": Row(
        module="nsa.backends.fa2.varlen",
        summary="FlashAttention-2 on packed sequences",
        rank=2,
        auto_devices=("cuda",),
        selects=False,
        fa2=True,
        settings=("fa2_provider", "prealloc_varlen_n", "prealloc_varlen_k"),
    ),
    "compiled": Row(
        module="nsa.backends.compiled.steps",
        summary="Triton kernels, and torch.compile around them",
        rank=0,
        auto_devices=("cuda",),
        decodes=True,
        compiles_glue=True,
    ),
}


def names() -> tuple[str, ...]:
    """Names that a request may give: the rows, and "auto" first."""
    return "auto", *TABLE


def ranked(device: str) -> list[str]:
    """Rows that ``auto`` tries on a type of device, the best first."""
    rows = [
        (row.rank, name)
        for name, row in TABLE.items()
        if row.rank is not None and (not row.auto_devices or device in row.auto_devices)
    ]
    return [name for _, name in sorted(rows)]


def fa2_names() -> list[str]:
    """The FlashAttention-2 rows."""
    return [name for name, row in TABLE.items() if row.fa2]


def fa2_backend(*, packed: bool) -> str:
    """The first FlashAttention-2 row that takes such a batch."""
    return next(name for name in fa2_names() if TABLE[name].packed or not packed)
