"""The figures of a study: charts as SVG, query × block maps and gates by head as PNG."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nsa.core.inputs import BRANCHES
from nsa.inspection import LayerReport
from nsa.inspection.report_types import UNIONS
from nsa.tools.inspect.charts import Chart, Values, bars, lines, percent, plain, steps
from nsa.tools.inspect.png import png
from nsa.tools.inspect.study import Study
from nsa.tools.inspect.tables import of, position

_Value = Callable[[LayerReport], float | None]


class Image(NamedTuple):
    """A map of shares."""

    name: str
    caption: str
    png: bytes


def lists_charts(study: Study) -> list[Chart]:
    """Whom queries share their blocks with, and how many blocks they read together."""
    by_layer = _ByLayer(study)
    shares = {
        "token before": by_layer(lambda x: of(x.overlap_token, "ranked")),
        "layer before": by_layer(lambda x: of(x.overlap_layer, "ranked")),
        "other groups": by_layer(lambda x: of(x.overlap_groups, "ranked")),
        "block before": by_layer(lambda x: x.same_a_block_later),
        "random": by_layer(lambda x: x.chance),
    }
    unions = {f"{m} tokens": by_layer(_union(m)) for m in UNIONS}
    title = "Ranked blocks that others read, too"
    return _there(
        by_layer.chart("overlap", title, shares, top=1, dashed=["random"]),
        by_layer.chart("unions", "Distinct blocks of consecutive tokens", unions, form=plain),
    )


def worth_charts(study: Study) -> list[Chart]:
    """What the lists hold, of dense attention and of their own scores."""
    by_layer = _ByLayer(study)

    def mean(name: str) -> Values:
        return by_layer(lambda x: of(getattr(x, name), "mean"))

    mass = {
        "with window": mean("mass_read"),
        "listed": mean("mass_selected"),
        "best list": mean("mass_best"),
        "random list": mean("mass_random"),
    }
    recall = {"recall": mean("recall"), "random": by_layer(lambda x: x.chance)}
    kept = {"mean": mean("mass_kept"), "worst query": by_layer(lambda x: of(x.mass_kept, "worst"))}
    spread = {
        "entropy": by_layer(lambda x: x.entropy),
        "most it could be": by_layer(lambda x: x.entropy_uniform),
    }
    by, most = by_layer.chart, ["most it could be"]
    return _there(
        by("mass", "Dense attention's mass inside", mass, top=1, dashed=["random list"]),
        by("recall", "Recall of the best list's blocks", recall, top=1, dashed=["random"]),
        by("kept", "The selection scores inside the list", kept, top=1),
        by("entropy", "Entropy of the scores, nats", spread, form=plain, dashed=most),
    )


def gate_charts(study: Study) -> list[Chart]:
    """Mean gates by layer, and a histogram for each."""
    by_layer = _ByLayer(study)
    means = {branch: by_layer(_gate(branch)) for branch in BRANCHES}
    histograms = [
        steps(
            f"gates-{i}",
            f"Layer {i}",
            {b: layer.gates[b].histogram for b in BRANCHES},
            axis="gate",
        )
        for i, layer in enumerate(study.attention.layers)
    ]
    return [*_there(by_layer.chart("gates", "Mean gate", means, form=plain)), *histograms]


def sink_charts(study: Study) -> list[Chart]:
    """The first tokens' share of each branch's attention."""
    by_layer = _ByLayer(study)
    names = (*BRANCHES, "dense")
    share = {name: by_layer(_sink(name, relative=False)) for name in names}
    over = {name: by_layer(_sink(name, relative=True)) for name in names}
    return _there(
        by_layer.chart("sinks", "Attention on the first l tokens", share),
        by_layer.chart("sinks-relative", "The same, over uniform attention's", over, form=plain),
    )


def loss_charts(study: Study) -> list[Chart]:
    """Knock-outs, and the loss by position."""
    found = []
    if study.knock_outs is not None:
        whole = study.knock_outs["none"]
        more = {name: loss - whole for name, loss in study.knock_outs.items() if name != "none"}
        found.append(
            bars("knock-outs", "Loss beyond that of the whole model", more, axis="nats per byte")
        )
    bins = study.loss_by_position
    curve = lines(
        "loss-by-position",
        "Loss by position, nats per byte",
        {"loss": [x.loss for x in bins]},
        labels=[position(x.start, x.end) for x in bins],
        axis="bytes",
        form=plain,
    )
    return [*found, *_there(curve)]


def maps(study: Study) -> Iterator[Image]:
    """Query × block maps by layer and group: queries from above, blocks from the left."""
    for i, layer in enumerate(study.attention.layers):
        for k, rows in enumerate(layer.block_map):
            yield Image(f"map-{i}-{k}", f"layer {i}, group {k}", png(rows))


def gate_maps(study: Study) -> Iterator[Image]:
    """Mean gates by layer (from above) and head (from the left), for each branch."""
    for branch in BRANCHES:
        rows = [layer.gates[branch].heads for layer in study.attention.layers]
        yield Image(f"gates-{branch}", branch, png(rows))


def write_figures(study: Study, folder: Path) -> None:
    """Write every figure into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for make in (lists_charts, worth_charts, gate_charts, sink_charts, loss_charts):
        for chart in make(study):
            (folder / f"{chart.name}.svg").write_text(chart.alone(), encoding="utf-8")
    for images in (maps(study), gate_maps(study)):
        for image in images:
            (folder / f"{image.name}.png").write_bytes(image.png)


def _union(m: int) -> _Value:
    return lambda layer: None if layer.unions is None else layer.unions[m]


def _gate(branch: str) -> _Value:
    return lambda layer: layer.gates[branch].mean


def _sink(branch: str, *, relative: bool) -> _Value:
    def value(layer: LayerReport) -> float | None:
        sink = layer.sinks.get(branch)
        if sink is None:
            return None
        return sink.mass / sink.uniform if relative else sink.mass

    return value


class _ByLayer:
    """Values and charts over the layers of a study."""

    def __init__(self, study: Study) -> None:
        self._layers = study.attention.layers

    def __call__(self, value: _Value) -> list[float | None]:
        return [value(layer) for layer in self._layers]

    def chart(
        self,
        name: str,
        title: str,
        series: Mapping[str, Values],
        *,
        form: Callable[[float], str] = percent,
        top: float | None = None,
        dashed: Sequence[str] = (),
    ) -> Chart | None:
        labels = [str(i) for i in range(len(self._layers))]
        return lines(
            name, title, series, labels=labels, axis="layer", form=form, top=top, dashed=dashed
        )


def _there(*charts: Chart | None) -> list[Chart]:
    return [chart for chart in charts if chart is not None]
