"""The microscope: what the NSA layers of a model read, and what that is worth.

Record a forward of any model with :class:`nsa.NSAttention` layers, measure it, or step into it:

    from nsa.inspection import inspect, record, replay

    report = inspect(model, tokens)              # every measure, as plain dataclasses
    with record(model) as recording:             # queries, keys, gates, block lists
        rollout = model(tokens)
    with replay(model, recording.lists()):       # the same blocks, whatever computes it
        model(tokens)

The command (docs/inspect.md) shows all of it for a checkpoint of ``nsa.tools.train``.
"""

from nsa.inspection.complaints import complaints
from nsa.inspection.dense import oracle_lists, random_lists
from nsa.inspection.interventions import (
    KNOCK_OUTS,
    knock_outs,
    replace_lists,
    replay,
    shut_branch,
)
from nsa.inspection.recording import (
    LayerCall,
    Recording,
    SequenceRecord,
    nsa_layers,
    record,
)
from nsa.inspection.report_types import (
    AttentionReport,
    Brief,
    GateReport,
    LayerReport,
    Overlap,
    SinkReport,
    Spread,
)
from nsa.inspection.reports import briefs, inspect, layer_reports, report

__all__ = [
    "KNOCK_OUTS",
    "AttentionReport",
    "Brief",
    "GateReport",
    "LayerCall",
    "LayerReport",
    "Overlap",
    "Recording",
    "SequenceRecord",
    "SinkReport",
    "Spread",
    "briefs",
    "complaints",
    "inspect",
    "knock_outs",
    "layer_reports",
    "nsa_layers",
    "oracle_lists",
    "random_lists",
    "record",
    "replace_lists",
    "replay",
    "report",
    "shut_branch",
]
