"""Every Triton kernel under NVIDIA's compute-sanitizer; needs a GPU and some minutes.

    python -m tests.backends.compiled.sanitize [memcheck racecheck initcheck synccheck]

Small problems of odd sizes, regular and packed, in three dtypes. Nothing but the kernels and
PyTorch's own elementwise ones runs on the GPU: the tools do not follow some of cuBLAS's writes on
sm_90 (initcheck takes them for never written, and racecheck ends in an internal error).
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import nsa
from nsa import NSAConfig, nsa_attention
from nsa.backends.compiled.steps import decode_attention
from nsa.core import compile as core_compile
from nsa.core.inputs import BRANCHES
from nsa.core.rope import Angles, rope_table
from nsa.core.split_heads.op import split_heads, widths
from nsa.testing import Inputs, make_inputs, random_blocks
from nsa.testing.parity import planned
from tests.support.decoding import make_step, on_device
from tests.support.deterministic import deterministic

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SMALL = NSAConfig(num_heads=12, num_kv_heads=2, head_dim=64, num_selected=4, num_local=1, window=99)
WIDE = replace(SMALL, num_heads=16, num_kv_heads=1, head_dim=128)
APART = replace(SMALL, num_heads=8, head_dim=48, value_dim=24)
ODD = replace(
    APART,
    head_dim=8,
    value_dim=6,
    compress_block=4,
    compress_stride=2,
    select_block=6,
    window=7,
)
SHARED = replace(SMALL, select_share=16, select_schedule=((99, 3),))
OPTIONS = replace(SHARED, select_mass=0.8, select_regions=(1, 2), score_dtype="fp8")
LONG: dict[str, Any] = {"config": replace(SMALL, num_heads=6, num_kv_heads=1), "length": 2100}
FAR: dict[str, Any] = {"config": replace(WIDE, num_heads=4), "length": 4200}
SHAPES: tuple[dict[str, Any], ...] = (
    {"length": 1},
    {"length": 333, "batch": 2},
    {"lengths": (130, 0, 70, 1, 64)},
)


def problems() -> Iterator[dict[str, Any]]:
    """What the kernels run on: arguments of :func:`nsa.testing.make_inputs`."""
    kinds = (
        (SMALL, torch.bfloat16),
        (SMALL, torch.float32),
        (WIDE, torch.bfloat16),
        (APART, torch.bfloat16),
        (ODD, torch.float16),
        (SHARED, torch.bfloat16),
        (OPTIONS, torch.bfloat16),
        (OPTIONS, torch.float32),
    )
    # long enough for far blocks, and for dq beside dk and dv
    yield from (FAR, LONG)
    for config, dtype in kinds:
        for shape in SHAPES:
            yield {"config": config, "dtype": dtype, "surplus": "lengths" in shape, **shape}


def tasks() -> Iterator[Callable[[], None]]:
    """All that is run."""
    for shape in (FAR, LONG):  # dq of far blocks has a kernel of its own in this mode alone
        yield partial(_deterministic, **shape)
    for problem in problems():
        yield partial(_attend, **problem)
    for config, dtype in ((SMALL, torch.bfloat16), (SMALL, torch.float32), (WIDE, torch.bfloat16)):
        for tokens in (1, 3):
            yield partial(_decode, replace(config, rope_theta=None), dtype, tokens)


def run(part: str, parts: str, folder: str) -> None:
    """Every ``parts``-th task from ``part`` on; the kernels that ran are written to ``folder``."""
    core_compile.COMPILER = None  # what stands between the kernels is PyTorch's, not Inductor's
    for task in list(tasks())[int(part) :: int(parts)]:
        task()
    torch.cuda.synchronize()
    ran = (name for name, kernel in kernels().items() if any(kernel.device_caches.values()))
    Path(folder, part).write_text("\n".join(ran), encoding="utf-8")


def _attend(config: NSAConfig, **shape: Any) -> None:
    """Forward and backward: the call as a whole, then each branch, then φ's blocks of tokens and
    the heads of a layer."""
    x = make_inputs(config, device="cuda", **{"dtype": torch.bfloat16, **shape})
    out = x.attend(nsa_attention, backend="compiled")
    torch.autograd.grad(out, x.leaves(), x.dout)
    given = replace(x, block_idx=random_blocks(x, 4))
    chosen = planned("compiled", given)
    for branch in BRANCHES:
        step = getattr(chosen.step(branch), f"{branch}_attention")
        out, _ = step(*given.branch(branch), max_seqlen=x.max_seqlen)
        torch.autograd.grad(out, (x.q, *getattr(x, branch)), x.dout)
    k = x.selected.k
    blocks = torch.ops.nsa.block_tokens(k, x.cu_seqlens, x.config.key)
    torch.autograd.grad(blocks.sum(), k)
    _split_heads(x)


def _deterministic(config: NSAConfig, length: int) -> None:
    """Long enough for several chunks of one block."""
    x = make_inputs(config, length=length, dtype=torch.bfloat16, device="cuda")
    with deterministic():
        torch.utils.deterministic.fill_uninitialized_memory = False  # it hides what is not written
        torch.autograd.grad(x.attend(nsa_attention, backend="compiled"), x.leaves(), x.dout)


def _decode(config: NSAConfig, dtype: torch.dtype, tokens: int) -> None:
    step = make_step(config, (0, 700, 31), tokens, dtype=dtype)
    decode_attention(on_device(step.inputs, "cuda"), config)


def _split_heads(x: Inputs) -> None:
    config, dtype = replace(x.config, rope_theta=1e4), x.q.dtype
    shape = (*x.q.shape[:2], sum(widths(config)) + 3)
    product = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
    position = torch.arange(shape[1], device="cuda")
    angles = Angles(*rope_table(position, config.head_dim, 1e4, torch.float32))
    q, keys, values, logits = split_heads(product, None, angles, config)
    heads = (q, *keys, *values, logits)
    torch.autograd.grad(heads, product, heads)


def kernels() -> dict[str, Any]:
    """Every kernel of the package by name."""
    import triton

    found = {}
    for module in pkgutil.walk_packages(nsa.__path__, "nsa."):
        if module.name.startswith("nsa.integrations") or module.name.endswith("__main__"):
            continue  # of other libraries, and programs
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, triton.JITFunction) and value.__name__.startswith("nsa_"):
                found[value.__name__] = value
    return found


def main(tools: list[str]) -> int:
    """Each tool on processes of its own; 0 if none found anything and every kernel ran."""
    with tempfile.TemporaryDirectory() as cache:
        apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_CACHE_DIR": cache}
        environment = {**os.environ, **apart}
        _run([], environment)  # builds the kernels; under a tool that takes far longer
        failed = [tool for tool in tools or TOOLS if _finds(tool, environment)]
    return 1 if failed else 0


def _finds(tool: str, environment: dict[str, str]) -> bool:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    if tool != "initcheck":  # which has to see every write
        command += ["--kernel-name", "kernel_substring=nsa_"]
    begin = time.perf_counter()
    code = _run(command, environment)
    seconds = time.perf_counter() - begin
    print(f"{tool}: {code or 'clean'} ({seconds:.0f} s)", flush=True)
    return bool(code)


def _run(tool: list[str], environment: dict[str, str]) -> str:
    """All tasks in processes side by side; what went wrong, if anything."""
    code = f"from {__spec__.name} import run; import sys; run(*sys.argv[1:])"
    parts = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        logs = [stack.enter_context(Path(folder, f"{i}.log").open("w+")) for i in range(parts)]
        running = [
            subprocess.Popen(
                [*tool, sys.executable, "-c", code, str(part), str(parts), folder],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for part, log in enumerate(logs)
        ]
        failed = [part for part, process in enumerate(running) if process.wait()]
        for part in failed:
            logs[part].seek(0)
            print(logs[part].read(), flush=True)
        if failed:
            return f"{len(failed)} of {parts} processes failed"
        ran = {name for i in range(parts) for name in Path(folder, str(i)).read_text().split()}
    idle = sorted(set(kernels()) - ran)
    return f"expected every kernel to run, these did not: {idle}" if idle else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
