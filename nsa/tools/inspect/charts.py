"""Small charts as SVG, drawn by hand: lines over layers, bars, histograms.

Colours are CSS classes with values for light and dark pages: :data:`STYLE` stands once in a page,
and in every figure that is a file of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 52, 34
COLOURS = ("blue", "orange", "green", "yellow", "muted")
"""Classes of the series in turn; Okabe and Ito's palette, which the colour-blind can tell apart."""

STYLE = """
svg.chart{--text:#1f2328;--muted:#59636e;--line:#d0d7de;--blue:#0072b2;--orange:#d55e00;
--green:#009e73;--yellow:#b58900;font:12px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,
sans-serif}
@media(prefers-color-scheme:dark){svg.chart{--text:#e6edf3;--muted:#9198a1;--line:#3d444d;
--blue:#56b4e9;--orange:#ff9248;--green:#2fbf93;--yellow:#f0e442}}
svg.chart text{fill:var(--text)}svg.chart .note{fill:var(--muted);font-size:11px}
svg.chart .grid{stroke:var(--line);stroke-width:1}
svg.chart .blue{--c:var(--blue)}svg.chart .orange{--c:var(--orange)}
svg.chart .green{--c:var(--green)}svg.chart .yellow{--c:var(--yellow)}
svg.chart .muted{--c:var(--muted)}
svg.chart .area{fill:var(--c)}
svg.chart .stroke{stroke:var(--c);stroke-width:2;fill:none;stroke-linejoin:round}
svg.chart .dashed{stroke-dasharray:5 4}
"""

Values = Sequence[float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One figure."""

    name: str
    """Of the file, without its ending."""
    title: str
    svg: str

    def alone(self) -> str:
        """A file of its own."""
        return self.svg.replace(">", f"><style>{STYLE}</style>", 1)


def percent(value: float) -> str:
    """As in "61%"."""
    return f"{100 * value:.0f}%"


def plain(value: float) -> str:
    """As in "5.1"."""
    return f"{value:.3g}"


def lines(
    name: str,
    title: str,
    series: Mapping[str, Values],
    *,
    labels: Sequence[str],
    axis: str,
    form: Callable[[float], str] = percent,
    top: float | None = None,
    zero: bool = True,
    dashed: Sequence[str] = (),
) -> Chart | None:
    """A line for each series over the labels; None stands for no value.

    Args:
        axis: what the labels are.
        top: the upper end of the scale; None fits it.
        zero: whether the scale begins at 0.
        dashed: names of series to draw dashed: what others are to be compared with.

    Returns:
        None where no series has a value.
    """
    series = {key: values for key, values in series.items() if any(x is not None for x in values)}
    known = [x for values in series.values() for x in values if x is not None]
    if not known:
        return None
    scale = _Scale(0.0 if zero else min(known), max(known) if top is None else top)
    step = (WIDTH - _LEFT - _RIGHT) / max(1, len(labels) - 1)
    middle = len(labels) == 1

    def x(i: int) -> float:
        return (WIDTH + _LEFT - _RIGHT) / 2 if middle else _LEFT + i * step

    parts = [*scale.grid(form), *_x_labels(labels, x), _note(WIDTH / 2, HEIGHT - 4, axis)]
    for (key, values), colour in zip(series.items(), _colours(series), strict=True):
        points = [(x(i), scale.y(v), v, i) for i, v in enumerate(values) if v is not None]
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b, _, _ in points)
        dash = " dashed" if key in dashed else ""
        parts.append(f'<path class="stroke {colour}{dash}" d="{path}"/>')
        parts += [
            f'<circle class="area {colour}" cx="{a:.1f}" cy="{b:.1f}" r="3">'
            f"<title>{escape(key)}, {escape(axis)} {escape(labels[i])}: {form(v)}</title></circle>"
            for a, b, v, i in points
            if len(points) <= 40
        ]
    return _chart(name, title, [*_legend(series), *parts])


def steps(name: str, title: str, series: Mapping[str, Values], *, axis: str) -> Chart:
    """Histograms over 0…1, one outline for each series."""
    scale = _Scale(0.0, max(x or 0.0 for values in series.values() for x in values))
    parts = [*scale.grid(percent), _note(WIDTH / 2, HEIGHT - 4, axis)]
    for (key, values), colour in zip(series.items(), _colours(series), strict=True):
        width = (WIDTH - _LEFT - _RIGHT) / len(values)
        heights = [scale.y(v or 0.0) for v in values]
        path = f"M{_LEFT} {HEIGHT - _BOTTOM}" + "".join(
            f"V{y:.1f}H{_LEFT + (i + 1) * width:.1f}" for i, y in enumerate(heights)
        )
        text = f"<title>{escape(key)}</title>"
        parts.append(f'<path class="stroke {colour}" d="{path}V{HEIGHT - _BOTTOM}">{text}</path>')
    parts += [
        _note(_LEFT + share * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM + 14, f"{share:g}")
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    return _chart(name, title, [*_legend(series), *parts])


def bars(name: str, title: str, values: Mapping[str, float], *, axis: str) -> Chart:
    """A horizontal bar for each value, from 0 to either side, signed."""
    least, most = min(0.0, *values.values()), max(0.0, *values.values())
    span = (most - least) or 1.0
    left, right, row = 120, 64, 30
    height = 30 + row * len(values) + 20

    def x(value: float) -> float:
        return left + (value - least) / span * (WIDTH - left - right)

    parts = []
    for i, (key, value) in enumerate(values.items()):
        y = 30 + i * row
        a, b = sorted((x(0.0), x(value)))
        parts += [
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(key)}</text>',
            f'<rect class="area {"blue" if value >= 0 else "orange"}" x="{a:.1f}" y="{y + 2}" '
            f'width="{max(b - a, 1):.1f}" height="18"/>',
            f'<text x="{b + 6:.1f}" y="{y + 15}">{value:+.4f}</text>',
        ]
    parts.append(f'<path class="grid" d="M{x(0):.1f} 28V{height - 22}"/>')
    parts.append(_note(WIDTH / 2, height - 4, axis))
    return _chart(name, title, parts, height)


class _Scale:
    """The vertical axis: round numbers from ``low`` to ``high``."""

    def __init__(self, low: float, high: float) -> None:
        span = max(high - low, 1e-9)
        unit = 10 ** math.floor(math.log10(span / 3))
        self.unit = next(unit * k for k in (1, 2, 5, 10) if span / (unit * k) <= 4.5)
        self.low = math.floor(low / self.unit + 1e-9) * self.unit
        self.high = max(math.ceil(high / self.unit - 1e-9) * self.unit, self.low + self.unit)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - _BOTTOM - min(1.0, max(0.0, share)) * (HEIGHT - _BOTTOM - _TOP)

    def grid(self, form: Callable[[float], str]) -> list[str]:
        found = []
        for i in range(round((self.high - self.low) / self.unit) + 1):
            value = self.low + i * self.unit
            y = self.y(value)
            found += [
                f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>',
                f'<text class="note" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
                f"{form(value)}</text>",
            ]
        return found


def _colours(series: Mapping[str, Values]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(series))]


def _legend(series: Mapping[str, Values]) -> list[str]:
    """Names with their colours, on up to two lines above the chart; one needs none."""
    if len(series) == 1:
        return []
    found, x, y = [], float(_LEFT), 30
    for key, colour in zip(series, _colours(series), strict=True):
        width = 16 + 6.2 * len(key) + 10
        if x + width > WIDTH and x > _LEFT:
            x, y = float(_LEFT), y + 13
        found += [
            f'<rect class="area {colour}" x="{x:.1f}" y="{y - 8}" width="12" height="8"/>',
            f'<text class="note" x="{x + 16:.1f}" y="{y}">{escape(key)}</text>',
        ]
        x += width
    return found


def _x_labels(labels: Sequence[str], x: Callable[[int], float]) -> list[str]:
    longest = max(map(len, labels))
    most = max(2, int((WIDTH - _LEFT - _RIGHT) / (7 * longest + 8)))
    every = math.ceil(len(labels) / most)
    return [_note(x(i), HEIGHT - _BOTTOM + 14, labels[i]) for i in range(0, len(labels), every)]


def _note(x: float, y: float, text: str) -> str:
    return f'<text class="note" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'


def _chart(name: str, title: str, parts: Sequence[str], height: int = HEIGHT) -> Chart:
    heading = f'<text x="0" y="14" font-weight="600">{escape(title)}</text>'
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH} {height}" '
        f'role="img" aria-label="{escape(title)}">{heading}{"".join(parts)}</svg>'
    )
    return Chart(name=name, title=title, svg=svg)
