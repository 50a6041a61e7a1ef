"""Draws context_parallel.svg: what each rank holds, and what moves where.

Run it from anywhere: ``python docs/figures/context_parallel.py``.
"""

from __future__ import annotations

from pathlib import Path

from svg import Figure

OUT = Path(__file__).with_suffix(".svg")
RANKS, LEFT, SEGMENT, GAP = 4, 40, 80, 5
WIDTH, HEIGHT = 720, 350
COLOURS = ("blue", "orange", "green", "yellow")
ROWS = {"tokens": 66, "halo": 132, "compressed": 208, "selected": 280}
SHOWN = 1
"""The rank whose transfers are drawn."""


def holder(segment: int) -> int:
    """The rank of a segment in head–tail order."""
    return min(segment, 2 * RANKS - 1 - segment)


def x_of(segment: int) -> float:
    """The left edge of a segment."""
    return LEFT + segment * SEGMENT


def draw() -> str:
    """The figure as text."""
    figure = Figure(
        WIDTH,
        HEIGHT,
        "Context parallelism of four ranks",
        "Eight segments of a sequence in head–tail order. Rank 1 holds the second from the start "
        "and the second from the end. From the neighbours of its segments come the rows that the "
        "window and the last compressed blocks read; from all ranks compressed keys, then the "
        "selected branch's keys, while the compressed branch and selection are computed.",
    )
    figure.text(LEFT, 32, "Four ranks share a sequence: what moves to rank 1", "title")
    y = ROWS["tokens"]
    figure.text(LEFT, y - 8, "rows of each rank, head–tail", "note")
    for segment in range(2 * RANKS):
        rank = holder(segment)
        figure.rect(x_of(segment), y, SEGMENT - GAP, 20, f"f-{COLOURS[rank]}")
        figure.text(x_of(segment) + 6, y + 35, f"rank {rank}", "note")
    _halo(figure)
    _gathered(figure, "compressed", 6, "all-gather: one compressed key for every d tokens")
    _gathered(
        figure, "selected", 20, "all-gather, while the compressed branch and selection are computed"
    )
    note = "Backward: reduce-scatter, reduce-scatter, and the all-to-all the other way."
    figure.text(LEFT, HEIGHT - 18, note, "note")
    return str(figure)


def _halo(figure: Figure) -> None:
    y = ROWS["halo"]
    note = "all-to-all: w − 1 rows before (window), up to l − 1 after (φ's last blocks)"
    figure.text(LEFT, y - 8, note, "note")
    for segment in range(2 * RANKS):
        if holder(segment) != SHOWN:
            continue
        x = x_of(segment)
        before, after = COLOURS[holder(segment - 1)], COLOURS[holder(segment + 1)]
        figure.rect(x - 26, y, 24, 20, f"f-{before}")
        figure.rect(x, y, SEGMENT - GAP, 20, f"f-{COLOURS[SHOWN]}")
        figure.rect(x + SEGMENT - GAP + 2, y, 8, 20, f"f-{after}")


def _gathered(figure: Figure, name: str, height: float, note: str) -> None:
    y = ROWS[name]
    figure.text(LEFT, y - 8, f"{name} keys and values", "note")
    figure.text(LEFT + 180, y - 8, note, "note")
    for segment in range(2 * RANKS):
        rank = holder(segment)
        pale = ("pale",) if rank != SHOWN else ()
        figure.rect(x_of(segment), y, SEGMENT - GAP, height, f"f-{COLOURS[rank]}", *pale)


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
    print(f"written: {OUT}")
