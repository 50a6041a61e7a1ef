"""The report on a recording: every measure by layer, averaged over its queries.

T tokens, J selection blocks, H query heads, K key/value heads, G heads per group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from nsa.config import NSAConfig
from nsa.core.geometry import num_select_blocks
from nsa.core.inputs import BRANCHES
from nsa.errors import ShapeError
from nsa.inspection.dense import dense_measures
from nsa.inspection.lists import (
    NAN,
    block_map,
    candidate_and_forced,
    chance_of_block,
    has_choice,
    listed_blocks,
    overlap_with_other_groups,
    overlap_with_token_before,
    ranked_blocks,
    same_a_block_later,
    shared_part,
    union_sizes,
)
from nsa.inspection.recording import Recording, SequenceRecord, record
from nsa.inspection.report_types import (
    BINS,
    UNIONS,
    AttentionReport,
    Brief,
    GateReport,
    LayerReport,
    Overlap,
    SinkReport,
    Spread,
)
from nsa.inspection.scores import score_measures
from nsa.inspection.sinks import sinks

MAP_ROWS, MAP_COLUMNS = 128, 128
"""Tiles of a query × block map at most."""


@torch.no_grad()
def inspect(model: nn.Module, *args: object, **kwargs: object) -> AttentionReport:
    """Run ``model(*args, **kwargs)`` once and report what its NSA layers read.

    Raises:
        ShapeError: the model has no NSA layer, or none ran.
    """
    with record(model) as recording:
        model(*args, **kwargs)
    return report(recording)


def report(recording: Recording) -> AttentionReport:
    """Report on every layer of a recording; sequences of a batch or of several forwards count
    together.

    Raises:
        ShapeError: nothing was recorded.
    """
    layers = tuple(layer_reports(recording))
    if not layers:
        raise ShapeError("expected a forward of at least one token inside record(model), got none")
    first = recording.of(layers[0].layer)
    sequences = [len(part.q) for call in first for part in call.sequences()]
    return AttentionReport(sequences=tuple(sequences), layers=layers)


@torch.no_grad()
def layer_reports(recording: Recording) -> Iterator[LayerReport]:
    """Yield the report of each layer in turn; at T = 8192 each may take a minute on a CPU."""
    before: list[Tensor] = []
    for layer, records, listed in _by_layer(recording):
        alike = [x.shape for x in before] == [x.shape for x in listed]
        others = before if alike else [None] * len(listed)
        parts = [_by_query(*x) for x in zip(records, listed, others, strict=True)]
        by = _Measured({name: torch.cat([x[name] for x in parts]) for name in parts[0]})
        yield LayerReport(
            layer=layer,
            choosing=by.choosing.float().mean().item(),
            overlap_token=by.overlap("overlap_token"),
            overlap_layer=by.overlap("overlap_layer"),
            overlap_groups=by.overlap("overlap_groups"),
            same_a_block_later=by.mean("same_a_block_later"),
            unions=_unions(listed, records[0].config),
            listed=by.mean("listed"),
            mass_selected=by.spread("mass_selected"),
            mass_read=by.spread("mass_read"),
            mass_best=by.spread("mass_best"),
            mass_random=by.spread("mass_random"),
            recall=by.spread("recall"),
            chance=by.mean("chance"),
            mass_kept=by.spread("mass_kept"),
            entropy=by.mean("entropy"),
            entropy_uniform=by.mean("entropy_uniform"),
            gates=_gates(torch.cat([part.gates for part in records])),
            sinks=_sinks(by.values),
            block_map=_block_map(max(listed, key=len)),
        )
        before = listed


@torch.no_grad()
def briefs(recording: Recording) -> list[Brief]:
    """The cheap part of :func:`report`: nothing in it grows faster than selection itself."""
    found = []
    for layer, records, listed in _by_layer(recording):
        config = records[0].config
        pairs = list(zip(records, listed, strict=True))
        choosing = torch.cat([has_choice(x, config) for x in listed])
        token = torch.cat([overlap_with_token_before(x, x) for x in listed])
        later = torch.cat([same_a_block_later(x, config) for x in listed])
        kept = torch.cat([score_measures(part, x).mass_kept for part, x in pairs])
        gates = torch.cat([part.gates for part in records]).float().mean((0, 1)).tolist()
        found.append(
            Brief(
                layer=layer,
                gates=dict(zip(BRANCHES, gates, strict=True)),
                overlap_token=_mean(token, choosing),
                mass_kept=_mean(kept, choosing),
                same_a_block_later=_mean(later, choosing),
            )
        )
    return found


def _by_layer(recording: Recording) -> Iterator[tuple[str, list[SequenceRecord], list[Tensor]]]:
    """Every layer, its sequences, and which blocks each of their queries reads."""
    for layer in recording.layers:
        records = [part for call in recording.of(layer) for part in call.sequences()]
        if records:  # else every sequence is empty
            yield layer, records, [_listed(part) for part in records]


def _listed(part: SequenceRecord) -> Tensor:
    J = num_select_blocks(len(part.block_idx), part.config)
    return listed_blocks(part.block_idx, J)


def _by_query(part: SequenceRecord, listed: Tensor, before: Tensor | None) -> dict[str, Tensor]:
    """Every measure of one sequence, ``[T, K]``; sinks are ``[T, H]``."""
    config, ranked = part.config, ranked_blocks(listed, part.config)
    candidate, _ = candidate_and_forced(len(listed), config, listed.device)
    scores, dense = score_measures(part, listed), dense_measures(part, listed)
    unknown = torch.full(listed.shape[:2], NAN, device=listed.device)

    def by_group(x_TH: Tensor) -> Tensor:
        return x_TH.unflatten(1, (listed.shape[1], -1)).mean(2)

    found = {
        "choosing": has_choice(listed, config).float(),
        "listed": listed.sum(-1).float(),
        "overlap_token": overlap_with_token_before(listed, listed),
        "overlap_token, ranked": overlap_with_token_before(ranked, listed),
        "overlap_layer": unknown if before is None else shared_part(listed, before),
        "overlap_layer, ranked": unknown if before is None else shared_part(ranked, before),
        "overlap_groups": overlap_with_other_groups(listed, listed),
        "overlap_groups, ranked": overlap_with_other_groups(ranked, listed),
        "same_a_block_later": same_a_block_later(listed, config),
        "mass_selected": by_group(dense.in_list),
        "mass_read": by_group(dense.read),
        "mass_best": by_group(dense.best),
        "mass_random": by_group(dense.random),
        "recall": dense.recall,
        "chance": chance_of_block(listed, config),
        "mass_kept": scores.mass_kept,
        "entropy": scores.entropy,
        "entropy_uniform": candidate.sum(-1).log()[:, None].expand_as(unknown),
    }
    for branch, sink in sinks(part, listed, scores, dense).items():
        found |= {f"sink {branch}": sink.mass, f"uniform {branch}": sink.uniform}
    return found


class _Measured:
    """Measures by name, ``[T, K]`` of all sequences, and their means over queries with a choice."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values, self.choosing = values, values["choosing"].bool()

    def mean(self, name: str) -> float | None:
        return _mean(self.values[name], self.choosing)

    def spread(self, name: str) -> Spread | None:
        known = _known(self.values[name], self.choosing)
        if not known.numel():
            return None
        return Spread(mean=known.mean().item(), worst=known.min().item())

    def overlap(self, name: str) -> Overlap | None:
        every = self.mean(name)
        return None if every is None else Overlap(all=every, ranked=self.mean(f"{name}, ranked"))


def _known(values: Tensor, choosing: Tensor) -> Tensor:
    values = values[choosing]
    return values[~values.isnan()]


def _mean(values: Tensor, choosing: Tensor) -> float | None:
    known = _known(values, choosing)
    return known.mean().item() if known.numel() else None


def _unions(listed: Sequence[Tensor], config: NSAConfig) -> dict[int, float] | None:
    found = {}
    for m in UNIONS:
        tiles = [union_sizes(x, m).float() for x in listed]
        choosing = [has_choice(x, config)[::m][: len(x) // m] for x in listed]
        mean = _mean(torch.cat(tiles), torch.cat(choosing))
        if mean is None:
            return None
        found[m] = mean
    return found


def _gates(gates_THC: Tensor) -> dict[str, GateReport]:
    found = {}
    for branch, gate_TH in zip(BRANCHES, gates_THC.float().unbind(-1), strict=True):
        counts = gate_TH.clamp(0, 1).cpu().histc(BINS, 0, 1)
        found[branch] = GateReport(
            mean=gate_TH.mean().item(),
            heads=tuple(gate_TH.mean(0).tolist()),
            histogram=tuple((counts / counts.sum()).tolist()),
        )
    return found


def _sinks(measured: dict[str, Tensor]) -> dict[str, SinkReport]:
    found = {}
    for branch in (*BRANCHES, "dense"):
        mass, uniform = measured[f"sink {branch}"], measured[f"uniform {branch}"]
        known = ~mass.isnan().any(-1)
        if known.any():
            found[branch] = SinkReport(
                mass=mass[known].mean().item(),
                uniform=uniform[known].mean().item(),
                heads=tuple(mass[known].mean(0).tolist()),
            )
    return found


def _block_map(listed: Tensor) -> tuple[tuple[tuple[float, ...], ...], ...]:
    tiles = block_map(listed, rows=MAP_ROWS, columns=MAP_COLUMNS)
    return tuple(tuple(tuple(row) for row in group) for group in tiles.tolist())
