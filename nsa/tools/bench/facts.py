"""The facts under which rows were measured: the first line of the JSON, the first lines printed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime, timezone
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nsa.backends.fa2.providers import describe
from nsa.errors import BackendUnavailable
from nsa.settings import Settings
from nsa.tools.bench.fla import installed
from nsa.tools.bench.plan import Plan
from nsa.tools.bench.table import LEGEND, rate
from nsa.tools.bench.timing import Ceilings
from nsa.tools.common.machine import look_at_machine

COMMAND = "python -m nsa.tools.bench"


def facts(
    plan: Plan, settings: Settings, ceilings: Ceilings, argv: Sequence[str] | None
) -> dict[str, Any]:
    """Plain values for JSON."""
    machine = look_at_machine()
    arguments = sys.argv[1:] if argv is None else argv
    return {
        "kind": "header",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"{COMMAND} {shlex.join(arguments)}".strip(),
        "device": str(plan.device),
        "device_name": _device_name(plan.device, machine.cpu),
        "os": machine.os,
        "cpu": machine.cpu,
        "cores": machine.cores,
        "python": machine.python.partition(",")[0],
        "nsa": machine.nsa,
        "torch": machine.torch,
        "torch_threads": machine.torch_threads,
        "cuda_runtime": machine.cuda_runtime,
        "cuda_driver": machine.cuda_driver,
        "triton": machine.triton,
        "fla": installed(),
        "fa2_provider": _provider(settings, plan.device),
        "settings": changed_settings(settings),
        "ceilings": ceilings.to_dict(),
    }


def changed_settings(settings: Settings) -> dict[str, Any]:
    """The flags that are not at their default."""
    default = Settings()
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return {
        f"NSA_{name.upper()}": value
        for name, value in values.items()
        if value != getattr(default, name)
    }


def heading(known: dict[str, Any]) -> str:
    """The machine in one line."""
    text = f"{known['device_name']}, torch {known['torch']}"
    threads = known["torch_threads"]
    return f"{text}, threads: {threads}" if known["device"] == "cpu" else text


def print_facts(
    known: dict[str, Any], ceilings: Ceilings, skipped: dict[str, str], console: Console
) -> None:
    """Prints what a reader of the tables has to know."""
    size = ceilings.matmul_size
    rates = [
        f"{rate(per_second, 'FLOP/s')} {str(dtype).removeprefix('torch.')}"
        for dtype, per_second in ceilings.flops_per_second.items()
    ]
    copied = rate(ceilings.bytes_per_second, "B/s")
    lines = [
        ("device", heading(known)),
        ("ceilings", f"{', '.join(rates)} ({size}³), {copied} copied (read + written)"),
        ("inputs", "random, so that neighbours share few selected blocks"),
    ]
    if known["fa2_provider"] is not None:
        lines.append(("FA-2", f"from {known['fa2_provider']}"))
    if known["settings"]:
        pairs = (f"{flag}={_as_text(value)}" for flag, value in known["settings"].items())
        lines.append(("settings", " ".join(pairs)))
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, text in lines:
        table.add_row(Text(name, style="dim"), Text(text))
    reasons: dict[str, list[str]] = {}
    for name, why in skipped.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        table.add_row(Text("skipped", style="dim"), Text(f"{', '.join(names)}: {why}", style="dim"))
    console.print(table)
    console.print()
    console.print(Text(LEGEND, style="dim"))
    console.print()


def _as_text(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _device_name(device: torch.device, cpu: str) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu


def _provider(settings: Settings, device: torch.device) -> str | None:
    """What FA-2 runs on; None where there is none."""
    try:
        return describe(settings.fa2_provider, device)
    except BackendUnavailable:
        return None
