"""The ``sdpa`` backend on a GPU, branch by branch, beside dense causal attention, in one run.

    python benchmarks/sdpa_gpu.py 8192 32768

bf16, B 1, Hq 64, Hkv 4, Dk = Dv 128; medians in milliseconds, forward / backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from nsa import NSAConfig
from nsa.backends import load
from nsa.testing import make_inputs

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


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    sdpa = load("sdpa")
    for length in [int(x) for x in sys.argv[1:]] or [8192]:
        x = make_inputs(CONFIG, length=length, dtype=torch.bfloat16, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        blocks = sdpa.select_blocks(x.q, x.compressed.k, CONFIG)
        calls = {
            "compressed": (lambda: sdpa.compressed_attention(x.q, *x.compressed, CONFIG)[0]),
            "selected": (lambda: sdpa.selected_attention(x.q, *x.selected, blocks, CONFIG)[0]),
            "window": (lambda: sdpa.window_attention(x.q, *x.window, CONFIG)[0]),
        }
        parts = {"compressed": x.compressed, "selected": x.selected, "window": x.window}
        for name, call in calls.items():
            forward, back = both(call, (x.q, *parts[name]))
            print(f"T={length:6d} {name:11s} {forward:9.2f} / {back:9.2f}", flush=True)
        with torch.no_grad():
            lse = sdpa.compressed_attention(x.q, *x.compressed, CONFIG)[1]
            ms = do_bench(
                lambda: sdpa.select_blocks(x.q, x.compressed.k, CONFIG, lse=lse),
                return_mode="median",
            )
        print(f"T={length:6d} {'select':11s} {ms:9.2f}", flush=True)
        peak = torch.cuda.max_memory_allocated() / 2**30
        q, k, v = (y.detach().transpose(1, 2).requires_grad_() for y in (x.q, *x.selected))
        for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            with sdpa_kernel(kernel):
                forward, back = both(
                    lambda: F.scaled_dot_product_attention(
                        q, k, v, is_causal=True, enable_gqa=True
                    ),
                    (q, k, v),
                )
            print(f"T={length:6d} dense {kernel.name:16s} {forward:9.2f} / {back:9.2f}", flush=True)
        print(f"T={length:6d} peak of the NSA branches {peak:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
