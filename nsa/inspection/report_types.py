"""What a report holds: numbers by layer, as plain dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

UNIONS = (4, 10, 16)
"""Consecutive tokens whose blocks are counted together."""
BINS = 20
"""Of a gate's histogram, over 0…1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A share over many queries, which every one of them would like to be high."""

    mean: float
    worst: float
    """Of the worst query and group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """The share of a list's blocks that are on another list."""

    all: float
    ranked: float | None
    """Of the blocks that are not forced; None where all are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """The gates of one branch in one layer."""

    mean: float
    heads: tuple[float, ...]
    """The mean of each head."""
    histogram: tuple[float, ...]
    """The share of gates in each of :data:`BINS` bins over 0…1; the outer ones hold what lies
    beyond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkReport:
    """The attention that a branch gives to the first tokens of a sequence."""

    mass: float
    uniform: float
    """What they would get if every key that a query sees got the same."""
    heads: tuple[float, ...]
    """The mass by head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Brief:
    """The cheap part of a layer's report, for a training run."""

    layer: str
    gates: dict[str, float]
    """The mean by branch."""
    overlap_token: float | None
    mass_kept: float | None
    same_a_block_later: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One layer. What describes lists is of queries with a choice, those that see more blocks than
    they read; None where there are none."""

    layer: str
    choosing: float
    """The share of queries (and groups) with a choice."""
    overlap_token: Overlap | None
    """With the token before."""
    overlap_layer: Overlap | None
    """With the layer before; None in the first, or where the layers are not alike."""
    overlap_groups: Overlap | None
    """With the other groups; None where there is one."""
    same_a_block_later: float | None
    """The share of ranked blocks that the query one block before reads as well; near 1, lists do
    not depend on the query. Of queries that see at least twice what they read."""
    unions: dict[int, float] | None
    """Distinct blocks that so many consecutive tokens read together, on average."""
    listed: float | None
    """Blocks on a list, on average."""
    mass_selected: Spread | None
    """Share of dense attention's mass inside the blocks listed."""
    mass_read: Spread | None
    """Inside the blocks listed or the window."""
    mass_best: Spread | None
    """Inside the oracle's list, which is the best of the same rules."""
    mass_random: Spread | None
    """Inside lists as long that rank at random, on average."""
    recall: Spread | None
    """Share of the oracle's ranked blocks that are listed."""
    chance: float | None
    """How likely such a list has a given block: what recall, and the overlap of ranked blocks with
    the layer before, would be at random."""
    mass_kept: Spread | None
    """Share of the selection scores inside the blocks listed."""
    entropy: float | None
    """Nats, of the scores as a distribution over blocks."""
    entropy_uniform: float | None
    """The most it could be."""
    gates: dict[str, GateReport]
    """By branch."""
    sinks: dict[str, SinkReport]
    """By branch, and "dense" for dense attention; a branch without queries that could tell is left
    out."""
    block_map: tuple[tuple[tuple[float, ...], ...], ...]
    """By group, a query × block map of the longest sequence: how much of each tile is read."""

    def brief(self) -> Brief:
        """The part that a training run logs."""
        return Brief(
            layer=self.layer,
            gates={branch: gate.mean for branch, gate in self.gates.items()},
            overlap_token=None if self.overlap_token is None else self.overlap_token.all,
            mass_kept=None if self.mass_kept is None else self.mass_kept.mean,
            same_a_block_later=self.same_a_block_later,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionReport:
    """Every layer of a recording, in the order in which they ran."""

    sequences: tuple[int, ...]
    """Tokens of each sequence."""
    layers: tuple[LayerReport, ...]
