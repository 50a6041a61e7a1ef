"""Writes SVG by hand: elements, text with subscripts, and one look in light and dark mode.

A figure is a card with its own background, so that it stays readable on a page of any colour.
Colours are classes: ``f-blue`` fills, ``s-blue`` draws an outline. Numbers are rounded to a
hundredth, so that the same input gives the same file.
"""

from __future__ import annotations

import re
from html import escape

FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
LIGHT = {
    "card": "#ffffff",
    "edge": "#d0d7de",
    "text": "#1f2328",
    "muted": "#59636e",
    "faint": "#eaeef2",
    "line": "#d0d7de",
    # Okabe and Ito's palette, which the colour-blind can tell apart
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#009e73",
    "yellow": "#b58900",
}
DARK = {
    "card": "#161b22",
    "edge": "#30363d",
    "text": "#e6edf3",
    "muted": "#9198a1",
    "faint": "#262c34",
    "line": "#3d444d",
    "blue": "#56b4e9",
    "orange": "#ff9248",
    "green": "#2fbf93",
    "yellow": "#f0e442",
}
_ARROW_HEAD = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto"><path class="f-muted" d="M0 0L8 4L0 8Z"/></marker></defs>'
)


class Figure:
    """A card of ``width`` by ``height`` pixels; every method adds to it.

    Args:
        title, description: what a screen reader says.
    """

    def __init__(self, width: float, height: float, title: str, description: str) -> None:
        self._size = width, height
        self._head = title, description
        self._parts: list[str] = []

    def element(self, name: str, *classes: str, content: str = "", **attributes: object) -> None:
        """Adds an element; underscores in attribute names become hyphens."""
        values = {"class": " ".join(classes) or None, **attributes}
        text = "".join(
            f' {key.replace("_", "-")}="{_number(value)}"'
            for key, value in values.items()
            if value is not None
        )
        self._parts.append(f"<{name}{text}>{content}</{name}>" if content else f"<{name}{text}/>")

    def rect(self, x: float, y: float, width: float, height: float, *classes: str) -> None:
        self.element("rect", *classes, x=x, y=y, width=width, height=height)

    def path(self, points: list[tuple[float, float]], *classes: str, closed: bool = False) -> None:
        """A polygon, or an open line of the class ``stroke``."""
        d = "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in points) + "Z" * closed
        self.element("path", *classes, d=d)

    def arrow(self, points: list[tuple[float, float]]) -> None:
        """A line with a head at its end."""
        d = "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in points)
        self.element("path", "stroke", "s-muted", d=d, marker_end="url(#head)")

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *classes: str,
        anchor: str = "start",
        turned: bool = False,
    ) -> None:
        """Adds text; ``o_t`` and ``g_{cmp}`` set what follows ``_`` lower; turned: read upwards."""
        content = re.sub(
            r"_(?:\{(\w+)\}|(\w))",
            r'<tspan class="sub" dy="4">\1\2</tspan><tspan dy="-4">&#8203;</tspan>',
            escape(text, quote=False),
        )
        self.element(
            "text",
            *classes,
            content=content,
            x=x,
            y=y,
            text_anchor=None if anchor == "start" else anchor,
            transform=f"rotate(-90 {_number(x)} {_number(y)})" if turned else None,
        )

    def __str__(self) -> str:
        width, height = (_number(value) for value in self._size)
        title, description = (escape(text, quote=False) for text in self._head)
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" aria-labelledby="title desc">',
            f'<title id="title">{title}</title>',
            f'<desc id="desc">{description}</desc>',
            f"<style>\n{_style()}\n</style>",
            _ARROW_HEAD,
            f'<rect class="f-card s-edge" x="0.5" y="0.5" width="{_number(self._size[0] - 1)}" '
            f'height="{_number(self._size[1] - 1)}" rx="8"/>',
            *self._parts,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"


def _style() -> str:
    rules = [
        f"text {{ font: 13px {FONT}; fill: var(--text); }}",
        ".title { font-weight: 600; font-size: 15px; }",
        ".note { font-size: 12px; fill: var(--muted); }",
        ".formula { font-size: 16px; }",
        ".sub { font-size: 0.72em; }",
        ".stroke { fill: none; stroke-width: 1.4; }",
        ".thick { stroke-width: 2.2; stroke-linejoin: round; }",
        ".dashed { stroke-dasharray: 6 4; }",
        *(f".f-{name} {{ fill: var(--{name}); }}" for name in LIGHT),
        *(f".s-{name} {{ stroke: var(--{name}); }}" for name in LIGHT),
        ".pale { opacity: 0.5; }",
    ]
    return "\n".join(
        [
            f"svg {{ {_variables(LIGHT)} }}",
            f"@media (prefers-color-scheme: dark) {{ svg {{ {_variables(DARK)} }} }}",
            *rules,
        ]
    )


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return escape(str(value))
