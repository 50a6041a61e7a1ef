"""One training step of the "small" model: speed, kernels, first step, memory, host syncs.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --lengths 8192 --attention dense compiled --compile blocks
    python benchmarks/train_step.py --attention compiled --text /usr/lib/python3 --train-steps 200
    python benchmarks/train_step.py --lengths 2048 --attention dense compiled compiled:s2048
    python benchmarks/train_step.py --device cpu --tiny

12 layers, width 768, Hq 12, Hkv 2, D 64, bytes, bf16 autocast; forward, backward, clipping and
fused AdamW over 65,536 random tokens that stand on the device, or over those of ``--text`` (a file,
or a folder of Python sources), other ones each step: after ``--train-steps`` the lists of selected
blocks are those of a model that has learnt something. Each configuration starts with
``torch._dynamo.reset()`` and a new model; torch's caches on the disk are used, so that "first step"
is what a new machine pays only if they were empty. One JSON line each as they come, then a table:

- tokens/s: of the median of ``--steps`` steps, after the first and two more;
- kernels: that one step launches, by torch.profiler, copies and fills left out;
- first step: seconds, compiling included;
- peak GiB: of the steps after the first;
- syncs: "none" if a step ran under ``torch.cuda.set_sync_debug_mode("error")``, else its error.

A configuration that fails, or takes longer than ``--limit-s``, says so and the next one starts. The
numerics stand on ``tests/backends/test_parity.py`` and ``tests/compile/test_train_compile.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from nsa.config import NSAConfig
from nsa.models import LanguageModel, ModelConfig

WARM_UP = 2
"""Steps after the first that are not timed, besides ``--train-steps``."""
TINY = {
    "lengths": [64],
    "attention": ["dense", "sdpa", "fa2-dense"],
    "compile": ["none", "blocks", "model"],
    "tokens": 128,
    "steps": 2,
    "compiler": "aot_eager",
}
"""For a look at whether it runs at all; fa2-dense shows what a refusal looks like on a CPU."""
FULL = {
    "lengths": [2048, 8192, 32768],
    "attention": ["dense", "sdpa", "fa2-dense", "compiled"],
    "compile": ["none", "blocks", "model"],
    "tokens": 65536,
    "steps": 10,
    "compiler": "inductor",
}
COLUMNS = (
    ("T", "length"), ("B", "batch"), ("attention", "attention"), ("compile", "compile"),
    ("tokens/s", "tokens_per_second"), ("ms/step", "step_ms"), ("kernels", "kernels"),
    ("first step s", "first_step_s"), ("peak GiB", "peak_gib"), ("syncs", "syncs"),
)  # fmt: skip


class OutOfTime(BaseException):
    """The limit of one configuration is up; no Exception, so that no compiler takes it for its own
    failure."""


@dataclass(frozen=True)
class Case:
    """One configuration."""

    length: int
    attention: str
    """"dense", or a backend of NSA; with ":" and a preset of its configuration."""
    compile: str


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block, as soon as Python runs again after ``seconds``."""

    def expire(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"took longer than --limit-s {seconds:g}")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds, 10)  # again, should something swallow it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def make_step(case: Case, args: argparse.Namespace) -> tuple[Callable[[], None], LanguageModel]:
    """The step, and the model that it trains."""
    torch.manual_seed(0)
    backend, _, preset = case.attention.partition(":")
    dense = backend == "dense"
    changes: dict[str, Any] = {"num_layers": 1} if args.tiny else {}
    if preset:
        changes["nsa"] = with_heads_of("tiny" if args.tiny else "small", NSAConfig.preset(preset))
    config = ModelConfig.preset(
        "tiny" if args.tiny else "small", attention="dense" if dense else "nsa", **changes
    )
    model = LanguageModel(
        config,
        backend=None if dense else backend,
        activation_checkpointing=args.activation_checkpointing,
        recompute=args.recompute and not dense,
        device=args.device,
    ).train()
    loss_of: Callable[..., torch.Tensor] = model.loss
    if case.compile == "model":
        loss_of = model.compile_loss(backend=args.compiler, dynamic=False)
    elif case.compile == "blocks":
        model.compile_blocks(backend=args.compiler, dynamic=False)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, betas=(0.9, 0.95), fused=True)
    shape = (max(1, args.tokens // case.length), case.length + 1)
    text = None if args.text is None else read_bytes(args.text).to(args.device)
    made = torch.randint(0, config.vocab_size, shape, device=args.device)
    offsets = torch.arange(shape[1], device=args.device)

    def step() -> None:
        batch = made
        if text is not None:
            first = torch.randint(0, text.numel() - shape[1], (shape[0], 1), device=args.device)
            batch = text[first + offsets].long()
        tokens, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            loss = loss_of(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()

    return step, model


def with_heads_of(model: str, config: NSAConfig) -> NSAConfig:
    """A preset for the model: with its heads, unless they are as wide as the model's."""
    own = NSAConfig.preset(model)
    if config.num_heads * config.head_dim == own.num_heads * own.head_dim:
        return config
    names = ("num_heads", "num_kv_heads", "head_dim", "value_dim")
    return replace(config, **{name: getattr(own, name) for name in names})


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Every figure of one configuration."""
    cuda = torch.device(args.device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    batch = max(1, args.tokens // case.length)
    begun = time.perf_counter()
    step, model = make_step(case, args)
    wait(cuda)
    built = time.perf_counter()
    step()
    wait(cuda)
    first = time.perf_counter() - built
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP + args.train_steps):
        step()
    seconds = statistics.median(times(step, args.steps, cuda))
    return {
        "batch": batch,
        "tokens_per_second": round(batch * case.length / seconds),
        "step_ms": round(seconds * 1e3, 2),
        "first_step_s": round(first, 2),
        "build_s": round(built - begun, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "syncs": syncs(step) if cuda else None,
        "kernels": kernels(step) if cuda else None,
        "backend": str(model.resolution),
    }


def read_bytes(path: str) -> torch.Tensor:
    """uint8 ``[bytes]``: a file, or every ``*.py`` of a folder, in order."""
    root = Path(path)
    files = sorted(root.rglob("*.py")) if root.is_dir() else [root]
    return torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, files))), dtype=torch.uint8)


def wait(cuda: bool) -> None:
    """Until the device has done everything."""
    if cuda:
        torch.cuda.synchronize()


def times(step: Callable[[], None], steps: int, cuda: bool) -> list[float]:
    """Seconds of each step: CUDA events, read when all have been queued, or the clock."""
    if not cuda:
        marks = [time.perf_counter()]
        for _ in range(steps):
            step()
            marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def syncs(step: Callable[[], None]) -> str:
    """ "none", or what a step waited for the device in."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return "none"


def kernels(step: Callable[[], None]) -> int:
    """Kernels that one step launches."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    ran = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    others = ("Memcpy", "Memset", "Optimizer.", "ProfilerStep")
    return sum(not event.name.startswith(others) for event in ran)


def attempt(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Figures, or the error; leaves nothing behind on the device."""
    try:
        with limited(args.limit_s):
            found = measure(case, args)
    except (Exception, OutOfTime) as error:  # noqa: BLE001 - the next configuration may well run
        lines = str(error).strip().splitlines()
        found = {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
    torch._dynamo.reset()
    gc.collect()
    if torch.device(args.device).type == "cuda":
        with contextlib.suppress(RuntimeError):  # a device that failed for good
            torch.cuda.empty_cache()
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns; an error stands where the figures would."""

    def cell(row: dict[str, Any], name: str) -> str:
        value = row.get(name)
        if value is None:
            return "-"
        return f"{value:,}" if isinstance(value, int) else str(value)

    cells = [[title for title, _ in COLUMNS]]
    cells += [[cell(row, name) for _, name in COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
        for line in cells
    ]
    for i, row in enumerate(rows, start=1):
        if "error" in row:
            figures = sum(widths[:4]) + 3 * 2
            lines[i] = f"{lines[i][:figures]}  {row['error'][:120]}"
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", metavar="T")
    parser.add_argument(
        "--attention",
        nargs="+",
        metavar="NAME",
        help="dense, or backends of NSA, such as compiled, or compiled:s2048 with a preset",
    )
    parser.add_argument("--compile", nargs="+", choices=["none", "blocks", "model"])
    parser.add_argument("--tokens", type=int, help="in one step")
    parser.add_argument("--steps", type=int, help="timed")
    parser.add_argument("--compiler", help="a backend of torch.compile")
    parser.add_argument("--limit-s", type=float, default=300.0, help="seconds a configuration")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--recompute", action="store_true", help="NSA's branches, in backward")
    parser.add_argument("--text", metavar="PATH", help="bytes to train on in place of random ones")
    parser.add_argument("--train-steps", type=int, default=0, help="before those that are timed")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", metavar="FILE", help="JSON lines go there, not to the screen")
    parser.add_argument("--tiny", action="store_true", help="one layer, few tokens: does it run?")
    args = parser.parse_args()
    for name, value in (TINY if args.tiny else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main() -> None:
    args = parse()
    importlib.import_module("torch._inductor.compile_fx")  # a limit must not cut an import short
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    machine = {"device": name, "torch": torch.__version__}
    data = "random bytes" if args.text is None else f"{args.text}, {args.train_steps} steps before"
    print(f"{name}, torch {torch.__version__}, {args.tokens:,} tokens a step, {data}", flush=True)
    rows = []
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(args.json, "w")) if args.json else None
        for length, attention, mode in product(args.lengths, args.attention, args.compile):
            case = Case(length, attention, mode)
            rows.append({**asdict(case), **attempt(case, args)})
            print(json.dumps({**machine, **rows[-1]}), file=file, flush=True)
            if file is not None:
                print(f"{length} {attention} {mode}: {rows[-1].get('error', 'done')}", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
