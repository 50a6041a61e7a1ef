"""Backends on a GPU, branch by branch, beside dense causal attention, in one run.

    python benchmarks/gpu.py sdpa,fa2-dense 8192 32768

bf16, B 1, Hq 64, Hkv 4, Dk = Dv 128; medians in milliseconds, forward / backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from nsa import NSAConfig
from nsa.backends import load
from nsa.testing import Inputs, make_inputs

CONFIG = NSAConfig(num_heads=64, num_kv_heads=4, head_dim=128)


def both(call: Callable[[], torch.Tensor], leaves: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Milliseconds of forward and of backward."""
    with torch.no_grad():
        forward = do_bench(call, warmup=50, rep=300, return_mode="median")
    out = call()
    dout = torch.randn_like(out)
    back = do_bench(
        lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
        warmup=50,
        rep=300,
        return_mode="median",
    )
    return forward, back


def branches(backend: str, x: Inputs) -> None:
    """Prints the time of each branch, block lists given."""
    steps, selection = load(backend), load("sdpa")
    T = x.q.shape[1]
    with torch.no_grad():
        lse = selection.compressed_attention(x.q, *x.compressed, CONFIG)[1]
        blocks = selection.select_blocks(x.q, x.compressed.k, CONFIG, lse=lse)
    torch.cuda.reset_peak_memory_stats()
    calls = {
        "compressed": (lambda: steps.compressed_attention(x.q, *x.compressed, CONFIG)[0]),
        "selected": (lambda: steps.selected_attention(x.q, *x.selected, blocks, CONFIG)[0]),
        "window": (lambda: steps.window_attention(x.q, *x.window, CONFIG)[0]),
    }
    parts = {"compressed": x.compressed, "selected": x.selected, "window": x.window}
    for name, call in calls.items():
        forward, back = both(call, (x.q, *parts[name]))
        print(f"T={T:6d} {backend:10s} {name:11s} {forward:9.2f} / {back:9.2f}", flush=True)
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"T={T:6d} {backend:10s} peak {peak:.2f} GiB", flush=True)
    if backend == "sdpa":
        with torch.no_grad():
            ms = do_bench(
                lambda: steps.select_blocks(x.q, x.compressed.k, CONFIG, lse=lse),
                return_mode="median",
            )
        print(f"T={T:6d} {backend:10s} {'select':11s} {ms:9.2f}", flush=True)


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for length in [int(x) for x in sys.argv[2:]] or [8192]:
        x = make_inputs(CONFIG, length=length, dtype=torch.bfloat16, device="cuda")
        for backend in sys.argv[1].split(","):
            branches(backend, x)
        q, k, v = (y.detach().transpose(1, 2).requires_grad_() for y in (x.q, *x.selected))
        for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            with sdpa_kernel(kernel):
                forward, back = both(partial(dense, q, k, v), (q, k, v))
            print(f"T={length:6d} dense {kernel.name:16s} {forward:9.2f} / {back:9.2f}", flush=True)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention over all keys."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


if __name__ == "__main__":
    main()
