"""One record of what attention reads, passed down from the public function to a backend."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from nsa.config import KV

BRANCHES = ("compressed", "selected", "window")


class AttentionInputs(NamedTuple):
    """The tensors of one call of :func:`nsa.nsa_attention`.

    B batch, T query tokens, S key tokens, N compressed blocks, H query heads, K key/value heads,
    D key size, V value size.
    """

    q: Tensor
    """``[B, T, H, D]``"""
    compressed: KV
    """φ's output: k ``[B, N, K, D]``, v ``[B, N, K, V]``."""
    selected: KV
    """k ``[B, S, K, D]``, v ``[B, S, K, V]``; S is ``q_start + T``."""
    window: KV
    """The same shapes."""
    gates: Tensor
    """``[B, T, H, 3]``, activated."""
    cu_seqlens: Tensor | None = None
    """int32 ``[n_seq + 1]`` where sequences are packed (B is 1)."""
    max_seqlen: int | None = None
    """An upper bound of the packed lengths, in tokens."""
    block_idx: Tensor | None = None
    """int32 ``[B, T, K, n]``; None: selected here."""
    q_start: int = 0
    """The position of q's first row; keys start at position 0. 0 where packed."""
    window_start: int | None = None
    """How many keys of ``window`` come before q's first row; None: all, ``q_start``."""

    @property
    def keys_before_window(self) -> int:
        """``window_start``, as a number."""
        return self.q_start if self.window_start is None else self.window_start

    @property
    def length(self) -> int:
        """Tokens of the longest sequence, as far as it is known without reading the device."""
        if self.cu_seqlens is None or self.max_seqlen is None:
            return self.q_start + self.q.shape[1]
        return self.max_seqlen

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        """The tensors that gradients flow to."""
        return (self.q, *self.compressed, *self.selected, *self.window, self.gates)


class DecodeInputs(NamedTuple):
    """The tensors of one step of decode: a few new queries of every sequence and its cache.

    The step's own keys and values are in the cache already. Sequences have lengths of their own.

    B sequences, S new tokens of each, N compressed blocks that there is room for, P pages of L
    tokens, M pages that a sequence may have, R rows of a ring, H query heads, K key/value heads,
    D key size, V value size.
    """

    q: Tensor
    """``[B, S, H, D]``, after RoPE."""
    position: Tensor
    """int32 ``[B]``: of each sequence's first query in that sequence; the others follow it."""
    gates: Tensor
    """``[B, S, H, 3]``, activated."""
    compressed: KV
    """k ``[B, N, K, D]``, v ``[B, N, K, V]``; blocks that a query does not see mean nothing."""
    selected: KV
    """k ``[P, L, K, D]``, v ``[P, L, K, V]``: pages of L tokens, a multiple of ``select_block``."""
    page_table: Tensor
    """int32 ``[B, M]``: token t of sequence b is row ``t % L`` of page ``page_table[b, t // L]``;
    entries past a sequence's end mean nothing."""
    window: KV
    """k ``[B, R, K, D]``, v ``[B, R, K, V]``: token t is row ``t % R``, R at least
    ``config.window + S - 1``."""
    block_idx: Tensor | None = None
    """int32 ``[B, S, K, n]``, ascending, then −1; None: selected here."""
    selected_scale: KV | None = None
    """fp32 ``[P, L, K]`` twice where ``selected`` is e4m3: what a row is multiplied by."""
    list_before: Tensor | None = None
    """With ``select_share``: int32 ``[B, K, n]``, what each sequence's first query reads if the one
    whose list that is came before this step."""


class Probe(Protocol):
    """Watches the calls of a layer, or steps into them; see :mod:`nsa.inspection`."""

    def given(self, inputs: AttentionInputs) -> AttentionInputs:
        """Return what to compute in place of ``inputs``: the same, or other gates or lists."""
        ...

    def listed(self, inputs: AttentionInputs) -> None:
        """See the inputs with the list that is read; nothing may be changed."""
        ...
