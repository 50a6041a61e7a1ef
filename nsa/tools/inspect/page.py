"""A study as one page: no script, nothing from the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from nsa.core.inputs import BRANCHES
from nsa.tools.inspect.charts import STYLE, Chart
from nsa.tools.inspect.figures import (
    Image,
    gate_charts,
    gate_maps,
    lists_charts,
    loss_charts,
    maps,
    sink_charts,
    worth_charts,
)
from nsa.tools.inspect.png import data_uri
from nsa.tools.inspect.study import Study
from nsa.tools.inspect.tables import number, of, percent

MAPS_BYTES = 900_000
"""Of maps at most, so that a page stays below 2 MB; past that each layer shows its first group."""

_STYLE = """
:root{color-scheme:light dark;--card:#fff;--page:#f6f8fa;--text:#1f2328;--muted:#59636e;
--line:#d0d7de;--warn:#9a6700}
@media(prefers-color-scheme:dark){:root{--card:#161b22;--page:#0d1117;--text:#e6edf3;
--muted:#9198a1;--line:#30363d;--warn:#d29922}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}
main{max-width:1240px;margin:0 auto;padding:20px 16px 48px}
h1{font-size:24px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:18px;margin:36px 0 2px}
p{margin:4px 0 10px;max-width:76ch}.muted{color:var(--muted);overflow-wrap:anywhere}
ul{margin:8px 0;padding-left:20px;max-width:80ch}.warn{color:var(--warn)}
.charts{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,240px),1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px}
.card svg{display:block;width:100%;height:auto}
.maps{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(46%,150px),1fr))}
figure{margin:0}figcaption{font-size:12px;color:var(--muted)}
.maps img,.heads img{display:block;width:100%;image-rendering:pixelated;background:var(--card);
border:1px solid var(--line)}
.maps img{aspect-ratio:1}.heads img{height:calc(16px*var(--rows))}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;
background:var(--card)}
th,td{border:1px solid var(--line);padding:3px 8px;text-align:right;white-space:nowrap}
th{font-weight:600}
"""


def page(study: Study) -> str:
    """The page, HTML."""
    lengths = study.attention.sequences
    title = "What this model reads"
    config = study.model["nsa"]
    facts = (
        f"{study.checkpoint}, step {study.step}, on {len(lengths)} × {lengths[0]:,} bytes of "
        f"{study.text}, {study.backend} on {study.device}. Loss {study.loss:.4f} nats per byte. "
        f"{config['num_heads']} heads in {config['num_kv_heads']} groups; "
        f"{config['num_selected']} blocks of {config['select_block']} tokens selected "
        f"({config['num_initial']} first and {config['num_local']} local forced), compressed "
        f"{config['compress_block']} every {config['compress_stride']}, window {config['window']}."
    )
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="muted">{escape(facts)}</p>',
        _sentences(study),
        _section(
            "Knock-outs and loss",
            "The loss when one branch's gate is shut in every layer, and with other lists: as many "
            "blocks at random, or those that dense attention would have weighed most.",
            _charts(loss_charts(study)),
        ),
        _section(
            "What is read",
            "Queries from above, blocks of tokens from the left; the bluer, the more of the "
            "queries of a tile read the block.",
            _maps(study),
        ),
        _section(
            "Whom blocks are shared with",
            "Of queries that see more blocks than they read. Ranked blocks are those that are not "
            "forced; the block before is the query one block (l') earlier; the dashed line is what "
            "lists at random would share.",
            _charts(lists_charts(study)),
        ),
        _section(
            "What the lists are worth",
            "Held to dense attention of the same queries on the selected branch's keys. The best "
            "list has the blocks with the most of its mass, under the same rules.",
            _charts(worth_charts(study)),
        ),
        _gates(study),
        _section(
            "Attention sinks",
            f"What the first {config['compress_block']} tokens (one compressed block) get of each "
            "branch's attention. The window's is of queries whose window still holds them.",
            _charts(sink_charts(study)),
        ),
        _section(
            "Numbers",
            "Means by layer: blocks listed, and the share of them that the token before, the layer "
            "before and other groups read; dense attention's mass on them, with the window, on the "
            "best and on random lists; recall and chance; score kept and its entropy; gates. "
            "--json has every number.",
            _table(study),
        ),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _sentences(study: Study) -> str:
    """What stands out, in words."""
    layers = study.attention.layers
    found = []

    def average(values: Iterable[float | None]) -> float | None:
        known = [x for x in values if x is not None]
        return sum(known) / len(known) if known else None

    token = average(of(x.overlap_token, "all") for x in layers)
    if token is None:
        found.append("No query sees more blocks than it reads: nothing is selected at this length.")
    else:
        found.append(
            f"A query shares {percent(token)} of its blocks with the token before "
            f"({percent(average(of(x.overlap_token, 'ranked') for x in layers))} of "
            "those that are ranked)."
        )
        mass, best, drawn = (
            percent(average(of(part, "mean") for part in parts))
            for parts in (
                [x.mass_selected for x in layers],
                [x.mass_best for x in layers],
                [x.mass_random for x in layers],
            )
        )
        found.append(
            f"Its list holds {mass} of dense attention's mass; the best list would hold {best}, a "
            f"random one {drawn}."
        )
        recall = percent(average(of(x.recall, "mean") for x in layers))
        found.append(
            f"It finds {recall} of the best list's ranked blocks, where chance finds "
            f"{percent(average(x.chance for x in layers))}."
        )
    if study.knock_outs is not None:
        loss = study.knock_outs
        more = {name: f"{loss[name] - loss['none']:+.4f}" for name in loss}
        oracle = more["oracle's lists"]
        branches = ", ".join(f"{more[f'{branch} shut']} ({branch})" for branch in BRANCHES)
        found.append(
            f"Shutting a branch changes the loss by {branches} nats per byte; random lists change "
            f"it by {more['random lists']}, the oracle's by {oracle}."
        )
    items = "".join(f"<li>{escape(text)}</li>" for text in found)
    items += "".join(f'<li class="warn">Likely wrong: {escape(x)}.</li>' for x in study.complaints)
    return f"<ul>{items}</ul>"


def _maps(study: Study) -> str:
    images = list(maps(study))
    note = ""
    if sum(len(image.png) for image in images) > MAPS_BYTES:
        images = [image for image in images if image.name.endswith("-0")]
        note = '<p class="muted">The first group of each layer; --figures writes all.</p>'
    return f'{note}<div class="maps">{"".join(map(_figure, images))}</div>'


def _gates(study: Study) -> str:
    means, *histograms = gate_charts(study)
    rows = len(study.attention.layers)
    heads = "".join(f'<div class="card">{_figure(image)}</div>' for image in gate_maps(study))
    return _section(
        "Gates",
        "Means by layer; then by layer (from above) and head (from the left), the bluer the more "
        "open; then every gate's histogram, over tokens and heads.",
        _charts([means])
        + f'<div class="charts heads" style="--rows:{rows};margin:14px 0">{heads}</div>'
        + _charts(histograms, "small"),
    )


def _table(study: Study) -> str:
    columns = (
        *("layer", "listed", "token", "layer before", "groups", "mass", "+ window", "best"),
        *("random", "recall", "chance", "kept", "entropy", "gate: cmp", "slc", "win"),
    )
    rows = [
        (
            str(i),
            number(x.listed, 1),
            percent(of(x.overlap_token, "all")),
            percent(of(x.overlap_layer, "all")),
            percent(of(x.overlap_groups, "all")),
            *(
                percent(of(part, "mean"))
                for part in (x.mass_selected, x.mass_read, x.mass_best, x.mass_random, x.recall)
            ),
            percent(x.chance),
            percent(of(x.mass_kept, "mean")),
            number(x.entropy),
            *(f"{gate.mean:.3f}" for gate in x.gates.values()),
        )
        for i, x in enumerate(study.attention.layers)
    ]
    head = "".join(f"<th>{name}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _section(title: str, text: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{content}</section>"


def _charts(charts: Sequence[Chart], *classes: str) -> str:
    cards = "".join(f'<div class="card">{chart.svg}</div>' for chart in charts)
    return f'<div class="{" ".join(("charts", *classes))}">{cards}</div>'


def _figure(image: Image) -> str:
    caption = escape(image.caption)
    return (
        f'<figure><img src="{data_uri(image.png)}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
