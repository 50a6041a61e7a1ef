"""What is likely to have gone wrong in a model's attention, in words."""

from __future__ import annotations

from collections.abc import Sequence

from nsa.core.inputs import BRANCHES
from nsa.inspection.report_types import Brief

GATE_FLOOR = 0.05
"""The mean below which a branch's gate counts as shut."""
SAME_CEILING = 0.98
"""The share of ranked blocks shared with the query a block before, from which lists count as the
same for every query."""


def complaints(layers: Sequence[Brief]) -> list[str]:
    """What is likely to have gone wrong in training, a line for each kind, with its layers."""
    found = []
    for branch in BRANCHES:
        shut = [(i, x.gates[branch]) for i, x in enumerate(layers) if x.gates[branch] < GATE_FLOOR]
        if shut:
            found.append(
                f"the {branch} branch's gate is below {GATE_FLOOR} on average in {_where(shut)}"
            )
    same = [
        (i, x.same_a_block_later)
        for i, x in enumerate(layers)
        if x.same_a_block_later is not None and x.same_a_block_later >= SAME_CEILING
    ]
    if same:
        found.append(
            "lists no longer depend on the query: the share of ranked blocks that it has in common "
            f"with the query one block before is at least {SAME_CEILING} in {_where(same)}"
        )
    return found


def _where(layers: Sequence[tuple[int, float]]) -> str:
    """As in "layers 0-2, 5 (0.010 to 0.042)"."""
    runs: list[list[int]] = []
    for i, _ in layers:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    names = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
    least, most = min(x for _, x in layers), max(x for _, x in layers)
    numbers = f"{least:.3f}" if len(layers) == 1 else f"{least:.3f} to {most:.3f}"
    return f"layer{'s' if len(layers) > 1 else ''} {names} ({numbers})"
