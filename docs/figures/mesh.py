"""Draws mesh.svg: what four processes of dp 2 and tp 2 hold, and what moves between them.

Run it from anywhere: ``python docs/figures/mesh.py``.
"""

from __future__ import annotations

from pathlib import Path

from svg import Figure

OUT = Path(__file__).with_suffix(".svg")
WIDTH, HEIGHT = 820, 400
BOX_W, BOX_H = 270, 96
X, Y = (40, 510), (60, 250)
"""Of the columns (tp) and the rows (dp)."""


def draw() -> str:
    """The figure as text."""
    figure = Figure(
        WIDTH,
        HEIGHT,
        "What moves where with --dp 2 --tp 2",
        "Four processes in a square. Those side by side share the heads of every layer and add up "
        "their outputs. Those above each other share the sequences of the batch, gather the "
        "parameters of a block before they use it, and scatter the sums of its gradients.",
    )
    figure.text(40, 34, "What moves where: torchrun --nproc-per-node 4 … --dp 2 --tp 2", "title")
    for dp, y in enumerate(Y):
        for tp, x in enumerate(X):
            _process(figure, x, y, dp, tp)
        _beside(figure, y + BOX_H / 2)
    _above(figure, X[0] + BOX_W / 2, "start")
    _above(figure, X[1] + BOX_W / 2, "end")
    note = "Both arrows at once: a block's parameters come while the block before it computes."
    figure.text(40, HEIGHT - 20, note, "note")
    return str(figure)


def _process(figure: Figure, x: float, y: float, dp: int, tp: int) -> None:
    figure.rect(x, y, BOX_W, BOX_H, "f-faint")
    figure.text(x + 12, y + 22, f"rank {2 * dp + tp}")
    figure.rect(x + 12, y + 34, 10, 10, "f-blue" if dp == 0 else "f-green")
    figure.text(x + 30, y + 44, f"sequences: half {dp + 1} of the batch", "note")
    figure.rect(x + 12, y + 54, 10, 10, "f-orange" if tp == 0 else "f-yellow")
    figure.text(x + 30, y + 64, f"key/value heads: half {tp + 1}, with their", "note")
    figure.text(x + 30, y + 80, "queries and gates; half of every MLP", "note")


def _beside(figure: Figure, y: float) -> None:
    """Tensor parallel."""
    left, right = X[0] + BOX_W + 8, X[1] - 8
    middle = (left + right) / 2
    figure.arrow([(middle, y), (left, y)])
    figure.arrow([(middle, y), (right, y)])
    figure.text(middle, y - 24, "all-reduce [B, T, dim]", anchor="middle")
    figure.text(middle, y - 8, "of attention and MLP:", "note", anchor="middle")
    figure.text(middle, y + 18, "one forward, one backward", "note", anchor="middle")


def _above(figure: Figure, x: float, anchor: str) -> None:
    """FSDP2."""
    top, bottom = Y[0] + BOX_H + 6, Y[1] - 6
    middle = (top + bottom) / 2
    figure.arrow([(x, middle), (x, top)])
    figure.arrow([(x, middle), (x, bottom)])
    at = x + (12 if anchor == "start" else -12)
    figure.text(at, middle - 10, "all-gather a block's parameters,", anchor=anchor)
    figure.text(at, middle + 8, "forward and backward;", "note", anchor=anchor)
    figure.text(at, middle + 26, "reduce-scatter its gradients", anchor=anchor)


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
    print(f"written: {OUT}")
