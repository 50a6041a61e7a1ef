"""A study as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from nsa.inspection import LayerReport, Overlap, Spread
from nsa.inspection.report_types import UNIONS
from nsa.tools.common.styles import GOOD, WARN, listed, table_of
from nsa.tools.inspect.study import Study


def print_study(study: Study) -> None:
    """Print every table; last what is likely to be wrong."""
    console = Console(markup=False, emoji=False, highlight=False)
    for part in _parts(study):
        console.print(part)


def _parts(study: Study) -> Iterator[RenderableType]:
    layers = study.attention.layers
    lengths = study.attention.sequences
    yield (
        f"{study.checkpoint}, step {study.step}, on {len(lengths)} x {lengths[0]} bytes of "
        f"{study.text}\n{study.backend} on {study.device}; loss {study.loss:.4f} nats per byte"
    )
    if any(layer.choosing for layer in layers):
        yield _lists(layers)
        yield _worth(layers)
    else:
        yield Text(
            "No query sees more blocks than it reads: nothing is selected in sequences as short "
            "as these (--length).",
            style=WARN,
        )
    yield _gates(layers)
    yield _sinks(layers)
    if study.knock_outs is not None:
        yield _knock_outs(study.knock_outs)
    yield _positions(study)
    if study.complaints:
        yield listed("Likely to be wrong:", study.complaints, WARN)
        return
    known = any(layer.same_a_block_later is not None for layer in layers)
    text = "No gate is shut" + (", and lists depend on the query." if known else ".")
    yield Text(text, style=GOOD)


def _lists(layers: Iterable[LayerReport]) -> Table:
    unions = [f"union of {m}" for m in UNIONS]
    table = _numbers(
        "Blocks read, and how many of them others read (all/ranked, not forced)",
        *("listed", "token before", "layer before", "other groups", "random", *unions),
    )
    for i, layer in enumerate(layers):
        sizes = layer.unions or {}
        table.add_row(
            str(i),
            number(layer.listed, 1),
            _overlap(layer.overlap_token),
            _overlap(layer.overlap_layer),
            _overlap(layer.overlap_groups),
            percent(layer.chance),
            *(number(sizes.get(m), 1) for m in UNIONS),
        )
    return table


def _worth(layers: Iterable[LayerReport]) -> Table:
    table = _numbers(
        "Dense attention's mass inside what is read, and the scores (mean/worst query)",
        *("listed", "with window", "random list", "best list", "recall", "random"),
        *("score kept", "nats/most"),
    )
    for i, layer in enumerate(layers):
        table.add_row(
            str(i),
            _spread(layer.mass_selected),
            _spread(layer.mass_read),
            percent(of(layer.mass_random, "mean")),
            percent(of(layer.mass_best, "mean")),
            _spread(layer.recall),
            percent(layer.chance),
            _spread(layer.mass_kept),
            f"{number(layer.entropy)}/{number(layer.entropy_uniform)}",
        )
    return table


def _gates(layers: Iterable[LayerReport]) -> Table:
    table = _numbers("Gates (mean; lowest and highest head)", "compressed", "selected", "window")
    for i, layer in enumerate(layers):
        gates = layer.gates.values()
        table.add_row(
            str(i), *(f"{x.mean:.3f}  {min(x.heads):.3f} {max(x.heads):.3f}" for x in gates)
        )
    return table


def _sinks(layers: Iterable[LayerReport]) -> Table:
    names = ("compressed", "selected", "window", "dense")
    table = _numbers("Attention on the first block of tokens, l (and if it were uniform)", *names)
    for i, layer in enumerate(layers):
        cells = [
            f"{percent(sink.mass)} ({percent(sink.uniform)})" if sink is not None else "-"
            for sink in map(layer.sinks.get, names)
        ]
        table.add_row(str(i), *cells)
    return table


def _knock_outs(found: dict[str, float]) -> Table:
    table = table_of("Knock-outs, in every layer", "what is done", "loss", "more by")
    for name, loss in found.items():
        more = "" if name == "none" else f"{loss - found['none']:+.4f}"
        table.add_row("nothing" if name == "none" else name, f"{loss:.4f}", more)
    return table


def _positions(study: Study) -> Table:
    table = table_of("Loss by position", "bytes", "nats per byte")
    for part in study.loss_by_position:
        table.add_row(position(part.start, part.end), f"{part.loss:.4f}")
    return table


def _numbers(title: str, *columns: str) -> Table:
    table = table_of(title, "layer", *columns)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _overlap(overlap: Overlap | None) -> str:
    return "-" if overlap is None else f"{100 * overlap.all:.0f}/{percent(overlap.ranked)}"


def _spread(spread: Spread | None) -> str:
    return "-" if spread is None else f"{100 * spread.mean:.0f}/{percent(spread.worst)}"


def of(part: object | None, name: str) -> float | None:
    """A number of a part of a report; None where there is no such part."""
    return None if part is None else getattr(part, name)


def percent(share: float | None) -> str:
    """As in "61%"; "-" for None."""
    return "-" if share is None else f"{100 * share:.0f}%"


def number(value: float | None, digits: int = 2) -> str:
    """As in "5.13"; "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def position(start: int, end: int) -> str:
    """As in "4-7"."""
    return str(start) if end == start + 1 else f"{start}-{end - 1}"
