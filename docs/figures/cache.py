"""Draws cache.svg: what a cache keeps of one sequence, by branch.

Run it from anywhere: ``python docs/figures/cache.py``.
"""

from __future__ import annotations

from pathlib import Path

from svg import Figure

OUT = Path(__file__).with_suffix(".svg")
T, PAGE, BLOCK, STRIDE, WINDOW = 90, 16, 8, 4, 12
"""Tokens so far, tokens of a page, l, d, w."""
END = 96
WIDTH, HEIGHT = 760, 330
LEFT, CELL = 40, 7
ROWS = {"tokens": 66, "compressed": 122, "selected": 184, "window": 252}


def draw() -> str:
    """The figure as text."""
    figure = Figure(
        WIDTH,
        HEIGHT,
        "What a cache keeps of one sequence",
        "Four rows over the same tokens. Compressed: one key for each whole block, and the last "
        "few tokens that blocks to come will need. Selected: every token, in pages that hold whole "
        "blocks. Window: the last w tokens, in a ring.",
    )
    figure.text(LEFT, 32, "What a cache keeps of one sequence", "title")
    y = ROWS["tokens"]
    figure.text(LEFT, y - 10, "tokens so far", "note")
    figure.rect(LEFT, y, T * CELL, 12, "f-faint")
    figure.text(LEFT + T * CELL + 8, y + 11, "next →", "note")
    _compressed(figure, ROWS["compressed"])
    _selected(figure, ROWS["selected"])
    _window(figure, ROWS["window"])
    note = "Read for one token: the compressed keys, n blocks of the pages, the window."
    figure.text(LEFT, HEIGHT - 20, note, "note")
    return str(figure)


def _label(figure: Figure, y: float, name: str, note: str) -> None:
    figure.text(LEFT, y - 10, name)
    figure.text(LEFT + 92, y - 10, note, "note")


def _compressed(figure: Figure, y: float) -> None:
    blocks = (T - BLOCK) // STRIDE + 1
    _label(
        figure,
        y,
        "compressed",
        "φ of every whole block of l tokens, one each d; the tail of raw tokens",
    )
    for i in range(blocks):
        x = LEFT + (i * STRIDE + (BLOCK - STRIDE) / 2) * CELL
        figure.rect(x + 1, y, STRIDE * CELL - 2, 12, "f-blue")
    start = blocks * STRIDE
    figure.rect(LEFT + start * CELL, y + 16, (T - start) * CELL, 6, "f-blue", "pale")


def _selected(figure: Figure, y: float) -> None:
    _label(
        figure,
        y,
        "selected",
        "every token, in pages of whole blocks, wherever in the pool they are",
    )
    for page, number in zip(range(0, T, PAGE), (5, 2, 9, 0, 7, 4), strict=True):
        width = min(PAGE, END - page) * CELL
        filled = min(PAGE, T - page) * CELL
        figure.rect(LEFT + page * CELL + 1, y, filled - 2, 12, "f-orange")
        figure.rect(LEFT + page * CELL + 1, y, width - 2, 12, "stroke", "s-orange")
        middle = LEFT + page * CELL + width / 2
        figure.text(middle, y + 28, f"page {number}", "note", anchor="middle")


def _window(figure: Figure, y: float) -> None:
    _label(figure, y, "window", "the last w tokens, token t in row t mod R of a ring")
    figure.rect(LEFT + (T - WINDOW) * CELL, y, WINDOW * CELL, 12, "f-green")


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
    print(f"written: {OUT}")
