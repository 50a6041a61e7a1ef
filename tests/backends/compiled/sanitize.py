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
from collections.abc import Iterator
from dataclasses import replace
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
SHAPES: tuple[dict[str, Any], ...] = (
    {"length": 1},
    {"length": 333, "batch": 2},
    {"lengths": (130, 0, 70, 1, 64)},
)


def problems() -> Iterator[Inputs]:
    """What the kernels run on."""
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
    for config, dtype in kinds:
        for shape in SHAPES:
            yield make_inputs(
                config, dtype=dtype, device="cuda", surplus="lengths" in shape, **shape
            )
    yield make_inputs(  # long enough for far blocks
        replace(WIDE, num_heads=4),
        length=4200,
        dtype=torch.bfloat16,
        device="cuda",
    )
    yield make_inputs(  # long enough for dq beside dk and dv
        replace(SMALL, num_heads=6, num_kv_heads=1),
        length=2100,
        dtype=torch.bfloat16,
        device="cuda",
    )


def run(part: int = 0, parts: int = 1) -> None:
    """Forward and backward: the call as a whole, then each branch, then φ's blocks of tokens and
    the heads of a layer; at last steps of decode.

    With ``parts`` > 1, a share of it, for the kernels that it builds.
    """
    core_compile.COMPILER = None  # what stands between the kernels is PyTorch's, not Inductor's
    for x in list(problems())[part::parts]:
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
    # the last again, which is long enough for several chunks of one block
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would hide what is not written
    with deterministic():
        torch.autograd.grad(x.attend(nsa_attention, backend="compiled"), x.leaves(), x.dout)
    for config, dtype in ((SMALL, torch.bfloat16), (SMALL, torch.float32), (WIDE, torch.bfloat16)):
        for tokens in (1, 3):
            step = make_step(replace(config, rope_theta=None), (0, 700, 31), tokens, dtype=dtype)
            decode_attention(on_device(step.inputs, "cuda"), config)
    torch.cuda.synchronize()
    if parts > 1:
        return
    idle = sorted(
        name for name, kernel in kernels().items() if not any(kernel.device_caches.values())
    )
    assert not idle, f"expected every kernel to run, these did not: {idle}"


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
        if module.name.rpartition(".")[2] == "__main__":
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, triton.JITFunction) and value.__name__.startswith("nsa_"):
                found[value.__name__] = value
    return found


def main(tools: list[str]) -> int:
    """Each tool on a process of its own; 0 if none found anything."""
    with tempfile.TemporaryDirectory() as cache:
        apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_CACHE_DIR": cache}
        environment = {**os.environ, **apart}
        _build(environment)
        failed = [tool for tool in tools or TOOLS if _finds(tool, environment)]
    return 1 if failed else 0


def _build(environment: dict[str, str]) -> None:
    """Fill the cache without a tool, side by side: alone this takes five minutes."""
    parts = os.cpu_count() or 1
    code = f"from {__spec__.name} import run; import sys; run(int(sys.argv[1]), {parts})"
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(part)], env=environment)
        for part in range(parts)
    ]
    codes = [process.wait() for process in running]
    assert not any(codes), codes


def _finds(tool: str, environment: dict[str, str]) -> bool:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    if tool != "initcheck":  # which has to see every write
        command += ["--kernel-name", "kernel_substring=nsa_"]
    command += [sys.executable, "-c", f"from {__spec__.name} import run; run()"]
    code = subprocess.run(command, env=environment, check=False).returncode
    print(f"{tool}: {'clean' if code == 0 else f'exit code {code}'}", flush=True)
    return code != 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
