"""How the tables of ``diagnose`` look."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group
from rich.table import Table
from rich.text import Text

GOOD, WARN, BAD, DIM = "green", "yellow", "bold red", "dim"


def listed(title: str, lines: Iterable[str], style: str) -> Group:
    """Lines under a title; those that are folded stay behind their mark."""
    grid = Table.grid(padding=(0, 1))
    for line in lines:
        grid.add_row(Text("  -"), Text(line, overflow="fold"))
    return Group(Text(title, style=style), grid)


def table_of(title: str, *columns: str) -> Table:
    """An empty table; without columns it has no header."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=bool(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
