"""Record what every NSA layer of a model read: its queries, keys, gates and block lists.

B batch, T tokens, N compressed blocks, H query heads, K key/value heads, D key size, n listed
blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from nsa.config import NSAConfig
from nsa.core.inputs import AttentionInputs, Probe
from nsa.core.packing import block_offsets
from nsa.errors import ShapeError
from nsa.module import NSAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRecord:
    """What one layer computed from, for one sequence; positions and blocks count from its start."""

    config: NSAConfig
    q: Tensor
    """``[T, H, D]``, after RoPE."""
    k_compressed: Tensor
    """``[N, K, D]``, φ's keys."""
    k_selected: Tensor
    """``[T, K, D]``"""
    k_window: Tensor
    """``[T, K, D]``"""
    gates: Tensor
    """``[T, H, 3]``, activated, in the order compressed, selected, window."""
    block_idx: Tensor
    """int32 ``[T, K, n]``, ascending, then −1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCall:
    """One forward of one layer: tensors as the layer had them, detached, on its device."""

    layer: str
    """The module's name in the model; empty for the model itself."""
    config: NSAConfig
    q: Tensor
    """``[B, T, H, D]``"""
    k_compressed: Tensor
    """``[B, N, K, D]``"""
    k_selected: Tensor
    """``[B, T, K, D]``"""
    k_window: Tensor
    """``[B, T, K, D]``"""
    gates: Tensor
    """``[B, T, H, 3]``"""
    block_idx: Tensor
    """int32 ``[B, T, K, n]``: what :func:`nsa.nsa_attention` takes as ``block_idx=``."""
    cu_seqlens: Tensor | None
    """int32 ``[n_seq + 1]`` where sequences were packed."""

    def sequences(self) -> list[SequenceRecord]:
        """Split a batch into its rows, or packed input into its sequences; empty ones are left
        out. Reads ``cu_seqlens`` back from the device."""
        T, N = self.q.shape[1], self.k_compressed.shape[1]
        if self.cu_seqlens is None:
            rows = range(self.q.shape[0] if T else 0)
            return [self._part(b, slice(0, T), slice(0, N)) for b in rows]
        tokens = self.cu_seqlens.tolist()
        blocks = block_offsets(self.cu_seqlens, self.config).tolist()
        return [
            self._part(0, slice(*tokens[i : i + 2]), slice(*blocks[i : i + 2]))
            for i in range(len(tokens) - 1)
            if tokens[i] < tokens[i + 1]
        ]

    def _part(self, b: int, tokens: slice, blocks: slice) -> SequenceRecord:
        return SequenceRecord(
            config=self.config,
            q=self.q[b, tokens],
            k_compressed=self.k_compressed[b, blocks],
            k_selected=self.k_selected[b, tokens],
            k_window=self.k_window[b, tokens],
            gates=self.gates[b, tokens],
            block_idx=self.block_idx[b, tokens],
        )


@dataclass(slots=True)
class Recording:
    """What :func:`record` saw; it grows with every forward inside the ``with``."""

    calls: list[LayerCall] = field(default_factory=list)
    """In the order in which the layers ran."""

    @property
    def layers(self) -> list[str]:
        """Names of the layers that ran, in the order of their first run."""
        return list(dict.fromkeys(call.layer for call in self.calls))

    def of(self, layer: str) -> list[LayerCall]:
        """Every call of one layer."""
        return [call for call in self.calls if call.layer == layer]

    def lists(self) -> dict[str, Tensor]:
        """The block lists by layer, as :func:`replay` takes them.

        Raises:
            ShapeError: a layer ran more than once, or none did.
        """
        found = {call.layer: call.block_idx for call in self.calls}
        if len(found) != len(self.calls) or not found:
            raise ShapeError(
                f"expected one forward in the recording, got {len(self.calls)} calls of "
                f"{len(found)} layers; record each forward by itself"
            )
        return found


def nsa_layers(model: nn.Module) -> dict[str, NSAttention]:
    """The NSA layers of a model by name, in the model's order.

    Raises:
        ShapeError: there is none.
    """
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, NSAttention)}
    if not found:
        raise ShapeError(
            f"expected a model with nsa.NSAttention layers, got {type(model).__name__} without any"
        )
    return found


class Watcher:
    """A probe that changes nothing and sees nothing; others override one of the two."""

    def given(self, inputs: AttentionInputs) -> AttentionInputs:
        """See :meth:`nsa.core.inputs.Probe.given`."""
        return inputs

    def listed(self, inputs: AttentionInputs) -> None:
        """See :meth:`nsa.core.inputs.Probe.listed`."""


class _Recorder(Watcher):
    """Appends every call of one layer. A trace sees plain tensors in a list, and makes them outputs
    of its graph."""

    def __init__(self, layer: str, config: NSAConfig, calls: list[LayerCall]) -> None:
        self.layer, self.config, self.calls = layer, config, calls

    def listed(self, inputs: AttentionInputs) -> None:
        """Keep the call."""
        assert inputs.block_idx is not None
        self.calls.append(
            LayerCall(
                layer=self.layer,
                config=self.config,
                q=inputs.q.detach(),
                k_compressed=inputs.compressed.k.detach(),
                k_selected=inputs.selected.k.detach(),
                k_window=inputs.window.k.detach(),
                gates=inputs.gates.detach(),
                block_idx=inputs.block_idx,
                cu_seqlens=inputs.cu_seqlens,
            )
        )


@contextlib.contextmanager
def probed(model: nn.Module, probes: Mapping[str, Probe]) -> Iterator[None]:
    """Put a probe on each layer of these names, after those that are there, and take it off."""
    layers = nsa_layers(model)
    before = {name: layers[name].probes for name in probes}
    try:
        for name, probe in probes.items():
            layers[name].probes = (*(before[name] or ()), probe)
        yield
    finally:
        for name, kept in before.items():
            if kept is None:
                del layers[name].probes  # as it was, so that graphs made before are found again
            else:
                layers[name].probes = kept


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Record every forward of the NSA layers inside the ``with``.

    Results are what they are without it, on every backend: the recorder keeps what passes by. What
    is compiled is compiled once more, with what is recorded among its outputs. With activation
    checkpointing a forward that is recomputed is recorded again.

        with torch.no_grad(), record(model) as recording:
            model(tokens)
        recording.of("blocks.0.attention")[0].block_idx      # int32 [B, T, K, n]

    Raises:
        ShapeError: the model has no NSA layer.
    """
    recording = Recording()
    layers = nsa_layers(model)
    taps = {name: _Recorder(name, layer.config, recording.calls) for name, layer in layers.items()}
    with probed(model, taps):
        yield recording
