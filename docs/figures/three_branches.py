"""Draws three_branches.svg: which keys every query reads, by branch, and the gated sum.

Run it from anywhere: ``python docs/figures/three_branches.py``. The block lists come from
``nsa.reference``, over a short sequence whose tokens belong to a few topics.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from svg import Figure

from nsa import NSAConfig
from nsa.reference import select_blocks

OUT = Path(__file__).with_suffix(".svg")
T = 96
QUERY = 77
"""The query whose row is marked."""
CONFIG = NSAConfig(
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    compress_block=8,
    compress_stride=4,
    select_block=8,
    num_selected=4,
    num_initial=1,
    num_local=1,
    window=12,
    rope_theta=None,
)
SEED = 29
TOPICS, TOPIC_LENGTHS = 5, (6, 14)
NOISE, SHARPNESS = 0.1, 6.0

WIDTH, HEIGHT = 860, 492
CELL = 7 / 3
SIDE = T * CELL
LEFT, TOP, GAP = 52, 88, 46
COLOURS = ("blue", "orange", "green")


def draw() -> str:
    """The figure as text."""
    figure = Figure(
        WIDTH,
        HEIGHT,
        "The three branches of Native Sparse Attention",
        "Three causal maps, queries from top to bottom and keys from left to right. Compressed: "
        "one key for each block of tokens. Selected: a few whole blocks with the highest scores. "
        "Window: the last tokens. Gates weight the three outputs and add them up.",
    )
    lefts = [LEFT + i * (SIDE + GAP) for i in range(3)]
    lists = block_lists()
    listed = [j for j in lists[QUERY] if j >= 0]
    tokens = sum(
        min((j + 1) * CONFIG.select_block, QUERY + 1) - j * CONFIG.select_block for j in listed
    )
    seen = (QUERY + 1 - CONFIG.compress_block) // CONFIG.compress_stride + 1
    _panel(figure, lefts[0], "Compressed", "φ makes one key and value of each block")
    _panel(figure, lefts[1], "Selected", "the n blocks that score highest")
    _panel(figure, lefts[2], "Window", "the last w tokens")
    _compressed(figure, lefts[0])
    _selected(figure, lefts[1], lists)
    _window(figure, lefts[2])
    reads = (
        f"{seen} keys, one per block",
        f"{len(listed)} blocks, {tokens} tokens",
        f"{CONFIG.window} tokens",
    )
    _marked_query(figure, lefts, reads)
    _gates(figure, [left + SIDE / 2 for left in lefts])
    return str(figure)


def block_lists() -> list[list[int]]:
    """The oracle's list of every query; a query and a key of the same topic have a high score."""
    generator = random.Random(SEED)
    topics: list[int] = []
    while len(topics) < T:
        topics += [generator.randrange(TOPICS)] * generator.randint(*TOPIC_LENGTHS)

    def vectors() -> torch.Tensor:
        rows = [
            [float(i == topic) + NOISE * (generator.random() - 0.5) for i in range(CONFIG.head_dim)]
            for topic in topics[:T]
        ]
        return torch.tensor(rows, dtype=torch.float64)

    q, k = SHARPNESS * vectors(), vectors()
    blocks = k.unfold(0, CONFIG.compress_block, CONFIG.compress_stride)
    k_cmp = blocks.mean(-1)  # φ as a mean
    return select_blocks(q[None, :, None], k_cmp[None, :, None], CONFIG)[0, :, 0].tolist()


def _panel(figure: Figure, left: float, title: str, note: str) -> None:
    """Title, the causal triangle, and the names of the axes."""
    figure.text(left, 34, title, "title")
    figure.text(left, 53, note, "note")
    figure.path(
        [(left, TOP), (left + SIDE, TOP + SIDE), (left, TOP + SIDE)], "f-faint", closed=True
    )
    figure.path([(left, TOP), (left, TOP + SIDE), (left + SIDE, TOP + SIDE)], "stroke", "s-line")
    figure.text(left + SIDE, TOP + SIDE + 16, "keys →", "note", anchor="end")


def _brackets(
    figure: Figure, left: float, spans: list[tuple[int, int]], y: float, colour: str
) -> None:
    """A bar over the map for each span of tokens."""
    for start, end in spans:
        figure.rect(left + start * CELL + 0.6, y, (end - start) * CELL - 1.2, 3.4, colour, "pale")


def _compressed(figure: Figure, left: float) -> None:
    stride, block = CONFIG.compress_stride, CONFIG.compress_block
    spans = [(start, start + block) for start in range(0, T - block + 1, stride)]
    _brackets(figure, left, spans[::2], TOP - 18, "f-blue")
    _brackets(figure, left, spans[1::2], TOP - 12, "f-blue")
    for start, end in spans:
        first = end - 1  # queries from the last token of the block on see its key
        x = left + (start + (block - stride) / 2) * CELL
        figure.rect(x + 0.8, TOP + first * CELL, stride * CELL - 1.6, (T - first) * CELL, "f-blue")


def _selected(figure: Figure, left: float, lists: list[list[int]]) -> None:
    block = CONFIG.select_block
    starts = range(0, T, block)
    _brackets(figure, left, [(start, start + block) for start in starts], TOP - 12, "f-orange")
    for j, start in enumerate(starts):
        for queries in _runs([t for t in range(T) if j in lists[t]]):
            _block(figure, left, start, queries)


def _runs(numbers: list[int]) -> list[list[int]]:
    """Ascending numbers, split where one is missing."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _block(figure: Figure, left: float, start: int, queries: list[int]) -> None:
    """One block for a run of queries; a run that begins in the block is cut by the diagonal."""
    end = start + CONFIG.select_block
    corner = min(end, queries[-1] + 1) if queries[0] == start else end
    x, right = left + start * CELL + 0.6, left + corner * CELL - 0.6
    top, bottom = (TOP + t * CELL for t in (queries[0], queries[-1] + 1))
    right_top = TOP + corner * CELL if queries[0] == start else top
    figure.path(
        [(x, top), (right, right_top), (right, bottom), (x, bottom)], "f-orange", closed=True
    )


def _window(figure: Figure, left: float) -> None:
    size = CONFIG.window * CELL
    _brackets(figure, left, [(QUERY - CONFIG.window + 1, QUERY + 1)], TOP - 12, "f-green")
    points = [(0.0, 0.0), (SIDE, SIDE), (SIDE - size, SIDE), (0.0, size)]
    figure.path([(left + x, TOP + y) for x, y in points], "f-green", closed=True)


def _marked_query(figure: Figure, lefts: list[float], reads: tuple[str, ...]) -> None:
    """The row of one query, and how much it reads in each branch."""
    y = TOP + QUERY * CELL
    for left, text in zip(lefts, reads, strict=True):
        figure.rect(left - 5, y - 1.6, (QUERY + 1) * CELL + 10, CELL + 3.2, "stroke", "s-text")
        figure.text(left, TOP + SIDE + 34, f"query t reads {text}")
    figure.text(lefts[0] - 10, y + 5, "t", "title", anchor="end")
    figure.text(lefts[0] - 12, TOP + SIDE / 3, "← queries", "note", anchor="middle", turned=True)
    # the compressed branch's scores choose the blocks
    start, end = lefts[0] + (QUERY + 1) * CELL + 9, lefts[1] - 9
    figure.arrow([(start, y + CELL / 2), (end, y + CELL / 2)])
    figure.text((start + end) / 2 + 6, y - 6, "scores", "note", anchor="middle")


def _gates(figure: Figure, centres: list[float]) -> None:
    """Each branch's output times its gate, and the sum."""
    top, gate, total = TOP + SIDE + 44, TOP + SIDE + 70, TOP + SIDE + 118
    middle = centres[1]
    for x, name, colour in zip(centres, ("cmp", "slc", "win"), COLOURS, strict=True):
        figure.arrow([(x, top), (x, gate - 13)])
        figure.element("circle", "f-card", f"s-{colour}", "thick", cx=x, cy=gate, r=12)
        figure.text(x, gate + 5, "×", "formula", anchor="middle")
        figure.text(x + 20, gate + 5, f"gate g_{{{name}}}")
        if x != middle:
            figure.arrow(
                [(x, gate + 12), (x, total), (middle + (13 if x > middle else -13), total)]
            )
    figure.arrow([(middle, gate + 12), (middle, total - 13)])
    figure.element("circle", "f-card", "s-text", "thick", cx=middle, cy=total, r=12)
    figure.text(middle, total + 5, "+", "formula", anchor="middle")
    formula = "o_t = g_{cmp} · o_{cmp} + g_{slc} · o_{slc} + g_{win} · o_{win}"
    figure.text(middle, total + 40, formula, "formula", anchor="middle")


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
    print(f"written: {OUT}")
